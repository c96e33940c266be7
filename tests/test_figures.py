"""Pictures of the paper's figures: their numbers and names are those that were given, files are whole or not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cfvit.plots.explain import Explanation, draw_explanation, grey_unsplit
from cfvit.plots.figures import (
    AttentionPicture,
    Bar,
    Curve,
    draw_attention,
    draw_counts,
    draw_curves,
    draw_examples,
    draw_highest_lowest,
    draw_table,
)

Fails = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that was written."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def _texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts if text.get_text()]


def _dots(axis: Any) -> list[tuple[float, float]]:
    """Value and row of each dot."""
    return [(float(x), float(y)) for line in axis.lines if line.get_marker() == "o" for x, y in line.get_xydata()]


def _points(axis: Any, label: str) -> list[tuple[float, float]]:
    line = next(line for line in axis.lines if line.get_label() == label)
    return [(float(x), float(y)) for x, y in line.get_xydata()]


# Tables

BARS = [
    Bar("global class attention", 75.5, 61.25, 0.5),
    Bar("random", 75.1, None),
    Bar("négative, β = 0 at $x$ and $y$", None, 59.0),
]


def test_a_table_shows_both_values_of_every_row(drawn: list[Figure], tmp_path: Path) -> None:
    fine = [Bar(bar.name, 80.0 + i, None) for i, bar in enumerate(BARS)]
    draw_table(
        tmp_path / "table.png", "what was run", title="Table 4", columns={"coarse top-1 %": BARS, "fine top-1 %": fine}
    )
    paper, ours, fine_paper, fine_ours = drawn[0].axes
    assert _dots(paper) == [(75.5, 0), (75.1, 1)]
    assert _dots(ours) == [(61.25, 0), (59.0, 2)]
    assert _dots(fine_paper) == [(80, 0), (81, 1), (82, 2)]
    assert _dots(fine_ours) == []
    assert _texts(paper) == ["75.5", "75.1", "not printed"]
    assert _texts(ours) == ["61.25 (0.50)", "not run", "59.00"]
    assert _texts(fine_ours) == ["not run"] * 3
    assert [label.get_text() for label in paper.get_yticklabels()] == [
        "global class attention",
        "random",
        "négative, β = 0 at $x$ and $y$",
    ]
    assert paper.get_title(loc="left") == "coarse top-1 %\nthe paper"
    assert ours.get_title(loc="left") == "ours (max − min)"
    assert fine_ours.get_title(loc="left") == "ours"
    assert not any(text.get_parse_math() for text in paper.get_yticklabels())
    assert ours.get_ylim() == paper.get_ylim() == (2.5, -0.5)


def test_the_bar_behind_a_dot_is_as_long_as_the_spread(drawn: list[Figure], tmp_path: Path) -> None:
    draw_table(tmp_path / "table.png", "", title="Table 4", columns={"top-1 %": BARS})
    line = next(line for line in drawn[0].axes[1].lines if line.get_alpha() is not None)
    assert np.asarray(line.get_xdata()).tolist() == [61.0, 61.5]


def test_columns_without_a_row_leave_it_empty(drawn: list[Figure], tmp_path: Path) -> None:
    columns = {"top-1 %": [Bar("a", 1, 2), Bar("b", 3, 4)], "images/s": [Bar("b", 2601, 130), Bar("c", 3701, 190)]}
    draw_table(tmp_path / "table.png", "", title="Table 2", columns=columns)
    assert [_dots(axis) for axis in drawn[0].axes] == [
        [(1, 0), (3, 1)],
        [(2, 0), (4, 1)],
        [(2601, 1), (3701, 2)],
        [(130, 1), (190, 2)],
    ]


# Curves

OURS = [Curve("CF-ViT over $η$", [0.4, 0.9, 1.2], [60.0, 63.0, 64.0]), Curve("plain", [1.5], [64.5], joined=False)]
PUBLISHED = [Curve("EViT", [3.0], [79.5], joined=False), Curve("DeiT-S", [4.6], [79.8], joined=False, like="plain")]


def test_curves_have_their_points_and_a_name_looks_alike_on_both_sides(drawn: list[Figure], tmp_path: Path) -> None:
    draw_curves(tmp_path / "curves.png", "what was run", title="Figure 5", ours=OURS, published=PUBLISHED)
    ours, published = drawn[0].axes
    assert _points(ours, "CF-ViT over $η$") == [(0.4, 60), (0.9, 63), (1.2, 64)]
    assert _points(published, "EViT") == [(3.0, 79.5)]
    assert [line.get_linestyle() for line in ours.lines] == ["-", "None"]
    looks = [(line.get_color(), line.get_marker()) for line in (*ours.lines, *published.lines)]
    assert looks[1] == looks[3]
    assert len(set(looks)) == 3
    legend: Any = ours.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["CF-ViT over $η$", "plain"]
    assert not any(text.get_parse_math() for text in legend.get_texts())


@pytest.mark.parametrize(
    ("ours", "published", "title"), [(OURS, [], "ours"), ([], PUBLISHED, "published"), ([], [], "ours")]
)
def test_one_side_alone_is_one_panel(
    ours: list[Curve], published: list[Curve], title: str, drawn: list[Figure], tmp_path: Path
) -> None:
    draw_curves(tmp_path / "curves.png", "", title="Figure 7", ours=ours, published=published)
    (axis,) = drawn[0].axes
    assert axis.get_title(loc="left") == title
    assert len(axis.lines) == len(ours or published)


def test_curves_by_measured_time_have_panels_of_their_own(drawn: list[Figure], tmp_path: Path) -> None:
    timed = {"ms, batches of 1": [Curve("plain", [9.0], [64.5], joined=False)], "ms, batches of 32": OURS[:1]}
    draw_curves(tmp_path / "curves.png", "", title="Figure 5", ours=OURS, timed=timed)
    by_macs, single, batched = drawn[0].axes
    assert [axis.get_xlabel() for axis in (single, batched)] == list(timed)
    assert _points(single, "plain") == [(9, 64.5)]
    assert single.lines[0].get_color() == by_macs.lines[1].get_color(), "a method looks alike in all panels"


def test_twelve_curves_look_different(drawn: list[Figure], tmp_path: Path) -> None:
    curves = [Curve(f"curve {i}", [i, i + 1.0], [i, 2.0 * i]) for i in range(12)]
    draw_curves(tmp_path / "curves.png", "", title="Figure 6", ours=curves, published=curves)
    assert len({(line.get_color(), line.get_marker()) for line in drawn[0].axes[0].lines}) == 12


def test_counts_stand_one_upon_the_other(drawn: list[Figure], tmp_path: Path) -> None:
    draw_counts(
        tmp_path / "counts.png", "what was run", thresholds=[0.0, 0.5, 1.0], coarse=[90, 60, 0], fine=[0, 35, 97]
    )
    (axis,) = drawn[0].axes
    assert _points(axis, "at the coarse stage") == [(0, 90), (0.5, 60), (1, 0)]
    assert _points(axis, "at the fine stage, on top") == [(0, 90), (0.5, 95), (1, 97)]
    assert axis.get_ylim()[0] == 0


def test_highest_and_lowest_stand_over_the_blocks_from_the_first(drawn: list[Figure], tmp_path: Path) -> None:
    draw_highest_lowest(
        tmp_path / "blocks.png",
        "what was run",
        title="A plain ViT",
        highest=[40.0, 70.5, 71],
        lowest=[50, 30.25, 20],
        whole=79.8,
        kept=100,
        patches=196,
    )
    assert drawn[0].get_suptitle() == "A plain ViT"
    (axis,) = drawn[0].axes
    assert _points(axis, "the 100 highest") == [(1, 40), (2, 70.5), (3, 71)]
    assert _points(axis, "the 100 lowest") == [(1, 50), (2, 30.25), (3, 20)]
    assert {y for _, y in _points(axis, "all 196 patches: 79.8%")} == {79.8}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "3"]
    assert _texts(axis) == ["40.0", "70.5", "71.0", "50.0", "30.2", "20.0"]
    below = [text.get_verticalalignment() == "top" for text in axis.texts]
    assert below == [True, False, False, False, True, True], "values stand away from the other line"


# Images


def _picture(seed: int, side: int = 2) -> AttentionPicture:
    generator = np.random.default_rng(seed)
    return AttentionPicture(
        generator.random((16, 16, 3)), generator.random((side, side)), generator.random((2 * side, 2 * side))
    )


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_picture_has_its_image_and_both_maps(count: int, drawn: list[Figure], tmp_path: Path) -> None:
    pictures = [_picture(seed) for seed in range(count)]
    draw_attention(tmp_path / "attention.png", "what was run", pictures=pictures)
    *panels, bar = drawn[0].axes
    assert len(panels) == 3 * count
    for picture, (image, coarse, fine) in zip(pictures, zip(*[iter(panels)] * 3, strict=True), strict=True):
        assert all((axis.images[0].get_array() == picture.image).all() for axis in (image, coarse, fine))
        for axis, attention in ((coarse, picture.coarse), (fine, picture.fine)):
            shown: Any = axis.images[1].get_array()
            span = attention.max() - attention.min()
            np.testing.assert_allclose(shown, (attention - attention.min()) / span)
            assert axis.images[1].get_cmap().name == "inferno"
    assert [axis.get_title() for axis in panels[:3]] == ["image", "coarse patches, 2 × 2", "fine patches, 4 × 4"]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["low", "high"]


def test_flat_attention_can_be_drawn(drawn: list[Figure], tmp_path: Path) -> None:
    flat = AttentionPicture(np.zeros((8, 8, 3)), np.full((2, 2), 0.25), np.full((4, 4), 0.0625))
    draw_attention(tmp_path / "attention.png", "", pictures=[flat])
    shown: Any = drawn[0].axes[1].images[1].get_array()
    assert (shown == 0).all()


def _example(seed: int, stage: int) -> Explanation:
    generator = np.random.default_rng(seed)
    split = np.array([[True, False], [False, True]])
    answers = ((f"coarse $label$ {seed}", 0.71), (f"fine $label$ {seed}", 0.42))
    return Explanation(generator.random((8, 8, 3)), generator.random((2, 2)), split, answers, stage)


def test_examples_have_their_stages_label_and_fine_ones_are_veiled(drawn: list[Figure], tmp_path: Path) -> None:
    coarse = [_example(seed, 0) for seed in range(7)]
    fine = [replace(_example(seed, 1), measure="energy") for seed in range(7, 9)]  # whose confidence is no percentage
    draw_examples(tmp_path / "examples.png", "what was run", coarse=coarse, fine=fine)
    upper, lower = (list(part.axes) for part in drawn[0].subfigs)
    assert [axis.get_xlabel() for axis in upper] == [f"coarse $label$ {seed}\n71.0%" for seed in range(7)]
    assert [axis.get_xlabel() for axis in lower] == [f"fine $label$ {seed}\n0.4200" for seed in (7, 8)]
    assert all((axis.images[0].get_array() == each.image).all() for axis, each in zip(upper, coarse, strict=True))
    for axis, each in zip(lower, fine, strict=True):
        assert (axis.images[0].get_array() == grey_unsplit(each.image, each.split)).all()


@pytest.mark.parametrize(("coarse", "fine"), [(0, 0), (0, 1), (7, 12)])
def test_a_stage_without_examples_says_so(coarse: int, fine: int, drawn: list[Figure], tmp_path: Path) -> None:
    draw_examples(tmp_path / "examples.png", "", coarse=[_example(0, 0)] * coarse, fine=[_example(1, 1)] * fine)
    parts: Any = drawn[0].subfigs
    headings = [part._suptitle.get_text() for part in parts]
    assert [heading.endswith(": none") for heading in headings] == [coarse == 0, fine == 0]
    assert [len(part.axes) for part in parts] == [coarse, fine]


# Files

DRAWINGS: dict[str, Callable[[Path, str], None]] = {
    "table": partial(draw_table, title="Table 4", columns={"top-1 %": BARS}),
    "curves": partial(draw_curves, title="Figure 5", ours=OURS, published=PUBLISHED),
    "counts": partial(draw_counts, thresholds=[0.0, 1.0], coarse=[9, 0], fine=[0, 10]),
    "highest and lowest": partial(
        draw_highest_lowest, title="A ViT", highest=[70.0], lowest=[20.0], whole=80.0, kept=25, patches=49
    ),
    "attention": partial(draw_attention, pictures=[_picture(0)]),
    "examples": partial(draw_examples, coarse=[_example(0, 0)], fine=[_example(1, 1)]),
}
each_drawing = pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())
FILES = {**DRAWINGS, "explanation": lambda path, caption: draw_explanation(_example(0, 0), path)}
each_file = pytest.mark.parametrize("draw", FILES.values(), ids=FILES.keys())


@each_drawing
def test_a_drawing_is_a_whole_png_with_its_caption_and_nothing_else_is_left(
    draw: Callable[[Path, str], None], drawn: list[Figure], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "drawing.png"
    said = "cfvit reproduce table4 --data $DATA, 3 seeds, float32, 2 threads, commit 0123abc"
    draw(path, said)
    assert [p.name for p in path.parent.iterdir()] == ["drawing.png"]
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((130, 130), abs=0.1)
        assert 0.3 < image.width / image.height < 5
    caption: Any = drawn[0]._supxlabel  # pyright: ignore[reportAttributeAccessIssue]
    assert caption.get_text().replace("\n", " ") == said
    assert not caption.get_parse_math()


@each_drawing
def test_a_long_caption_is_cut_after_four_lines(
    draw: Callable[[Path, str], None], drawn: list[Figure], tmp_path: Path
) -> None:
    draw(tmp_path / "drawing.png", "as many words as never fit " * 100)
    caption: Any = drawn[0]._supxlabel  # pyright: ignore[reportAttributeAccessIssue]
    assert caption.get_text().count("\n") == 3
    assert caption.get_text().endswith("…")


@each_file
def test_the_users_own_style_changes_nothing(draw: Callable[[Path, str], None], tmp_path: Path) -> None:
    draw(tmp_path / "plain.png", "caption")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 50, "savefig.transparent": True}):
        draw(tmp_path / "styled.png", "caption")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


@each_file
def test_a_drawing_that_cannot_be_written_leaves_the_old_one(
    draw: Callable[[Path, str], None], tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "drawing.png"
    path.write_text("old")

    def fill_the_disk(figure: Figure, file: Path, **options: Any) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with fails("No space left on device"):
        draw(path, "caption")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@each_file
def test_without_matplotlib_the_message_says_what_to_install(
    draw: Callable[[Path, str], None], tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with fails(r"install cfvit\[plots\]"):
        draw(tmp_path / "drawing.png", "caption")
    assert list(tmp_path.iterdir()) == []
