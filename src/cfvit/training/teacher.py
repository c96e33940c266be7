"""Teachers: trained classifiers that answer for an image, or for every place of one (token labels)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor

from cfvit.checkpoints import CONFIG_FILE
from cfvit.data import difference_of_classes, have_one_order
from cfvit.errors import CfvitError
from cfvit.modeling.backbones import in_timms_keys, load_strictly
from cfvit.modeling.weights import digest_of, is_of_plain_network, read_weights


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained classifier that is asked about a student's images."""

    name: str  # what timm calls it
    model: Any  # a timm model in evaluation mode
    data_config: Mapping[str, Any]  # its own preprocessing, timm's keys
    student_config: Mapping[str, Any]  # ``mean`` and ``std`` by which the images that it is called with are normalised
    class_names: list[str] | None = None  # by class index, where the teacher names its classes

    @property
    def device(self) -> torch.device:
        """Where its weights are, and its images must be."""
        return next(self.model.parameters()).device

    def weights_sha256(self) -> str:
        """A digest of its weights, their names included: the same on any device."""
        return digest_of(self.model.state_dict())

    def require_classes(self, class_names: Sequence[str]) -> None:
        """Refuses data of other classes than the teacher's.

        Raises:
            CfvitError: another number of classes or, where the teacher names its own, another order.
        """
        if len(class_names) != self.model.num_classes:
            raise CfvitError(
                f"teacher {self.name} has {self.model.num_classes} classes, the data {len(class_names)}: "
                "give a teacher trained on the classes of the data"
            )
        difference = None if self.class_names is None else difference_of_classes(class_names, self.class_names)
        if difference is not None:
            raise CfvitError(
                f"teacher {self.name} has other classes, {difference}: give one trained on the classes of the data"
            )
        if self.class_names is None and not have_one_order(class_names):
            warnings.warn(
                f"teacher {self.name} does not say how its classes are numbered: they are taken in natural order, "
                "2 before 10, and torchvision has another; if it teaches nonsense, give a folder with label_names",
                stacklevel=2,
            )

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """Logits for a student's images: ``[B, 3, H, W] -> [B, C]``, without gradient."""
        return self.model(self._prepared(images))

    def places(self, images: Tensor) -> Tensor:
        """Logits at each place of a student's images: ``[B, 3, H, W] -> [B, C, h, w]``, without gradient."""
        return self.dense(self._prepared(images))

    def require_dense(self) -> None:
        """Refuses an architecture that cannot be asked at each place.

        Raises:
            CfvitError: its head cannot be applied to a single place.
        """
        try:
            shape = self.dense(torch.zeros(1, *self.data_config["input_size"], device=self.device)).shape
            if shape[1] != self.model.num_classes:
                raise CfvitError(f"its head gives {shape[1]} logits")
        except Exception as error:  # heads of some architectures cannot be read so at all
            reason = " ".join(str(error).split())[:200]
            raise CfvitError(
                f"teacher {self.name} cannot be asked at each place ({reason}): "
                "choose another, such as resnet50 or deit_small_patch16_224"
            ) from error

    @torch.no_grad()
    def dense(self, images: Tensor) -> Tensor:
        """Logits at each place of images in the teacher's own preprocessing: ``[B, 3, H, W] -> [B, C, h, w]``.

        Raises `CfvitError` of a model that gives neither a map nor tokens; h and w are the teacher's own.
        """
        features = self.model.forward_features(images)
        dims = features.ndim if isinstance(features, Tensor) else 0
        model = self.model
        if dims == 4:  # the head at each place of the map, as if that were a map of one place
            channels_last = features.shape[-1] == model.num_features != features.shape[1]
            places = features if channels_last else features.permute(0, 2, 3, 1)
            batch, rows, cols, dim = places.shape
            places = places.reshape(-1, 1, 1, dim) if channels_last else places.reshape(-1, dim, 1, 1)
            logits = model.forward_head(places)
        elif dims == 3:
            # In sequences of one patch each, the patch also stands for the class token and the like, so that it alone
            # counts, however the model pools.
            has_class_token = getattr(model, "cls_token", None) is not None
            prefix = getattr(model, "num_prefix_tokens", int(has_class_token))
            patches = features[:, prefix:]
            batch, count, dim = patches.shape
            height, width = images.shape[-2:]
            rows, cols = round(math.sqrt(count * height / width)), round(math.sqrt(count * width / height))
            if rows * cols != count:
                raise CfvitError(f"its {count} tokens do not tile an image of {height} x {width}")
            if getattr(model, "aux_head", None) is not None:
                logits = model.aux_head(patches)
            else:
                logits = model.forward_head(patches.reshape(-1, 1, dim).expand(-1, prefix + 1, -1))
        else:
            raise CfvitError("its features are neither a map nor tokens")
        return logits.reshape(batch, rows, cols, -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _prepared(self, images: Tensor) -> Tensor:
        """Images normalised by the student's figures as the teacher wants them."""

        def figures(config: Mapping[str, Any], name: str) -> Tensor:
            return torch.tensor(config[name], device=images.device, dtype=images.dtype)[:, None, None]

        own = self.data_config
        offset = figures(self.student_config, "mean") - figures(own, "mean")
        images = images * (figures(self.student_config, "std") / figures(own, "std")) + offset / figures(own, "std")
        size = own["input_size"][-2:]
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bilinear", antialias=True)


def load_teacher(
    name: str,
    num_classes: int,
    weights: Path | None = None,
    device: torch.device | None = None,
    *,
    student: Mapping[str, Any] | None = None,
) -> Teacher:
    """A trained timm model as a teacher.

    Args:
        name: of a timm model, or ``local-dir:FOLDER`` as written by timm.
        num_classes: of a model with ``weights``; `Teacher.require_classes` compares it with the data's.
        weights: a file with timm's own names of weights; by default those that timm has for the name.
            The positions of a plain ViT trained at another size are resampled.
        device: the CPU by default.
        student: ``mean`` and ``std`` by which the images that it will be called with are normalised, as in
            a model's ``data_config``; by default the teacher's own.

    Raises:
        CfvitError: no such model, weights that cannot be had or do not fit.
    """
    if not timm.is_model(name) and Path(name).is_dir():
        name = f"local-dir:{name}"
    source, _, folder = name.partition(":")
    try:
        config = json.loads((Path(folder) / CONFIG_FILE).read_text()) if source == "local-dir" else None
    except (OSError, ValueError):  # of which timm says more
        config = None
    if isinstance(config, dict) and not ("architecture" in config and is_of_plain_network(config)):
        raise CfvitError(
            f"teacher {name} is no plain timm model by its {CONFIG_FILE}: "
            "give a folder written by timm, cfvit train --method plain or cfvit convert --to timm"
        )
    try:
        options: dict[str, Any] = {"pretrained": True} if weights is None else {"num_classes": num_classes}
        create: Any = timm.create_model
        model = create(name, **options)
    except Exception as error:  # timm, the Hub and the architectures raise whatever they like
        reason = " ".join(str(error).split())[:200]
        raise CfvitError(
            f"teacher {name} cannot be had ({reason}): give a timm model, local-dir:FOLDER, or a file of its weights"
        ) from error
    names = model.pretrained_cfg.get("label_names")
    if weights is not None:
        found = read_weights(weights)
        names = found.class_names or names
        load_strictly(model, in_timms_keys(model, found), f"{weights} does not fit the teacher {name}")
    model = model.eval().requires_grad_(False).to(device or torch.device("cpu"))
    config = resolve_model_data_config(model)
    names = None if names is None else list(names)
    return Teacher(name, model, config, config if student is None else student, names)
