"""Costs against the paper's figures, torch's counter on real tensors, and arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cfvit import CfvitError, CoarseToFineViT, StageMacs, count_macs, create_model
from cfvit.modeling.config import Reuse

PAPER = {0.4: 3.7, 0.5: 4.0, 0.6: 4.4, 0.7: 4.7, 0.8: 5.1, 0.9: 5.5}
"""alpha to GMACs of both stages (Tab. 6)."""

WIDTH, REUSE = 48, 2 * 48 * 192
"""Channels of the tiny model's tokens, and MACs of one token's feature reuse; its patches have 4 pixels a side."""


def _deit_small(ratio: float = 0.5) -> StageMacs:
    with torch.device("meta"):
        model = create_model("deit_small_patch16_224", informative_ratio=ratio)
    return count_macs(model)


def _counted(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def test_deit_small_costs_what_the_paper_says() -> None:
    macs = _deit_small()
    assert f"{macs.backbone / 1e9:.2f}" == "4.60"
    assert f"{macs.coarse / 1e9:.2f}" == "1.10"
    assert f"{macs.both / 1e9:.2f}" == "3.96"
    assert f"{macs.both_in_paper / 1e9:.2f}" == "4.01"


@pytest.mark.parametrize("ratio", PAPER)
def test_both_stages_at_other_ratios(ratio: float) -> None:
    assert round(_deit_small(ratio).both_in_paper / 1e9, 1) == PAPER[ratio]


@pytest.mark.parametrize(
    ("ratio", "reuse"),
    [*((0.5, reuse) for reuse in get_args(Reuse)), (0.0, "mlp"), (0.0, "uninformative"), (1.0, "mlp")],
)
def test_equals_the_count_on_real_tensors(
    ratio: float, reuse: str, make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model(informative_ratio=ratio, feature_reuse=reuse)
    image = make_images(model, 1)
    with torch.no_grad():
        state = model.coarse(image)
    macs = count_macs(model)
    assert macs.coarse == _counted(lambda: model.coarse(image))
    assert macs.fine == _counted(lambda: model.fine(image, state))
    assert macs.backbone == _counted(lambda: model.backbone(image))
    assert macs.both == _counted(lambda: model(image))


@pytest.mark.parametrize(
    ("reuse", "extra"),
    [
        ("linear", 4 * (WIDTH**2 - REUSE)),
        ("none", -4 * REUSE),
        ("class_token", REUSE),
        ("uninformative", 12 * REUSE),
    ],
)
def test_variants_cost_more_or_less_reuse(reuse: str, extra: int, make_model: Callable[..., CoarseToFineViT]) -> None:
    """Of 16 cells 4 are split: a linear layer for each of them, nothing, one more token, or 12 more."""
    paper, variant = (count_macs(make_model(informative_ratio=0.25, feature_reuse=name)) for name in ("mlp", reuse))
    assert variant.fine - paper.fine == extra
    assert (variant.coarse, variant.backbone) == (paper.coarse, paper.backbone)


@pytest.mark.parametrize("selection", ["negative", "random"])
def test_which_cells_are_split_costs_nothing(selection: str, make_model: Callable[..., CoarseToFineViT]) -> None:
    assert count_macs(make_model(selection=selection)) == count_macs(make_model())


@pytest.mark.parametrize(("reuse", "of_a_cell"), [("linear", WIDTH**2), ("none", 0), ("uninformative", 0)])
def test_spared_of_variants(reuse: str, of_a_cell: int, make_model: Callable[..., CoarseToFineViT]) -> None:
    """Where uninformative cells are served too, none of the reuse is dropped."""
    macs = count_macs(make_model(feature_reuse=reuse))
    assert macs.spared == 8 * (4 * 3 * 4**2 * WIDTH + of_a_cell)


@pytest.mark.parametrize(("ratio", "others"), [(0.0, 16), (0.5, 8), (1.0, 0)])
def test_spared_is_embedding_and_reuse_of_the_unsplit_cells(
    ratio: float, others: int, make_model: Callable[..., CoarseToFineViT]
) -> None:
    macs = count_macs(make_model(informative_ratio=ratio))
    assert macs.spared == others * (4 * 3 * 4**2 * WIDTH + REUSE)
    assert macs.both_in_paper == macs.coarse + macs.fine + macs.spared


def test_counting_leaves_the_model_as_it_was(make_model: Callable[..., CoarseToFineViT]) -> None:
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_expected_cost_charges_both_stages_to_images_that_go_on() -> None:
    macs = StageMacs(coarse=10, fine=30, backbone=50)
    assert macs.expected(0) == 10
    assert macs.expected(0.25) == 0.75 * 10 + 0.25 * 40
    assert macs.expected(1) == macs.both == 40


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan"), torch.tensor(0.25)])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(CfvitError, match=rf"^fine_share is {re.escape(repr(share))}: give a number .*float\("):
        StageMacs(coarse=10, fine=30, backbone=50).expected(share)
