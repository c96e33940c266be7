"""Figures of images: a plain ViT on a part of its patches, class attention, counts and examples (Fig. 1, 8 and 9)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cfvit.modeling import timm_vit
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.timm_vit import Backbone
from cfvit.modeling.tokens import gather_tokens, rank_cells
from cfvit.paper.rows import COUNT_ETAS, Row, Sources, StudyResult, mean_row, seed_of_picture
from cfvit.paper.runs import Result, read_images, score
from cfvit.paper.studies import DEFAULT, PLAIN, Study
from cfvit.plots import figures as pictures
from cfvit.plots.explain import explain

EXAMPLES = 6
ATTENTION_PICTURES = 4
FALLBACK_ETA = 0.5

# Figure 1: a plain ViT on a part of its patches, and its class attention at both patch sizes


@torch.inference_mode()
def class_attention_of_blocks(backbone: Backbone, images: Tensor) -> Tensor:
    """The class token's attention row in every block of a plain ViT, averaged over heads (Eq. 2).

    From normalised images ``[B, 3, H, W]`` to ``[depth, B, N]`` in float32, over patches numbered row by row.
    """
    count = cast(Any, backbone.patch_embed).num_patches
    tokens = _tokens_of(backbone, images, torch.arange(count, device=images.device).expand(len(images), -1))
    rotation = timm_vit.fine_rotation(backbone)
    rows = []
    for index in range(len(backbone.blocks)):
        tokens, row = timm_vit.block_with_class_attention(backbone, index, tokens, rotation)
        rows.append(row)
    return torch.stack(rows)


@torch.inference_mode()
def answer_from_patches(backbone: Backbone, images: Tensor, kept: Tensor) -> Tensor:
    """A plain ViT's logits ``[B, classes]`` of ``[B, 3, H, W]`` if it sees only some patches, each at its own position.

    ``kept`` has their numbers ``[B, k]``, row by row; their order does not matter.
    """
    rotation = timm_vit.gather_rotation(timm_vit.fine_rotation(backbone), kept)
    tokens = timm_vit.run_blocks(backbone, _tokens_of(backbone, images, kept), rotation)
    return backbone.forward_head(backbone.norm(tokens))


def _tokens_of(backbone: Backbone, images: Tensor, kept: Tensor) -> Tensor:
    """What enters the first block: the prefix and the kept patches, ``[B, p + k, D]``."""
    embed: Any = backbone.patch_embed
    patches, positions = embed(images).flatten(1, -2), backbone.pos_embed  # some of timm's stems keep rows and columns
    if positions is not None:
        patches = patches + timm_vit.patch_positions(backbone, positions)
    prefix = timm_vit.prefix_tokens(backbone, positions).expand(len(images), -1, -1)
    return timm_vit.enter(backbone, torch.cat([prefix, gather_tokens(patches, kept)], dim=1))


@torch.inference_mode()
def answers_by_attention(backbone: Backbone, images: Tensor, kept: int) -> Tensor:
    """A plain ViT's answers to ``[B, 3, H, W]``, as class indices ``[B, 1 + 2 * depth]`` (Fig. 1a).

    On all patches, then for each block on the ``kept`` ones of its highest, and of its lowest class attention.
    """
    logits = [backbone(images)]
    for row in class_attention_of_blocks(backbone, images):
        for scores in (row, -row):
            logits.append(answer_from_patches(backbone, images, rank_cells(scores, kept)[0]))
    return torch.stack(logits, dim=1).argmax(dim=-1)


@torch.inference_mode()
def attention_pictures(coarse: CoarseToFineViT, fine: Backbone, images: Tensor) -> list[pictures.AttentionPicture]:
    """The last block's class attention on coarse patches and a plain ViT's on fine ones, of ``[B, 3, H, W]`` (Fig. 1b).

    The coarse stage is looked at without Eq. 9's average over blocks.
    """
    coarse, fine = coarse.eval(), fine.eval()
    last = copy.copy(coarse)  # shares the weights
    last.config = replace(coarse.config, attention_momentum=0.0, selection="attention")
    parameter = next(fine.parameters())
    rows = class_attention_of_blocks(fine, images.to(parameter.device, parameter.dtype))[-1].cpu()
    grid = cast(Any, fine.patch_embed).grid_size
    return [
        pictures.AttentionPicture(explanation.image, explanation.attention, row.reshape(grid).numpy())
        for explanation, row in zip(explain(last, images, 1.0), rows, strict=True)
    ]


def patches(study: Study, sources: Sources) -> StudyResult:
    """Figure 1(a)."""
    scores, count, kept = [], 0, 0
    for result in sources.of(PLAIN):
        network, images = result.open()
        count = network.patch_embed.num_patches
        kept = max(1, round(100 / 196 * count))
        forward = partial(answers_by_attention, network, kept=kept)
        scored = score(lambda batch, forward=forward: {"answers": forward(batch)}, sources.recipe, images)
        right = (scored.logits["answers"] == scored.labels[:, None]).sum(dim=0)
        scores.append((100 * right.double() / len(scored.labels)).tolist())
    rows = []
    for block, at in enumerate(range(1, len(scores[0]), 2), start=1):
        values = {"highest": [each[at] for each in scores], "lowest": [each[at + 1] for each in scores]}
        rows.append(mean_row(f"block {block}", values, missing=sources.missing.get(PLAIN)))
    whole = [each[0] for each in scores]
    rows.append(mean_row("all patches", {"highest": whole, "lowest": whole}))
    highest, lowest = ([row.cells[name].ours or 0.0 for row in rows] for name in ("highest", "lowest"))
    draw = partial(
        pictures.draw_highest_lowest,
        title=f"{sources.plain} on {kept} of its {count} patches, by class attention",
        highest=highest[:-1],
        lowest=lowest[:-1],
        whole=highest[-1],
        kept=kept,
        patches=count,
    )
    return StudyResult(rows, draw, (f"{kept} of {count} patches are kept, as 100 of 196 in the paper.",))


def attention(study: Study, sources: Sources) -> StudyResult:
    """Figure 1(b), of some images from all over the validation data."""
    coarse, fine = (sources.of(variant.run)[0] for variant in study.variants)
    (reader, images), (plain, _) = coarse.open(), fine.open()
    readable = fine.validation.indices
    places = np.linspace(0, len(readable) - 1, min(ATTENTION_PICTURES, len(readable))).round().astype(int)
    chosen = readable[np.unique(places)].tolist()
    drawn = attention_pictures(reader, plain, read_images(images, chosen))
    rows = [Row(images.source.name(index), {}, 1) for index in chosen]
    notes = seed_of_picture(*(sources.of(run) for run in study.runs))
    return StudyResult(rows, partial(pictures.draw_attention, pictures=drawn), tuple(notes))


# Figures 8 and 9


def count_right(result: Result, eta: float) -> tuple[int, int]:
    """How many validation images are answered right at the coarse and at the fine stage at an eta (Fig. 8)."""
    logits, labels, hard = result.validation.logits, result.validation.labels, result.goes_on(eta)
    coarse, fine = (logits[stage].argmax(-1) == labels for stage in ("coarse", "fine"))
    return int((coarse & ~hard).sum()), int((fine & hard).sum())


def counts(study: Study, sources: Sources) -> StudyResult:
    """Figure 8."""
    results, missing = sources.of(DEFAULT), sources.missing.get(DEFAULT)
    right = np.array([[count_right(result, eta) for eta in COUNT_ETAS] for result in results])  # [seeds, etas, 2]
    rows = []
    for eta, (coarse, fine) in zip(COUNT_ETAS, right.transpose(1, 2, 0).tolist(), strict=True):
        row = mean_row(f"eta {eta:g}", {"right_coarse": coarse, "right_fine": fine}, missing=missing)
        rows.append(replace(row, shown=eta == round(eta, 1)))
    coarse, fine = right[0].T.tolist()
    draw = partial(pictures.draw_counts, thresholds=COUNT_ETAS, coarse=coarse, fine=fine)
    return StudyResult(rows, draw, tuple(seed_of_picture(results)))


def examples(study: Study, sources: Sources) -> StudyResult:
    """Figure 9."""
    result = sources.of(DEFAULT)[0]
    model, images = result.open()
    scored, eta = result.validation, FALLBACK_ETA if model.threshold is None else model.threshold
    hard = result.goes_on(eta)
    rows, sheets = [], {}
    for stage, answered in (("coarse", ~hard), ("fine", hard)):
        right = (scored.logits[stage].argmax(-1) == scored.labels) & answered
        labels, indices = scored.labels[right].tolist(), scored.indices[right].tolist()
        first = set(dict(zip(labels[::-1], indices[::-1], strict=True)).values())  # of each class: before others
        chosen = sorted(indices, key=lambda index: index not in first)[:EXAMPLES]
        sheets[stage] = explain(model, read_images(images, chosen), eta) if chosen else []
        rows += [Row(f"right at the {stage} stage: {images.source.name(index)}", {}, 1) for index in chosen]
    note = f"eta is {eta:g}; shown are the first images of each class that were answered right."
    draw = partial(pictures.draw_examples, **sheets) if rows else None
    return StudyResult(rows, draw, (note, *seed_of_picture(sources.of(DEFAULT))))
