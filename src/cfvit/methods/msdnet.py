"""MSDNet: a convolutional network of four resolutions with an exit after each of its five blocks.

Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018, in its form for
ImageNet: 4 layers in each block, growth 16, 32 channels, factors 1-2-4-4; as described, not by its code. There is no
ViT in it. It is trained from scratch, on images of the size and with the preprocessing that the backbone would take.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cfvit.errors import UsageError
from cfvit.methods.base import register
from cfvit.methods.multi_exit import MultiExit, MultiExitNetwork, StageOutput
from cfvit.modeling.backbones import patch_size, preprocessing
from cfvit.modeling.config import ModelConfig

BLOCKS, LAYERS, CHANNELS, GROWTH = 5, 4, 32, 16
FACTORS = (1, 2, 4, 4)
"""From the finest resolution to the coarsest: of channels, of growth and of the width of bottlenecks."""


def convolve(in_chs: int, out_chs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_chs), nn.ReLU())


def bottleneck(in_chs: int, out_chs: int, factor: int, stride: int = 1) -> nn.Sequential:
    """A convolution behind a layer of at most ``factor * out_chs`` channels."""
    inner = min(in_chs, factor * out_chs)
    return nn.Sequential(convolve(in_chs, inner, 1), convolve(inner, out_chs, 3, stride))


class Join(nn.Module):
    """New maps of a resolution, made of its own and of those of the next finer one, are joined to its own.

    Args:
        width: channels of a resolution of factor 1.
        factor: of the resolution.
        finer: factor of the next finer one, None where there is none.
    """

    def __init__(self, width: int, factor: int, finer: int | None) -> None:
        super().__init__()
        new = GROWTH * factor // (1 if finer is None else 2)
        self.own = bottleneck(width * factor, new, factor)
        self.finer = None if finer is None else bottleneck(width * finer, new, finer, stride=2)

    def forward(self, own: Tensor, finer: Tensor | None) -> Tensor:
        parts = [own] if self.finer is None else [own, self.finer(finer)]
        return torch.cat([*parts, self.own(own)], dim=1)


class Layer(nn.Module):
    """A layer on all resolutions that are left: from maps of each to maps of each, the finest first.

    Args:
        width: channels of a resolution of factor 1 that come in.
        entering: factors of the resolutions that come in.
        leaving: how many resolutions go out; where the finest ends, half of the channels of the others end too.
    """

    def __init__(self, width: int, entering: tuple[int, ...], leaving: int) -> None:
        super().__init__()
        self.first = len(entering) - leaving
        places = range(self.first, len(entering))
        self.joins = nn.ModuleList(Join(width, entering[i], entering[i - 1] if i else None) for i in places)
        self.width = (width + GROWTH) // (2 if self.first else 1)
        self.shrink = None
        if self.first:
            sizes = ((factor * (width + GROWTH), factor * self.width) for factor in entering[self.first :])
            self.shrink = nn.ModuleList(convolve(*pair, 1) for pair in sizes)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        after = [join(maps[i], maps[i - 1] if i else None) for i, join in enumerate(self.joins, start=self.first)]
        return after if self.shrink is None else [shrink(own) for shrink, own in zip(self.shrink, after, strict=True)]


class ConvolutionalNetwork(MultiExitNetwork):
    """A network of convolutions with exits, whose stem makes a map of each resolution.

    Args:
        size: of the images in pixels.
        widths: channels of each resolution, the finest first.
        exits: how many there are.
    """

    def __init__(self, size: tuple[int, int], widths: list[int], exits: int) -> None:
        super().__init__([f"exit {number}" for number in range(1, exits + 1)])
        self.image_size = size
        self.stem = nn.ModuleList([nn.Sequential(convolve(3, widths[0], 7, 2), nn.MaxPool2d(3, 2, 1))])
        self.stem.extend(convolve(*pair, 3, 2) for pair in pairwise(widths))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The stem's maps of images ``[B, 3, S, S]``, the finest first."""
        maps = [self.stem[0](images)]
        for coarser in self.stem[1:]:
            maps.append(coarser(maps[-1]))
        return maps

    def exit_head(self, channels: int, num_classes: int) -> nn.Sequential:
        """From maps of the coarsest resolution to logits.

        Two convolutions halve the maps; of small images fewer, as a map of one pixel cannot be halved (and oneDNN's
        gradient of that convolution in bfloat16 holds whatever was in memory).
        """
        side = -(-max(self.image_size) // 2 ** (len(self.stem) + 1))
        strided = [convolve(channels, channels, 3, 2) for _ in range(min(2, (side - 1).bit_length()))]
        return nn.Sequential(*strided, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class MultiScaleDenseNet(ConvolutionalNetwork):
    """The network; a stage hands on the maps of its resolutions."""

    def __init__(self, size: tuple[int, int], num_classes: int) -> None:
        super().__init__(size, [CHANNELS * factor for factor in FACTORS], BLOCKS)
        self.blocks, self.heads = nn.ModuleList(), nn.ModuleList()
        width, entering, interval = CHANNELS, FACTORS, BLOCKS * LAYERS // len(FACTORS)
        for block in range(BLOCKS):
            layers = []
            for number in range(block * LAYERS, (block + 1) * LAYERS):
                leaving = len(FACTORS) - number // interval
                layers.append(Layer(width, entering, leaving))
                width, entering = layers[-1].width, FACTORS[-leaving:]
            self.blocks.append(nn.Sequential(*layers))
            self.heads.append(self.exit_head(width * FACTORS[-1], num_classes))

    def stage(self, index: int, images: Tensor, previous: StageOutput | None) -> StageOutput:
        """A block on the maps of the one before, or of the stem, and its classifier."""
        maps = self.blocks[index](self.maps(images) if previous is None else previous.features)
        return StageOutput(self.heads[index](maps[-1]), maps)


@register("msdnet")
class MSDNet(MultiExit):
    """All exits learn from the labels or the teacher, from scratch."""

    title = "MSDNet"
    network_class: ClassVar[type[Any]] = MultiScaleDenseNet

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        """A network with random weights, for images of the size and preprocessing of the backbone that is named.

        Raises:
            UsageError: weights were given.
        """
        if weights is not None:
            raise UsageError(f"{self.name} has no use for weights of a ViT: leave out initial_weights")
        height, width = patch_size(config.backbone, **config.timm_kwargs)
        size = (2 * config.grid[0] * height, 2 * config.grid[1] * width)
        network = self.network_class(size, config.num_classes)
        network.data_config = {**preprocessing(config.backbone, **config.timm_kwargs), "input_size": (3, *size)}
        network.class_names = class_names
        return network
