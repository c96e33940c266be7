"""What an image costs, in multiply-accumulates (MACs), which this literature calls FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from cfvit.modeling.exit import require_number
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.timm_vit import embed_children
from cfvit.modeling.tokens import gather_tokens, num_informative


@dataclass(frozen=True)
class StageMacs:
    """Cost of one image in MACs.

    Attributes:
        coarse: the coarse stage alone.
        fine: the fine stage alone, which always comes on top of the coarse one.
        backbone: the plain backbone at the full image size.
        spared: what the authors' way adds to the fine stage: it embeds the fine patches of all
            cells and reuses the features of all, then drops those of cells that are not split.
    """

    coarse: Annotated[int, Field(ge=1)]  # which a file's figures are checked by
    fine: Annotated[int, Field(ge=0)]
    backbone: Annotated[int, Field(ge=1)]
    spared: Annotated[int, Field(ge=0)] = 0

    @property
    def both(self) -> int:
        """The cost of an image that goes on: both stages."""
        return self.coarse + self.fine

    @property
    def both_in_paper(self) -> int:
        """The same by the paper's accounting, for comparison with its tables."""
        return self.both + self.spared

    def expected(self, fine_share: float) -> float:
        """Mean cost of an image if this share of them goes on to the fine stage.

        Raises:
            CfvitError: a share outside [0, 1].
        """
        require_number("fine_share", fine_share, lambda s: 0 <= s <= 1, "a number from 0 to 1, such as float(share)")
        return self.coarse + fine_share * self.fine


def count_macs(model: CoarseToFineViT) -> StageMacs:
    """Counts one image through each stage and through the backbone, exactly, without computing it.

    Counted by torch's own flop counter, halved, on a copy without data: every matrix product and
    convolution that runs, and nothing else (as the paper does). Only what is needed is charged:
    the fine stage embeds the children of informative cells alone, so both stages of DeiT-S at
    alpha 0.5 cost 3.96 GMACs where the paper's accounting of the whole fine image gives 4.01.
    """
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    cells = model.grid[0] * model.grid[1]
    informative = num_informative(model.config.informative_ratio, cells)
    dtype = next(model.parameters()).dtype
    images = torch.empty(1, 3, *model.image_size, device="meta", dtype=dtype)
    state = model.coarse(images)

    def embed_and_reuse(count: int) -> None:
        chosen = torch.empty(1, count, dtype=torch.long, device="meta")
        embed_children(model.backbone, images, chosen)
        if model.feature_reuse is not None and model.config.feature_reuse != "uninformative":  # which drops none
            model.feature_reuse(gather_tokens(state.tokens, chosen))

    return StageMacs(
        coarse=macs_of(lambda: model.coarse(images)),
        fine=macs_of(lambda: model.fine(images, state)),
        backbone=macs_of(lambda: model.backbone(images)),
        spared=macs_of(lambda: embed_and_reuse(cells)) - macs_of(lambda: embed_and_reuse(informative)),
    )


def macs_of(run: Callable[[], Any]) -> int:
    """The MACs of what a call runs: every matrix product and convolution, and nothing else."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
