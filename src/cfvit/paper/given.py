"""A trained model that a user gives in place of runs: a cfvit model, or a plain ViT of timm's for Figure 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config

from cfvit.checkpoints import CONFIG_FILE, load
from cfvit.data import EvalImages
from cfvit.data.labels import readable_class_names
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.evaluation.metrics import labelled_images
from cfvit.methods.base import create_method
from cfvit.methods.plain import backbone_of
from cfvit.modeling.model import CoarseToFineViT, create_model
from cfvit.paper.runs import Result, score
from cfvit.paper.studies import COARSE_GRID, DEFAULT, PLAIN, Study
from cfvit.processes import best_device
from cfvit.training.recipe import Recipe


def is_plain_vit(name: str) -> bool:
    """Whether a name is of a timm model rather than of a cfvit model."""
    return name.startswith("local-dir:") or (timm.is_model(name) and not Path(name).exists())


def suitable_studies(studies: Sequence[Study], name: str, skip_others: bool) -> list[Study]:
    """The studies that need no more than this model.

    Args:
        skip_others: leave the others out instead of refusing them.

    Raises:
        UsageError: names a study that compares trainings.
    """
    suited = [
        study
        for study in studies
        if study.kind in ("patches", "attention") or (not is_plain_vit(name) and study.runs == (DEFAULT,))
    ]
    for study in studies:
        if study not in suited and not skip_others:
            needed = "a plain ViT" if is_plain_vit(name) else "one trained model"
            raise UsageError(f"{study.name} needs more than {needed}: leave out --model and its runs are trained")
    return suited


def results_of_model(name: str, recipe: Recipe) -> dict[str, list[Result]]:
    """What a model answers to the validation images of the recipe's data, by the run whose place it takes.

    Raises:
        CfvitError: no such model, weights that cannot be had, data of other classes.
    """
    plain = is_plain_vit(name)
    model = (_plain_vit(name) if plain else load(name)).eval().to(best_device())
    images = EvalImages(labelled_images(model, recipe.val_data or recipe.data[0]), model.data_config)
    network = backbone_of(model)
    method, answering = (create_method("plain"), network) if plain else (create_method("cf_vit"), model)
    scored = score(lambda batch: method.answers(answering, batch), recipe, images)
    whole = Result(method.name, method.macs(answering), scored, None, lambda: (model, images), rule=model.exit)
    seen = replace(scored, logits={})  # Figure 1 needs to know which images can be read, and no answers
    backbone = Result("plain", create_method("plain").macs(network), seen, None, lambda: (network, images))
    return {PLAIN: [backbone], COARSE_GRID: [whole]} | ({} if plain else {DEFAULT: [whole]})


def _plain_vit(name: str) -> CoarseToFineViT:
    """timm's model in a coarse-to-fine one, whose coarse positions are resampled from its own."""
    try:
        plain: Any = timm.create_model(name, pretrained=True)
        architecture, kwargs = name.partition(".")[0], {}
        if name.startswith("local-dir:"):
            config = json.loads((Path(name.removeprefix("local-dir:")) / CONFIG_FILE).read_text())
            ours = ("img_size", "num_classes", "in_chans", "pretrained")  # these follow from other arguments below
            architecture = config["architecture"]
            kwargs = {key: value for key, value in config.get("model_args", {}).items() if key not in ours}
    except Exception as error:  # timm raises errors of any kind
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
