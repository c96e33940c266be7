"""From images to answers, by as little work as will do."""

from cfvit.inference.predictor import Predictor
from cfvit.inference.stream import Prediction

__all__ = ["Prediction", "Predictor"]
