"""What defines a model besides its weights: the one place that knows the fields, their ranges and their help."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from cfvit.errors import CfvitError, UsageError

Selection = Literal["attention", "negative", "random"]
"""Which cells are split: those with the highest class attention, as in the paper, the lowest, or any (Table 4)."""

Reuse = Literal["mlp", "linear", "none", "class_token", "uninformative"]
"""What the fine stage takes over of the coarse features: the paper's way, and the variants of its Table 5."""

Class = TypeVar("Class", bound=type)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def configuration(cls: Class) -> Class:
    """A frozen pydantic dataclass of strict types whose first wrong value is a one-line `UsageError`."""
    made: Any = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))(cls)
    validate = made.__init__

    def checked(self: Any, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            raise _usage_error(error, list(field_help(made))) from None

    made.__init__ = checked
    return made


def field_help(cls: Any) -> dict[str, str]:
    """What each field of a configuration is for, by its name; a class's own fields come before those of its bases."""
    names = [name for base in cls.__mro__ for name in inspect.get_annotations(base)]
    found = cls.__pydantic_fields__
    return {name: found[name].description or "" for name in names if name in found}


_ALLOWED = {
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "literal_error": "one of {expected}",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "mapping_type": "names with values",
    "dict_type": "names with values",
}
"""What to give instead, by pydantic's types of errors."""


def _usage_error(error: ValidationError, names: list[str]) -> CfvitError:
    first = error.errors()[0]
    context: dict[str, Any] = first.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, CfvitError):  # raised by a class's own checks of several fields together
        return cause
    name = str(first["loc"][0]) if first["loc"] else "a value"
    if first["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"choose among {', '.join(names)}" if names else "leave it out"
        return UsageError(f"there is no field {name!r}: {f'did you mean {near[0]!r}?' if near else hint}")
    if first["type"] in ("missing", "missing_argument"):
        return UsageError(f"{name} is missing: give it")
    context = {key: str(value).replace("'", "").replace(" or ", ", ") for key, value in context.items()}
    allowed = _ALLOWED.get(first["type"], first["msg"].removeprefix("Input should be ")).format(**context)
    return UsageError(f"{name} is {first['input']!r}: give {allowed}")


def read_grid(value: Any) -> int | tuple[int, int]:
    """A coarse grid from ``7``, ``"7"``, ``"5x8"`` or ``[5, 8]``.

    Raises:
        UsageError: anything else.
    """
    sides = value
    if isinstance(value, str):
        sides = [int(side) if side.isdecimal() and side.isascii() else 0 for side in value.lower().split("x")]
        sides = sides[0] if len(sides) == 1 else sides
    if isinstance(sides, (list, tuple)) and len(sides) == 2 and all(type(side) is int and side >= 1 for side in sides):
        return sides[0], sides[1]  # JSON and YAML have no tuples
    if type(sides) is int and sides >= 1:
        return sides
    raise UsageError(f"coarse_grid is {value!r}: give a whole number of at least 1, or ROWSxCOLUMNS such as 5x8")


def _read_number(value: Any) -> Any:
    """YAML reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Grid = Annotated[int | tuple[int, int], BeforeValidator(read_grid)]
"""A side of the coarse grid in cells, or rows and columns."""

Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_read_number)]


@configuration
class ModelConfig:
    """What defines a model besides its weights. Saved as part of ``config.json``.

    Raises:
        UsageError: a value out of its range, which is named with what is allowed.
    """

    backbone: str = Field(description="timm ViT with a class token, or an lvvit")
    num_classes: int = Field(default=1000, ge=1, description="size of the head")
    coarse_grid: Grid = Field(default=7, description="side of the coarse grid in cells, or ROWSxCOLUMNS such as 5x8")
    informative_ratio: Number = Field(default=0.5, ge=0, le=1, description="share of cells that the fine stage splits")
    attention_momentum: Number = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="beta of the global class attention; 0 for the last block's attention alone",
    )
    selection: Selection = Field(
        default="attention",
        description="cells to split: highest class attention, lowest (negative), or random (Table 4)",
    )
    feature_reuse: Reuse = Field(
        default="mlp", description="what the fine stage takes over of coarse features (Table 5)"
    )
    fine_merged: int = Field(
        default=0,
        ge=0,
        description="tokens merged before each block of the fine stage but those of the first third, as ToMe does",
    )
    timm_kwargs: Annotated[Mapping[str, Any], BeforeValidator(lambda value: value or {})] = Field(
        default_factory=dict, description="further timm arguments, as in --timm-kwargs.patch_size 8"
    )

    reserved: ClassVar[frozenset[str]] = frozenset({"img_size", "num_classes", "pretrained", "in_chans"})
    """Arguments of timm's that follow from other fields."""

    of_fine_stage: ClassVar[frozenset[str]] = frozenset(
        {"informative_ratio", "attention_momentum", "selection", "feature_reuse", "fine_merged"}
    )
    """Fields that say how the fine stage reads an image; the coarse stage answers alike whatever they are."""

    def __post_init__(self) -> None:
        taken = ", ".join(sorted(self.reserved & set(self.timm_kwargs)))
        if taken == "in_chans":
            raise UsageError("in_chans cannot be given to timm: images have 3 channels")
        if taken:
            raise UsageError(f"{taken} cannot be given to timm: it follows from cfvit's own arguments")
        for name, rate in self.timm_kwargs.items():  # timm takes any, and fails or drops all in training
            if name.endswith("_rate") and not (type(rate) in (int, float) and 0 <= rate < 1):
                raise UsageError(f"{name} is {rate!r}: give at least 0 and less than 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the coarse grid."""
        return self.coarse_grid if isinstance(self.coarse_grid, tuple) else (self.coarse_grid, self.coarse_grid)


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[_Finite, Field(gt=0)]


@configuration
class Preprocessing:
    """How images are prepared for a model: timm's keys of ``data_config``.

    Raises:
        UsageError: a key that is missing or unknown, or a value out of its range, with what is allowed.
    """

    input_size: tuple[Literal[3], int, int]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
    mean: tuple[_Finite, _Finite, _Finite]
    std: tuple[_Positive, _Positive, _Positive]
    crop_pct: Annotated[_Positive, Field(le=2)]
    crop_mode: Literal["center", "squash", "border"] = "center"


@configuration
class Objective:
    """What training minimises: the weight of each term, 0 to leave it out (see `cfvit.modeling.losses`)."""

    label_weight: Number = Field(
        default=1.0, ge=0, description="weight of the fine stage's cross entropy with the label"
    )
    coarse_label_weight: Number = Field(
        default=0.0, ge=0, description="the same for the coarse stage (1 in Table 8's row ce)"
    )
    coarse_fine_weight: Number = Field(
        default=1.0, ge=0, description="weight of the coarse stage's KL divergence from the fine stage"
    )
    fine_teacher_weight: Number = Field(
        default=0.0, ge=0, description="weight of the fine stage's KL divergence from the teacher"
    )
    coarse_teacher_weight: Number = Field(default=0.0, ge=0, description="the same for the coarse stage")
    temperature: Number = Field(default=1.0, gt=0, description="temperature of the divergences from the teacher")
    label_smoothing: Number = Field(default=0.1, ge=0, lt=1, description="label smoothing")
    token_label_weight: Number = Field(
        default=1.0, ge=0, description="weight of the tokens' loss; 0.5 in the LV-ViT paper, 1 in CF-ViT's runs"
    )

    def __post_init__(self) -> None:
        weights = (self.label_weight, self.coarse_label_weight, self.coarse_fine_weight)
        if not any((*weights, self.fine_teacher_weight, self.coarse_teacher_weight)):
            raise UsageError("all weights of the loss are 0, so nothing would be learnt: give one above 0")

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher's answer to the whole image is learnt."""
        return self.fine_teacher_weight > 0 or self.coarse_teacher_weight > 0
