"""Parameters that several commands share, and what becomes of them."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, NormFloat, PositiveInt

from cfvit.errors import UsageError
from cfvit.modeling.config import field_help
from cfvit.training.recipe import Recipe, load_recipe, read_value

if TYPE_CHECKING:
    from cfvit.inference.predictor import Predictor
    from cfvit.modeling.model import CoarseToFineViT

DEFAULT_MODEL = "deit_tiny_imagenet"
Flag = Annotated[bool, Parameter(negative="")]

Model = Annotated[str, Parameter(help="saved folder, authors' .pth, or a bundled name (see cfvit models)")]
Threshold = Annotated[
    NormFloat | None, Parameter(help="eta, the confidence at which the coarse answer is given; by default the model's")
]
CalibrationFile = Annotated[Path | None, Parameter(help="use this calibration.json instead of the model's own eta")]
Json = Annotated[Flag, Parameter(help="one JSON object per line on stdout, nothing else there")]
BatchSize = Annotated[PositiveInt, Parameter(help="images per batch")]
Workers = Annotated[NonNegativeInt, Parameter(help="processes that load images")]
RecipeFile = Annotated[Path | None, Parameter(help="YAML of recipe fields, such as a run's recipe.yaml")]


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

    exported = is_exported(model)
    given = [name.replace("_", "-") for name, value in for_torch.items() if value]
    if exported and given:
        raise UsageError(f"--{given[0]} is for models in torch, and {model} is an exported one: leave it out")
    return exported


def load_predictor(model: str, threshold: float | None, calibration: Path | None) -> Predictor:
    """What answers by a model in torch, on the best device, or by an exported one."""
    from cfvit.inference.predictor import Predictor
    from cfvit.processes import best_device

    if is_exported(model, calibration=calibration):
        return Predictor(model, threshold)
    return Predictor(load_model(model, calibration).to(best_device()), threshold)


OPEN_FIELDS = ("timm_kwargs", "method_options")
"""Fields of a recipe that hold names with values, given as ``--timm-kwargs.NAME VALUE``."""


def _fields_of_a_recipe() -> dict[str, Any]:
    """All of them as flags, with their help."""
    words: dict[str, Any] = {"coarse_grid": str, "data": list[str]} | dict.fromkeys(OPEN_FIELDS, dict[str, str])
    hints = typing.get_type_hints(Recipe) | words
    return {
        name: Annotated[hints[name], Parameter(help=text)]
        for name, text in field_help(Recipe).items()
        if name not in Recipe.follows
    }


if TYPE_CHECKING:
    Fields = dict[str, Any]
else:
    Fields = typing.TypedDict("Fields", _fields_of_a_recipe(), total=False)
Overrides = Annotated[Fields | None, Parameter(name="*", group="Recipe fields")]


def read_recipe(name: str, config: Path | None, overrides: Fields | None) -> Recipe:
    """The recipe of this name, changed by a file and then by the fields that were given as flags.

    A name of an open field leaves the others of that field as they are; another method has other options.
    """
    recipe, given = load_recipe(name, config), dict(overrides or {})
    for key in (key for key in OPEN_FIELDS if key in given):
        lost = key == "method_options" and given.get("method", recipe.method) != recipe.method
        given[key] = ({} if lost else dict(getattr(recipe, key))) | read_options(given[key])
    return recipe.replace(given)


def read_options(words: dict[str, str]) -> dict[str, Any]:
    """Names with values as the command line gives them, ``keep-rate 0.7``, read as YAML reads values."""
    return {name.replace("-", "_"): read_value(text) for name, text in words.items()}
