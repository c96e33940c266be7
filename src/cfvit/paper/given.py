"""A trained model that a user gives in place of runs: a cfvit model, or a plain ViT of timm's for Figure 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config

from cfvit.calibration.overlap import shared_images
from cfvit.checkpoints import CONFIG_FILE, initialise, load
from cfvit.data import EvalImages
from cfvit.data.labels import readable_class_names
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.evaluation.metrics import Collected, labelled_images
from cfvit.inference.engines.packing import accelerate
from cfvit.methods.base import create_method
from cfvit.methods.plain import backbone_of
from cfvit.modeling.model import CoarseToFineViT, create_model
from cfvit.modeling.weights import is_of_plain_network
from cfvit.paper.runs import Result, score
from cfvit.paper.studies import COARSE_GRID, DEFAULT, PLAIN, Study
from cfvit.processes import best_device
from cfvit.training.recipe import Recipe


def is_plain_vit(name: str) -> bool:
    """Whether a name is of a timm model rather than of a cfvit model."""
    return name.startswith("local-dir:") or (timm.is_model(name) and not Path(name).exists())


def suits(study: Study, name: str) -> bool:
    """Whether a study needs no more than this model."""
    return study.kind in ("patches", "attention") or (not is_plain_vit(name) and study.runs == (DEFAULT,))


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
    whole = Result(method.macs(answering), scored, None, lambda: (model, images), rule=model.exit)
    seen = Collected({}, scored.labels, scored.indices, [])  # Figure 1 needs to know which images can be read alone
    backbone = Result(create_method("plain").macs(network), seen, None, lambda: (network, images))
    return {PLAIN: [backbone], COARSE_GRID: [whole]} | ({} if plain else {DEFAULT: [whole]})


def compared(
    name: str, plain: str, calibration_data: str, recipe: Recipe, part_files: Sequence[Path]
) -> tuple[dict[str, list[Result]], dict[str, frozenset[int]]]:
    """A coarse-to-fine model and a plain ViT, scored on images to choose eta on and on the recipe's validation images.

    Args:
        plain: a file of backbone weights, a timm model, or ``local-dir:FOLDER``.
        part_files: see `read_part`.

    Returns:
        Results by the run whose place they take, and the class indices of each part by its file's name.

    Raises:
        CfvitError: models or data that do not go together, or images that are in both data sets.
    """
    device = best_device()
    model = load(name).eval().to(device)
    if is_plain_vit(plain):
        other = _plain_vit(plain)
    else:
        other = CoarseToFineViT(model.config)
        initialise(other, plain)
    sizes = [(each.config.num_classes, each.image_size) for each in (model, other)]
    if sizes[0] != sizes[1]:
        ours, theirs = (f"{classes} classes and images of {size[0]} x {size[1]}" for classes, size in sizes)
        raise CfvitError(f"{name} has {ours}, {plain} has {theirs}: give the plain ViT that the model was made from")
    network = backbone_of(other.eval().to(device))
    fast, fast_plain = accelerate(model), accelerate(network)
    data = recipe.val_data or recipe.data[0], calibration_data
    sources = [labelled_images(model, each) for each in data]
    parts = {path.stem: read_part(path, sources[0].class_names) for path in part_files}
    if shared := shared_images(sources[0], sources[1], range(len(sources[1]))):
        raise CfvitError(
            f"{len(shared)} images to score on are also among those to choose eta on, {sources[0].name(shared[0][0])} "
            "first: give other --calibration-data"
        )
    # opened anew, since a tar that was read here is not fit for loading processes
    images = [EvalImages(labelled_images(model, each), model.data_config) for each in data]
    both = [score(lambda batch: {**fast(batch)._asdict(), "plain": fast_plain(batch)}, recipe, each) for each in images]
    results = {}
    for run, method, net in ((DEFAULT, create_method("cf_vit"), model), (PLAIN, create_method("plain"), network)):
        macs, rule = method.macs(net), model.exit
        own = [Collected({at: each.logits[at] for at in macs}, each.labels, each.indices, []) for each in both]
        results[run] = [Result(macs, own[0], own[1], lambda net=net: (net, images[0]), rule=rule)]
    return results, parts


def read_part(path: Path, class_names: Sequence[str]) -> frozenset[int]:
    """Indices of the classes that a file names, one on each line; ImageNet's classes also by their identifiers.

    Raises:
        UsageError: the file cannot be read, or names something that is no class.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({first_line(error)}): give a file with a class on each line") from error
    places = {name: index for index, name in enumerate(class_names)}
    for line, name in zip(lines, readable_class_names(lines), strict=True):
        if name not in places:
            near = ", ".join(repr(known) for known in class_names[:3])
            raise UsageError(f"{path} names {line!r}, which is no class of the data: give such as {near}")
    if not lines:
        raise UsageError(f"{path} names no class: give a file with a class on each line")
    return frozenset(places[name] for name in readable_class_names(lines))


def _plain_vit(name: str) -> CoarseToFineViT:
    """timm's model in a coarse-to-fine one, whose coarse positions are resampled from its own."""
    try:
        plain: Any = timm.create_model(name, pretrained=True)
        architecture, kwargs = name.partition(".")[0], {}
        if name.startswith("local-dir:"):
            config = json.loads((Path(name.removeprefix("local-dir:")) / CONFIG_FILE).read_text())
            if not is_of_plain_network(config):
                raise CfvitError("a coarse-to-fine model; cfvit convert --to timm writes its plain ViT")
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
