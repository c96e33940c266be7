"""The method: equations, the two stages, the exit, their cost."""

from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.model import CoarseState, CoarseToFineOutput, CoarseToFineViT, create_model

__all__ = ["CoarseState", "CoarseToFineOutput", "CoarseToFineViT", "StageMacs", "count_macs", "create_model"]
