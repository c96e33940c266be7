"""Parameters that several commands share, and what becomes of them."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from cfvit.errors import UsageError
from cfvit.modeling.config import field_help
from cfvit.training.recipe import Recipe, read_value

if TYPE_CHECKING:
    from cfvit.inference.predictor import Predictor
    from cfvit.modeling.model import CoarseToFineViT

DEFAULT_MODEL = "deit_tiny_imagenet"
Threshold = Annotated[
    float | None,
    Parameter(
        validator=Number(gte=0, lte=1),
        help="eta, the confidence at which the coarse answer is given; by default the model's",
    ),
]
Model = Annotated[str, Parameter(help="saved folder, authors' .pth, or a bundled name (see cfvit models)")]
CalibrationFile = Annotated[
    Path | None, Parameter(name="--calibration", help="use this calibration.json instead of the model's own eta")
]
Json = Annotated[bool, Parameter(negative="", help="one JSON object per line on stdout, nothing else there")]
BatchSize = Annotated[int, Parameter(validator=Number(gte=1), help="images per batch")]
Workers = Annotated[int, Parameter(validator=Number(gte=0), help="processes that load images")]
Share = Annotated[float, Parameter(validator=Number(gte=0, lte=1))]


def load_model(model: str, calibration: Path | None) -> CoarseToFineViT:
    """The model, under another calibration if one is given."""
    from cfvit.checkpoints import apply_calibration, load

    network = load(model)
    if calibration is not None:
        apply_calibration(network, calibration)
    return network


def is_exported(model: str, **for_torch: object) -> bool:
    """Whether a model is an exported folder.

    Args:
        for_torch: what was given for options, by their names, that an exported model does not take.

    Raises:
        UsageError: it is one, and such an option is given.
    """
    from cfvit.inference.engines.exported import is_exported

    given = [name.replace("_", "-") for name, value in for_torch.items() if value]
    if given and is_exported(model):
        raise UsageError(f"--{given[0]} is for models in torch, and {model} is an exported one: leave it out")
    return is_exported(model)


def load_predictor(model: str, threshold: float | None, calibration: Path | None) -> Predictor:
    """What answers by a model in torch, on the best device, or by an exported one."""
    from cfvit.inference.predictor import Predictor
    from cfvit.processes import best_device

    if is_exported(model, calibration=calibration):
        return Predictor(model, threshold)
    return Predictor(load_model(model, calibration).to(best_device()), threshold)


OPEN_FIELDS = ("timm_kwargs", "method_options")
"""Fields of a recipe that hold names with values, given as ``--timm-kwargs.NAME VALUE``."""


def _overrides_class() -> type:
    """All fields of a recipe as optional flags, so that only those given override it."""
    words: dict[str, Any] = {"coarse_grid": str, "data": list[str]} | dict.fromkeys(OPEN_FIELDS, dict[str, str])
    hints = typing.get_type_hints(Recipe) | words
    flags = []
    for name, text in field_help(Recipe).items():
        if name not in Recipe.follows:
            flag = Parameter(help=text, show_default=False, consume_multiple=name == "data", negative_iterable="")
            flags.append((name, Annotated[hints[name] | None, flag], None))
    return dataclasses.make_dataclass(
        "Overrides",
        flags,
        kw_only=True,
        frozen=True,
        namespace={"__module__": __name__},  # cyclopts takes a class of module "types" for a built-in
    )


if TYPE_CHECKING:
    Overrides = Recipe
else:
    Overrides = _overrides_class()
NO_OVERRIDES = Overrides()


def given_fields(overrides: Overrides) -> dict[str, Any]:
    """The fields of a recipe that were given as flags."""
    given = {name: value for name, value in dataclasses.asdict(overrides).items() if value is not None}
    return given | {name: read_options(given[name]) for name in OPEN_FIELDS if name in given}


def read_options(words: dict[str, str]) -> dict[str, Any]:
    """Names with values as the command line gives them, ``keep-rate 0.7``, read as YAML reads values."""
    return {name.replace("-", "_"): read_value(text) for name, text in words.items()}
