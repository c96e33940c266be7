"""CF-ViT whose fine stage reduces its tokens as EViT does: both ways of sparing tokens in one network."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from cfvit.files import atomic_write
from cfvit.methods.base import Method, register
from cfvit.methods.cf_vit import CfViT, build_model
from cfvit.methods.evit import run_reorganising
from cfvit.methods.plain_blocks import require_plain_vit
from cfvit.methods.slimming import KeepRate
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.exit import Exit
from cfvit.modeling.model import CoarseToFineViT


class ReorganisingFineStage(CoarseToFineViT):
    """The coarse stage as it is; in the fine one, three blocks fuse the tokens of least class attention."""

    keep = 1.0

    def run_fine(self, tokens: Tensor, rotation: Tensor | None) -> Tensor:
        return run_reorganising(self.backbone, tokens, self.keep)


@register("cf_evit")
class CfEViT(CfViT):
    """Trained, scored and exited as CF-ViT; its folder is its own, as `cfvit.load` would leave the reduction out."""

    title = "CF-ViT with EViT"
    options_class = KeepRate

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        network: Any = build_model(config, weights, class_names, ReorganisingFineStage)
        require_plain_vit(network.backbone)
        network.keep = self.options.keep_rate
        return network

    def save(self, network: Any, folder: Path) -> None:
        Method.save(self, network, folder)
        with atomic_write(folder / "exit.json") as file:
            file.write_text(json.dumps(asdict(network.exit)) + "\n")

    def load(self, network: Any, folder: Path) -> Any:
        network.exit = Exit(**json.loads((folder / "exit.json").read_text()))
        return Method.load(self, network, folder)
