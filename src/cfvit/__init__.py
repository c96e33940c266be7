"""Coarse-to-fine vision transformers (CF-ViT, AAAI 2023): easy images at a glance, hard ones in detail.

The public names are loaded when first used, so that the command line can print its help
without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfvit.calibration import Calibration, calibrate
    from cfvit.checkpoints import bundled_models, load, save
    from cfvit.data import eval_transform, open_image
    from cfvit.deploy.export import export
    from cfvit.deploy.hub import push_to_hub
    from cfvit.errors import CfvitError
    from cfvit.inference.predictor import Predictor
    from cfvit.inference.stream import Prediction
    from cfvit.modeling.cost import StageMacs, count_macs
    from cfvit.modeling.model import CoarseState, CoarseToFineOutput, CoarseToFineViT, create_model

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CfvitError",
    "CoarseState",
    "CoarseToFineOutput",
    "CoarseToFineViT",
    "Prediction",
    "Predictor",
    "StageMacs",
    "bundled_models",
    "calibrate",
    "count_macs",
    "create_model",
    "eval_transform",
    "export",
    "load",
    "open_image",
    "push_to_hub",
    "save",
]

_HOMES = {
    "calibration": ("Calibration", "calibrate"),
    "checkpoints": ("bundled_models", "load", "save"),
    "deploy.export": ("export",),
    "deploy.hub": ("push_to_hub",),
    "data": ("eval_transform", "open_image"),
    "errors": ("CfvitError",),
    "inference": ("Prediction", "Predictor"),
    "modeling.cost": ("StageMacs", "count_macs"),
    "modeling.model": ("CoarseState", "CoarseToFineOutput", "CoarseToFineViT", "create_model"),
}
_HOME_OF = {name: f"cfvit.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'cfvit' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
