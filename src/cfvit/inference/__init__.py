"""From images to answers, by as little work as will do."""

from cfvit.inference.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
