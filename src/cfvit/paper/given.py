"""Trained networks that a user gives: a cfvit model, a plain ViT of timm's, or the runs in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from torch import Tensor

from cfvit.checkpoints import CONFIG_FILE, classes_of, load
from cfvit.data import DataSource, EvalImages, difference_of_classes, readable_class_names
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.evaluation.calibrate import refuse_training_images, shared_images
from cfvit.evaluation.metrics import Collected, labelled_images
from cfvit.inference.engines.packing import accelerate
from cfvit.methods.base import Method, create_method
from cfvit.methods.plain import backbone_of
from cfvit.modeling.backbones import patch_size
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.exit import Exit
from cfvit.modeling.model import CoarseToFineViT, create_model
from cfvit.modeling.weights import is_of_plain_network
from cfvit.paper.runs import Result, score
from cfvit.paper.studies import COARSE_GRID, DEFAULT, PLAIN
from cfvit.processes import best_device
from cfvit.training.recipe import Recipe
from cfvit.training.setup import CLASSES_FILE, open_run, training_images


def is_plain_vit(name: str) -> bool:
    """Whether a name is of a timm model rather than of a cfvit model."""
    return name.startswith("local-dir:") or (timm.is_model(name) and not Path(name).exists())


def results_of_model(name: str, recipe: Recipe) -> dict[str, list[Result]]:
    """What a model answers to the validation images of the recipe's data, by the run whose place it takes.

    Raises:
        CfvitError: no such model, weights that cannot be had, data of other classes.
    """
    model = (_plain_vit(name) if is_plain_vit(name) else load(name)).eval().to(best_device())
    images = EvalImages(labelled_images(model, recipe.val_data or recipe.data[0]), model.data_config)
    network, plain = backbone_of(model), create_method("plain")
    method, answering = (plain, network) if is_plain_vit(name) else (create_method("cf_vit"), model)
    scored = score(lambda batch: method.answers(answering, batch), recipe, images)
    whole = Result(method, method.macs(answering), scored, None, lambda: (model, images), rule=model.exit)
    seen = Collected({}, scored.labels, scored.indices, [])  # Figure 1 needs to know which images can be read alone
    backbone = Result(plain, plain.macs(network), seen, None, lambda: (network, images))
    own = {} if is_plain_vit(name) else {DEFAULT: [whole]}
    return {PLAIN: [backbone], COARSE_GRID: [whole], **own}


@dataclass(frozen=True, eq=False)
class Contestant:
    """A trained network of some method, to be compared with a plain ViT."""

    method: Method
    network: Any
    config: ModelConfig
    untrained: bool = False  # whether its weights are those that its run started from
    training: tuple[DataSource, Sequence[int]] | None = None  # what it was trained on, and which of it, if known

    @property
    def form(self) -> str:
        """What networks that are compared have in common, in words."""
        height, width = self.network.image_size
        return f"{self.config.num_classes} classes and images of {height} x {width}"


def contestants_in(folder: Path) -> dict[str, Contestant]:
    """The runs of `cfvit train`, of any method, in the sub-folders of a folder; each is called ``run SUB-FOLDER``.

    Raises:
        CfvitError: there is none, or one is damaged.
    """
    found = {}
    for run in sorted(path.parent for path in folder.glob(f"*/{CLASSES_FILE}")):
        recipe, method, network = open_run(run)
        config = recipe.model_config(len(network.class_names))
        untrained = recipe.initial_share == 1
        found[f"run {run.name}"] = Contestant(method, network, config, untrained, training_images(run))
    if not found:
        raise CfvitError(f"{folder} has no folder of a run of cfvit train: give the folder that they are in")
    return found


def _plain_beside(name: str, first: str, rival: Contestant) -> Contestant:
    """The plain ViT that a network is compared with: a file of backbone weights, or as of `is_plain_vit`."""
    if is_plain_vit(name):
        model = _plain_vit(name)
        plain, class_names, config = backbone_of(model), model.class_names, model.config
    else:
        plain, config = create_method("plain").build(rival.config, name), rival.config
        class_names = classes_of(name, config.backbone)[0]
    known = rival.network.class_names
    if class_names and known and (difference := difference_of_classes(known, class_names)):
        raise CfvitError(
            f"{name} is of other classes than {first}: {difference}; give the plain ViT that it was made from"
        )
    return Contestant(create_method("plain"), plain, config)


def compared(
    rivals: Mapping[str, Contestant], plain: str, calibration_data: str, recipe: Recipe, part_files: Sequence[Path]
) -> tuple[dict[str, list[Result]], dict[str, frozenset[int]]]:
    """Networks and a plain ViT, scored on images to choose eta on and on the recipe's validation images.

    Args:
        rivals: by the run whose place they take.
        plain: a file of backbone weights, a timm model, or ``local-dir:FOLDER``.
        part_files: see `read_part`.

    Returns:
        Results by the run whose place they take, and the class indices of each part by its file's name.

    Raises:
        CfvitError: models or data that do not go together, images that are in both, or that a rival was trained on.
    """
    first, network = next((name, rival.network) for name, rival in rivals.items())
    every = {**rivals, PLAIN: _plain_beside(plain, first, rivals[first])}
    for name, rival in rivals.items():
        if rival.form != every[PLAIN].form:
            raise CfvitError(
                f"{name} has {rival.form}, {plain} has {every[PLAIN].form}: give the plain ViT that it was made from"
            )
        own = rival.network
        if (own.data_config, own.class_names) != (network.data_config, network.class_names):
            raise CfvitError(f"{name} has other classes or another preprocessing than {first}: leave it out")
    data = recipe.val_data or recipe.data[0], calibration_data
    sources = [labelled_images(network, each) for each in data]
    parts = {path.stem: read_part(path, sources[0].class_names) for path in part_files}
    if shared := shared_images(sources[0], sources[1], range(len(sources[1]))):
        raise CfvitError(
            f"{len(shared)} images to score on are also among those to choose eta on, {sources[0].name(shared[0][0])} "
            "first: give other --calibration-data"
        )
    for source, rival in product(sources, rivals.values()):
        if rival.training is not None:
            refuse_training_images(source, *rival.training)
    fast = {name: accelerate(each.network.eval().to(best_device())) for name, each in every.items()}

    def answers(batch: Tensor) -> dict[str, Tensor]:
        answered = {name: each.method.answers(fast[name], batch) for name, each in every.items()}
        return {f"{name}/{point}": logits for name, points in answered.items() for point, logits in points.items()}

    # opened anew, since a tar that was read here is not fit for loading processes
    images = [EvalImages(labelled_images(network, each), network.data_config) for each in data]
    both = [score(answers, recipe, each) for each in images]
    results = {}
    for name, each in every.items():
        macs, rule = each.method.macs(each.network), getattr(each.network, "exit", Exit())
        scored, held = (
            Collected({at: answered.logits[f"{name}/{at}"] for at in macs}, answered.labels, answered.indices, [])
            for answered in both
        )
        opened = each.network, images[0]
        result = Result(each.method, macs, scored, held, lambda opened=opened: opened, None, rule, each.untrained)
        results[name] = [result]
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
    architecture, kwargs = name.partition(".")[0], {}
    try:
        if name.startswith("local-dir:"):
            config = json.loads((Path(name.removeprefix("local-dir:")) / CONFIG_FILE).read_text())
            if not is_of_plain_network(config):
                raise CfvitError(f"{name} is a coarse-to-fine model: cfvit convert --to timm writes its plain ViT")
            ours = ("img_size", "num_classes", "in_chans", "pretrained")  # these follow from other arguments below
            architecture = config["architecture"]
            kwargs = {key: value for key, value in config.get("model_args", {}).items() if key not in ours}
        patch_size(architecture, **kwargs)  # refuses what is no ViT with a class token, before weights are downloaded
        plain: Any = timm.create_model(name, pretrained=True)
    except CfvitError:
        raise
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
