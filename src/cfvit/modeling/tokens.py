"""The paper's equations on tensors: coarse image, class attention, selection, splitting.

Pure functions without parameters. Shapes use the paper's symbols: ``B`` images, ``N`` coarse
cells in a grid of ``rows x columns``, ``D`` channels of a token, ``P`` the side of a patch in
pixels, ``k`` informative cells. Equation numbers are those of Chen et al., "CF-ViT: A General
Coarse-to-Fine Method for Vision Transformer", AAAI 2023 (arXiv:2203.03821).

A *cell* is one coarse patch: an area of ``2P x 2P`` pixels of the image. Its four *children*
are the fine patches of ``P x P`` pixels in it, in the order top left, top right, bottom left,
bottom right. Cells and fine patches are numbered row by row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvit.modeling.config import Selection

CHILDREN = 4
"""A cell is split 2 x 2."""


def coarse_image(images: Tensor) -> Tensor:
    """The image at half its side, as the coarse stage sees it: ``[B, C, S, S] -> [B, C, S/2, S/2]``.

    Bilinear with aligned corners, as the paper's models were trained.
    """
    half = (images.shape[-2] // 2, images.shape[-1] // 2)
    return F.interpolate(images, size=half, mode="bilinear", align_corners=True)


def class_attention_row(query: Tensor, key: Tensor, scale: float, num_prefix_tokens: int) -> Tensor:
    """How much the class token attends to each patch, averaged over heads (the row of Eq. 2).

    Args:
        query: ``[B, H, T, D/H]``, of which only the first token, the class token, is read.
        key: ``[B, H, T, D/H]``.
        scale: factor on the scores, usually ``(D/H) ** -0.5``.
        num_prefix_tokens: tokens in front of the patches, left out after the softmax.

    Returns:
        ``[B, T - num_prefix_tokens]``, softmax and mean in float32 whatever the precision of the
        inputs: cells are ranked by small differences. The full ``[B, H, T, T]`` map is never built. The row
        only ranks cells, so no gradient flows through it.
    """
    with torch.no_grad():
        scores = (query[:, :, :1] * scale) @ key.transpose(-2, -1)
        return scores.float().softmax(dim=-1)[:, :, 0, num_prefix_tokens:].mean(dim=1)


def accumulate_attention(average: Tensor | None, row: Tensor, momentum: float) -> Tensor:
    """One step of the global class attention, from zero (Eq. 9): ``[B, N] -> [B, N]``."""
    update = (1 - momentum) * row
    return update if average is None else momentum * average + update


def score_cells(class_attention: Tensor, selection: Selection) -> Tensor:
    """What cells are ranked by: ``[B, N] -> [B, N]``; at random, new numbers in each call, by torch's generator."""
    if selection == "random":
        return torch.rand_like(class_attention)
    return -class_attention if selection == "negative" else class_attention


def num_informative(ratio: float, num_cells: int) -> int:
    """``ceil(ratio * num_cells)`` of Eq. 10, free of binary rounding (0.55 of 100 is 55)."""
    return math.ceil(round(ratio * num_cells, 6))


def rank_cells(class_attention: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` cells with the highest global class attention, and the others: ``[B, N] -> [B, k], [B, N - k]``.

    Among equals the lower number goes first.
    """
    order = class_attention.argsort(dim=1, descending=True, stable=True)
    return order[:, :k], order[:, k:]


def child_positions(cells: Tensor, columns: int) -> Tensor:
    """Where the children of cells lie on the fine grid of twice as many rows and columns: ``[B, k] -> [B, 4k]``.

    The four children of a cell stand side by side. ``columns`` is the number of the coarse grid's.
    """
    row, column = cells // columns, cells % columns
    top_left = 4 * columns * row + 2 * column
    corner = torch.arange(CHILDREN, device=cells.device)
    return (top_left[..., None] + 2 * columns * (corner // 2) + corner % 2).flatten(1)


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """``tokens[b, positions[b]]`` for every image: ``[B or 1, N, D], [B, k] -> [B, k, D]``."""
    index = positions[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.expand(positions.shape[0], -1, -1).gather(1, index)


def cut_children(images: Tensor, cells: Tensor, patch: tuple[int, int], sources: Tensor | None = None) -> Tensor:
    """The pixels of the children of the given cells, and of no others, in one gather.

    Args:
        images: ``[B, C, rows * 2 * P, columns * 2 * P]``.
        cells: cell numbers ``[B, k]``.
        patch: height and width ``P`` of a fine patch.
        sources: ``[B, k]``, the image of the batch that each cell is cut from; by default its own.

    Returns:
        ``[B, 4k, C, P, P]``, ordered as in `child_positions`.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // (2 * patch[0]), width // (2 * patch[1])
    grid = images.reshape(batch, channels, rows, 2, patch[0], columns, 2, patch[1])
    grid = grid.permute(0, 2, 5, 3, 6, 1, 4, 7)  # a view: B, row, column, 2, 2, C, P, P
    if sources is None:
        sources = torch.arange(batch, device=images.device)[:, None]
    return grid[sources, cells // columns, cells % columns].flatten(1, 3)


def cells_in_box(box: tuple[int, int, int, int], grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Which cells lie in ``box``, ``(top, left, bottom, right)`` in cells: ``[N]``, boolean."""
    top, left, bottom, right = box
    inside = torch.zeros(grid, dtype=torch.bool, device=device)
    inside[top:bottom, left:right] = True
    return inside.flatten()


def mirrored_sources(mixed: Tensor, batch: int) -> Tensor:
    """Which image each cell shows if MixToken puts image ``B - 1 - b`` into mixed cells of ``b``: ``[N] -> [B, N]``."""
    own = torch.arange(batch, device=mixed.device)[:, None]
    return torch.where(mixed, batch - 1 - own, own)


def repeat_for_children(tokens: Tensor) -> Tensor:
    """Each cell's token once for each of its children (Fig. 4): ``[B, k, D] -> [B, 4k, D]``."""
    return tokens.repeat_interleave(CHILDREN, dim=1)


def merge_similar(tokens: Tensor, keys: Tensor, sizes: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
    """Bipartite soft matching: every other patch may be merged into the most similar one of the rest.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.

    Args:
        tokens: ``[B, 1 + n, D]``, the class token first, which is never merged.
        keys: ``[B, 1 + n, d]``; tokens are similar by the cosine of their keys.
        sizes: ``[B, 1 + n]``, how many patches each token stands for; None for one each.
        count: how many tokens are merged away, those with the most similar partners; at most half of the patches.

    Returns:
        Tokens ``[B, 1 + n - count, D]``, each the mean of its patches, and their sizes.
    """
    count = min(count, (tokens.shape[1] - 1) // 2)
    if count <= 0:
        return tokens, sizes
    if sizes is None:
        sizes = tokens.new_ones(tokens.shape[:2])
    directions = F.normalize(keys[:, 1:], dim=-1)
    similarity, partner = (directions[:, 0::2] @ directions[:, 1::2].transpose(1, 2)).max(dim=-1)
    going, staying = rank_cells(similarity, count)
    partner = partner.gather(1, going)

    def merge(values: Tensor) -> Tensor:
        movable, fixed = values[:, 0::2], values[:, 1::2]
        moved = gather_tokens(movable, going)
        fixed = fixed.scatter_add(1, partner[..., None].expand_as(moved), moved)
        return torch.cat([gather_tokens(movable, staying), fixed], dim=1)

    weights = sizes[:, 1:, None]
    merged = merge(weights)
    patches = merge(tokens[:, 1:] * weights) / merged
    return torch.cat([tokens[:, :1], patches], dim=1), torch.cat([sizes[:, :1], merged[..., 0]], dim=1)
