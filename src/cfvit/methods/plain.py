"""The plain ViT, for comparison: trained, scored and saved as timm's own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import Tensor

from cfvit.files import atomic_write
from cfvit.methods.base import Method, register
from cfvit.methods.cf_vit import build_model
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.weights import CONFIG_FILE, WEIGHTS_FILE, write_weights


@register("plain")
class Plain(Method):
    """The backbone of the coarse-to-fine model, which starts from the same weights as that does."""

    title = "plain ViT"
    point = "plain"
    """What its operating point is called."""

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        return backbone_of(build_model(config, weights, class_names))

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {self.point: network}

    def save(self, network: Any, folder: Path) -> None:
        """In timm's own format, which it reads as ``local-dir:FOLDER`` and transformers as a model of timm's."""
        elsewhere = ("url", "file", "hf_hub_id", "source")
        described = {k: v for k, v in network.pretrained_cfg.items() if k not in elsewhere} | network.data_config
        write_weights(network, folder / WEIGHTS_FILE)
        with atomic_write(folder / CONFIG_FILE) as file:
            save_config_for_hf(
                network,
                str(file),
                model_config={"label_names": network.class_names, "pretrained_cfg": described},
                model_args={
                    "img_size": network.image_size,
                    **{k: v for k, v in network.timm_kwargs.items() if k != "pretrained_cfg_overlay"},  # described
                },
            )
            config = json.loads(file.read_text())
            config["model_args"].pop("num_classes", None)  # transformers gives timm the number above by itself
            file.write_text(json.dumps(config, indent=2) + "\n")


def backbone_of(model: CoarseToFineViT) -> Any:
    """The plain ViT in a model, with what is needed to use it: preprocessing, class names, image size."""
    network: Any = model.backbone
    network.data_config, network.class_names = model.data_config, model.class_names
    network.image_size, network.timm_kwargs = model.image_size, dict(model.config.timm_kwargs)
    return network
