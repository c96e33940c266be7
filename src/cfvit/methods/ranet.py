"""RANet: four convolutional networks of growing resolution, each of which takes over the maps of the one before.

Yang et al., "Resolution Adaptive Networks for Efficient Inference", CVPR 2020, in its form for ImageNet: four scales,
8 layers in each block, growth 16, 32 channels, factors 1-2-2-4; as described, not by its code. Choices that are open:
networks have 2, 4, 6 and 8 blocks and halve their resolution after every two, so that a block meets one of the network
before that is half as fine; the last two, which are as coarse as those, meet its last maps; half of a layer's new maps
are made of these; a 1 x 1 convolution halves the channels after each block; an exit follows each of a network's last
two blocks. There is no ViT in it, and the paper shows its costs in a figure alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfvit.methods.base import register
from cfvit.methods.msdnet import ConvolutionalNetwork, MSDNet, bottleneck, convolve
from cfvit.methods.multi_exit import StageOutput

LAYERS, CHANNELS, GROWTH, EACH = 8, 32, 16, 2
FACTORS = (1, 2, 2, 4)
"""From the finest resolution to the coarsest: of channels, of growth and of the width of bottlenecks."""


class FusionBlock(nn.Module):
    """Dense layers of one resolution, in which half of the new maps are made of the network's before.

    Args:
        in_chs: channels that come in.
        factor: of the resolution.
        joined: channels of the network before, None for the first one, which makes all maps of its own.
        halve: whether the resolution is halved at the end, where the channels are.
    """

    def __init__(self, in_chs: int, factor: int, joined: int | None, halve: bool) -> None:
        super().__init__()
        new = GROWTH * factor // (1 if joined is None else 2)
        widths = [in_chs + GROWTH * factor * layer for layer in range(LAYERS)]
        self.own = nn.ModuleList(bottleneck(width, new, factor) for width in widths)
        self.other = None if joined is None else nn.ModuleList(bottleneck(joined, new, factor) for _ in widths)
        joint = in_chs + GROWTH * factor * LAYERS
        self.width = joint // 2
        self.shrink = convolve(joint, self.width, 3 if halve else 1, 2 if halve else 1)

    def forward(self, maps: Tensor, joined: Tensor | None) -> Tensor:
        for layer, own in enumerate(self.own):
            parts = [maps, own(maps)]
            if self.other is not None:
                parts.append(F.interpolate(self.other[layer](joined), maps.shape[-2:], mode="bilinear"))
            maps = torch.cat(parts, dim=1)
        return self.shrink(maps)


class ResolutionAdaptiveNet(ConvolutionalNetwork):
    """The four networks. A stage hands on the stem's maps, the maps after each block of the network before, and those
    of its own network so far."""

    def __init__(self, size: tuple[int, int], num_classes: int) -> None:
        super().__init__(size, [CHANNELS * factor for factor in FACTORS], EACH * len(FACTORS))
        self.networks, self.heads = nn.ModuleList(), nn.ModuleList()
        joined: list[int] = []
        for number, factor in enumerate(reversed(FACTORS)):
            blocks, widths = nn.ModuleList(), list[int]()
            width = CHANNELS * factor
            for index in range(EACH * (number + 1)):
                level = number - index // EACH  # 0 for the coarsest
                other = joined[min(index, len(joined) - 1)] if joined else None
                block = FusionBlock(width, FACTORS[-1 - level], other, level > 0 and index % EACH == EACH - 1)
                width = block.width
                blocks.append(block)
                widths.append(width)
                if level == 0:
                    self.heads.append(self.exit_head(width, num_classes))
            self.networks.append(blocks)
            joined = widths

    def stage(self, index: int, images: Tensor, previous: StageOutput | None) -> StageOutput:
        """The rest of a network's blocks up to an exit, on what the network before made, and its classifier."""
        number, place = divmod(index, EACH)
        stem, joined, own = (self.maps(images), [], []) if previous is None else previous.features
        joined, own = (own, []) if place == 0 else (joined, [*own])  # a new network meets the maps of the one before
        blocks: Any = self.networks[number]
        maps = own[-1] if own else stem[-1 - number]
        for block in blocks[len(own) : len(blocks) - EACH + 1 + place]:
            maps = block(maps, joined[min(len(own), len(joined) - 1)] if joined else None)
            own.append(maps)
        return StageOutput(self.heads[index](maps), (stem, joined, own))


@register("ranet")
class RANet(MSDNet):
    """All exits learn from the labels or the teacher, from scratch."""

    title = "RANet"
    network_class = ResolutionAdaptiveNet
