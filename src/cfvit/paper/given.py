"""A trained model in place of runs: a cfvit model, or a plain ViT of timm's for the experiments on patches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config

from cfvit.benchmark.conditions import Conditions
from cfvit.checkpoints import CONFIG_FILE, load
from cfvit.data import EvalImages
from cfvit.data.labels import readable_class_names
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.evaluation.metrics import labelled_images
from cfvit.modeling.cost import count_macs
from cfvit.modeling.model import CoarseToFineViT, create_model
from cfvit.paper.records import Finished, RunRecord
from cfvit.paper.runs import score
from cfvit.paper.studies import DEFAULT, Study
from cfvit.processes import best_device
from cfvit.training.recipe import Recipe

_PATCH_KINDS = ("patches", "attention")


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A trained model and the images that it is scored on.

    Attributes:
        model: of a plain ViT, its weights in both stages, which were not trained for the coarse one.
        images: validation images.
    """

    model: CoarseToFineViT
    images: EvalImages


def suits_a_model(study: Study, is_plain: bool) -> bool:
    """Whether a study needs no more than a trained model."""
    return study.kind in _PATCH_KINDS or (not is_plain and study.runs == (DEFAULT,))


def require_suitable(studies: list[Study], is_plain: bool) -> None:
    """Refuses studies that compare trainings.

    Raises:
        UsageError: says which.
    """
    for study in studies:
        if not suits_a_model(study, is_plain):
            kind = "a plain ViT" if is_plain else "one trained model"
            raise UsageError(f"{study.name} needs more than {kind}: leave out --model and its runs are trained")


def names_plain_vit(name: str) -> bool:
    """Whether a name is of a timm model rather than of a cfvit model."""
    return name.startswith("local-dir:") or (timm.is_model(name) and not Path(name).exists())


def open_given(name: str, recipe: Recipe) -> Given:
    """A model by name, on the validation images of the recipe's data.

    Raises:
        CfvitError: no such model, weights that cannot be had, data of other classes.
    """
    model = (_plain_vit(name) if names_plain_vit(name) else load(name)).eval().to(best_device())
    source = labelled_images(model, recipe.val_data or recipe.data)
    return Given(model, EvalImages(source, model.data_config))


def _plain_vit(name: str) -> CoarseToFineViT:
    """timm's model as both stages of a coarse-to-fine one, its positions resampled for the coarse grid."""
    try:
        plain: Any = timm.create_model(name, pretrained=True)
        architecture, kwargs = _architecture(name)
    except Exception as error:  # timm raises whatever it likes on what is not there
        raise CfvitError(
            f"timm's model {name} cannot be had ({first_line(error)}): give local-dir:FOLDER of one that is here"
        ) from error
    rows, columns = plain.patch_embed.grid_size
    if rows % 2 or columns % 2:
        raise CfvitError(f"{name} has {rows} x {columns} patches: give a ViT with an even number of them on each side")
    model = create_model(
        architecture,
        num_classes=plain.num_classes,
        coarse_grid=(rows // 2, columns // 2),
        pretrained_backbone=plain.state_dict(),
        **kwargs,
    )
    model.data_config = {**resolve_model_data_config(plain), "input_size": (3, *model.image_size)}
    labels = plain.pretrained_cfg.get("label_names")
    model.class_names = None if labels is None else readable_class_names(list(labels))
    return model


def _architecture(name: str) -> tuple[str, dict[str, Any]]:
    """timm's name of an architecture, and what a folder says to give it besides its size."""
    if not name.startswith("local-dir:"):
        return name.partition(".")[0], {}
    config = json.loads((Path(name.removeprefix("local-dir:")) / CONFIG_FILE).read_text())
    given = config.get("model_args", {})
    return config["architecture"], {key: value for key, value in given.items() if key not in _FOLLOWING}


_FOLLOWING = frozenset({"img_size", "num_classes", "in_chans", "pretrained"})
"""timm's arguments that follow from others of ours."""


def as_finished(given: Given, recipe: Recipe, conditions: Conditions) -> Finished:
    """The model's answers to the validation images, as if it had been a run; it has no hold-out."""
    scored = score(given.model, recipe, given.images)
    macs = count_macs(given.model)
    record = RunRecord(
        name="the given model",
        stages="both",
        grid="x".join(map(str, given.model.grid)),
        seed=recipe.seed,
        epochs=0,
        seconds=0.0,
        finished=True,
        forked_from=None,
        images={"validation": len(scored.labels)},
        macs=dataclasses.asdict(macs),
        conditions=dataclasses.asdict(conditions),
    )
    return Finished(recipe, Path(), record, scored, scored, macs, given.model.exit)
