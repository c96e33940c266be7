"""Mixed images and what they stand for: MixToken's cells, the labels of every token."""

from __future__ import annotations

import pytest
import torch

from cfvit.modeling.losses import distillation_loss, token_label_loss, token_target
from cfvit.modeling.model import TokenOutput
from cfvit.modeling.tokens import cells_in_box, child_positions, rank_cells
from cfvit.training.step import class_target, draw_mixed_cells

CPU = torch.device("cpu")
CLASSES = 5


def test_mixed_cells_are_a_box_that_follows_from_the_seed() -> None:
    shares = []
    for seed in range(300):
        mixed = draw_mixed_cells((4, 6), seed, CPU)
        assert torch.equal(mixed, draw_mixed_cells((4, 6), seed, CPU))
        rows, columns = mixed.reshape(4, 6).any(dim=1), mixed.reshape(4, 6).any(dim=0)
        assert int(mixed.sum()) == int(rows.sum() * columns.sum())  # a filled box
        shares.append(float(mixed.float().mean()))
    assert min(shares) == 0
    assert max(shares) > 0.5  # clipped at the border, as cutmix is
    assert 0.1 < sum(shares) / len(shares) < 0.5


def test_cells_in_a_box() -> None:
    inside = cells_in_box((0, 1, 2, 3), (3, 4)).reshape(3, 4)
    assert inside.tolist() == [[False, True, True, False], [False, True, True, False], [False] * 4]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_target_by_the_share_of_mixed_cells(smoothing: float) -> None:
    targets = torch.tensor([0, 1, 2, 3])
    low, high = smoothing / CLASSES, 1 - smoothing + smoothing / CLASSES
    alone = class_target(targets, None, smoothing, CLASSES)
    assert alone[1].tolist() == pytest.approx([low, high, low, low, low])
    mixed = cells_in_box((0, 0, 1, 1), (2, 2))
    expected = 0.75 * alone + 0.25 * alone.flip(0)
    assert torch.allclose(class_target(targets, mixed, smoothing, CLASSES), expected)


@pytest.mark.parametrize("ratio", [0, 2, 6])
@pytest.mark.parametrize("box", [None, (0, 1, 2, 3), (0, 0, 2, 3)])
def test_each_token_has_the_label_of_the_area_it_covers(ratio: int, box: tuple[int, int, int, int] | None) -> None:
    rows, columns, batch = 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(batch, 4 * rows * columns, CLASSES, generator=generator)
    coarse = torch.rand(batch, rows * columns, CLASSES, generator=generator)
    informative, others = rank_cells(torch.rand(batch, rows * columns, generator=generator), ratio)
    nothing = torch.zeros(batch, CLASSES)
    output = TokenOutput(nothing, nothing, nothing, informative, others)
    mixed = None if box is None else cells_in_box(box, (rows, columns))

    found = token_target(fine, coarse, output, mixed, columns)

    assert found.shape == (batch, 4 * ratio + rows * columns - ratio, CLASSES)
    for b in range(batch):
        expected = []
        for cell in informative[b].tolist():
            shown = batch - 1 - b if mixed is not None and mixed[cell] else b
            row, column = divmod(cell, columns)
            for down in (0, 1):
                for right in (0, 1):
                    expected.append(fine[shown, (2 * row + down) * 2 * columns + 2 * column + right])
        for cell in others[b].tolist():
            shown = batch - 1 - b if mixed is not None and mixed[cell] else b
            expected.append(coarse[shown, cell])
        assert torch.equal(found[b], torch.stack(expected))


def test_token_label_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse, fine = torch.randn(2, 2, CLASSES, generator=generator)
    tokens = torch.randn(2, 7, CLASSES, generator=generator, requires_grad=True)
    cells = torch.arange(4).expand(2, -1)
    output = TokenOutput(coarse, fine, tokens, cells[:, :1], cells[:, 1:])
    target, token_labels = (torch.rand(shape, generator=generator).softmax(-1) for shape in ((2, 5), (2, 7, 5)))

    loss = token_label_loss(output, target, token_labels, 0.5)

    of_class = -(target * fine.log_softmax(-1)).sum(-1).mean()
    of_tokens = -(token_labels * tokens.log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx((of_class + 0.5 * of_tokens + distillation_loss(coarse, fine)).item())
    loss.backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0


def test_children_positions_agree_with_the_labels_grid() -> None:
    """A cell's own label is the mean of its children's where labels are linear in position."""
    rows, columns = 3, 2
    place = torch.stack(torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij"), -1).float()
    children = place.flatten(0, 1)[child_positions(torch.arange(rows * columns)[None], columns)[0]]
    centres = children.unflatten(0, (-1, 4)).mean(dim=1)
    expected = (
        torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).float() * 2 + 0.5
    )
    assert torch.equal(centres, expected.flatten(0, 1))
