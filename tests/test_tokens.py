"""The equations on tensors against loops, and their properties."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfvit.modeling import tokens

few = settings(max_examples=40, deadline=None)
sides = st.integers(1, 6)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@few
@given(rows=sides, columns=sides)
def test_children_of_all_cells_tile_the_fine_grid(rows: int, columns: int) -> None:
    cells = torch.arange(rows * columns)[None]
    children = tokens.child_positions(cells, columns)
    assert sorted(children[0].tolist()) == list(range(4 * rows * columns))


@few
@given(columns=sides, cells=st.lists(st.integers(0, 35), max_size=8))
def test_children_lie_in_their_cell_row_by_row(columns: int, cells: list[int]) -> None:
    children = tokens.child_positions(torch.tensor([cells], dtype=torch.long), columns)
    expected = [
        (2 * (cell // columns) + down) * 2 * columns + 2 * (cell % columns) + right
        for cell in cells
        for down in (0, 1)
        for right in (0, 1)
    ]
    assert children.tolist() == [expected]


@few
@given(rows=sides, columns=sides, patch=st.tuples(st.integers(1, 4), st.integers(1, 4)), data=st.data())
def test_cut_children_equals_slicing(rows: int, columns: int, patch: tuple[int, int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, rows * columns))
    order = st.permutations(range(rows * columns))
    cells = [data.draw(order)[:count] for _ in range(2)]
    height, width = patch
    images = _random(2, 3, rows * 2 * height, columns * 2 * width)

    cut = tokens.cut_children(images, torch.tensor(cells, dtype=torch.long), patch)

    assert cut.shape == (2, 4 * count, 3, height, width)
    for image in range(2):
        for i, cell in enumerate(cells[image]):
            for child in range(4):
                top = (2 * (cell // columns) + child // 2) * height
                left = (2 * (cell % columns) + child % 2) * width
                expected = images[image, :, top : top + height, left : left + width]
                assert torch.equal(cut[image, 4 * i + child], expected)


@few
@given(rows=sides, columns=sides)
def test_pixels_and_positions_of_children_agree(rows: int, columns: int) -> None:
    """With patches of one pixel the image is its own map of fine patch numbers."""
    image = torch.arange(4 * rows * columns).reshape(1, 1, 2 * rows, 2 * columns)
    cells = torch.arange(rows * columns).flip(0)[None]
    cut = tokens.cut_children(image, cells, (1, 1)).flatten()
    assert torch.equal(cut, tokens.child_positions(cells, columns).flatten())


def test_coarse_image_is_bilinear_with_aligned_corners() -> None:
    """Output pixel i of n reads the input of side s at ``i * (s - 1) / (n - 1)``."""
    images = _random(2, 3, 8, 12)
    small = tokens.coarse_image(images)
    assert small.shape == (2, 3, 4, 6)
    for row in range(4):
        for column in range(6):
            y, x = row * 7 / 3, column * 11 / 5
            top, left = min(int(y), 6), min(int(x), 10)
            down, right = y - top, x - left
            upper = (1 - right) * images[..., top, left] + right * images[..., top, left + 1]
            lower = (1 - right) * images[..., top + 1, left] + right * images[..., top + 1, left + 1]
            torch.testing.assert_close(small[..., row, column], (1 - down) * upper + down * lower)


@few
@given(thousandths=st.integers(0, 1000), cells=st.integers(1, 2000))
def test_num_informative_is_the_exact_ceiling(thousandths: int, cells: int) -> None:
    exact = math.ceil(Fraction(thousandths, 1000) * cells)
    assert tokens.num_informative(thousandths / 1000, cells) == exact


@pytest.mark.parametrize("cells", [9, 49, 81, 100, 196])
def test_num_informative_of_common_ratios(cells: int) -> None:
    """Among them 0.55 of 100, which binary rounding would make 56."""
    for percent in range(101):
        assert tokens.num_informative(percent / 100, cells) == -(-percent * cells // 100), percent


@few
@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=20), data=st.data())
def test_rank_cells_puts_the_lower_number_first_among_equals(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    informative, others = tokens.rank_cells(torch.tensor([scores], dtype=torch.float32), k)
    ranked = sorted(range(len(scores)), key=lambda cell: (-scores[cell], cell))
    assert informative.tolist() == [ranked[:k]]
    assert others.tolist() == [ranked[k:]]


def test_rank_cells_ranks_each_image_by_itself() -> None:
    informative, others = tokens.rank_cells(torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.1, 0.2]]), 1)
    assert informative.tolist() == [[1], [0]]
    assert others.tolist() == [[2, 0], [2, 1]]


@few
@given(attention=st.lists(st.integers(0, 3), min_size=1, max_size=20), data=st.data())
def test_negative_selection_takes_the_lowest(attention: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(attention)))
    scores = tokens.score_cells(torch.tensor([attention], dtype=torch.float32), "negative")
    rising = sorted(range(len(attention)), key=lambda cell: (attention[cell], cell))
    assert tokens.rank_cells(scores, k)[0].tolist() == [rising[:k]]


def test_scores_of_the_papers_selection_are_the_attention() -> None:
    attention = _random(2, 9)
    assert torch.equal(tokens.score_cells(attention, "attention"), attention)


def test_random_scores_are_new_in_each_call_and_for_each_image() -> None:
    attention = torch.zeros(500, 9)
    torch.manual_seed(0)
    scores, others = tokens.score_cells(attention, "random"), tokens.score_cells(attention, "random")
    torch.manual_seed(0)
    assert torch.equal(tokens.score_cells(attention, "random"), scores)
    assert not torch.equal(others, scores)
    counts = tokens.rank_cells(scores, 3)[0].flatten().bincount(minlength=9)
    assert ((counts > 110) & (counts < 225)).all(), "each cell in a third of the images, 167, within five deviations"


@pytest.mark.parametrize("batch", [1, 3])
def test_gather_tokens_picks_for_each_image(batch: int) -> None:
    """One row of tokens, such as a position embedding, serves all images."""
    source = _random(batch, 5, 4)
    positions = torch.tensor([[0, 4], [3, 3], [2, 1]])
    gathered = tokens.gather_tokens(source, positions)
    for image in range(3):
        for i in range(2):
            assert torch.equal(gathered[image, i], source[image % batch, positions[image, i]])


def test_repeat_for_children_keeps_children_together() -> None:
    repeated = tokens.repeat_for_children(torch.tensor([[[1.0], [2.0]]]))
    assert repeated.flatten().tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


@few
@given(momentum=st.floats(0, 0.99), steps=st.integers(1, 9))
def test_accumulated_attention_is_the_moving_average_from_zero(momentum: float, steps: int) -> None:
    rows = _random(steps, 2, 5).softmax(dim=-1)
    average = None
    for row in rows:
        average = tokens.accumulate_attention(average, row, momentum)
    weights = [(1 - momentum) * momentum ** (steps - 1 - k) for k in range(steps)]
    expected = sum(weight * row for weight, row in zip(weights, rows, strict=True))
    torch.testing.assert_close(average, expected)


@pytest.mark.parametrize("prefix", [1, 3])
def test_class_attention_row_is_that_of_the_full_map(prefix: int) -> None:
    query, key = _random(2, 3, 8, 5), _random(2, 3, 8, 5, seed=1)
    scale = 5**-0.5
    full = (scale * query @ key.transpose(-2, -1)).softmax(dim=-1)
    row = tokens.class_attention_row(query, key, scale, prefix)
    torch.testing.assert_close(row, full[:, :, 0, prefix:].mean(dim=1))


def test_class_attention_row_is_float32_and_without_gradient() -> None:
    query = _random(1, 2, 6, 4).to(torch.bfloat16).requires_grad_()
    row = tokens.class_attention_row(query, query, 0.5, 1)
    assert row.dtype == torch.float32
    assert not row.requires_grad
