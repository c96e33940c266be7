"""What `cfvit reproduce` knows of the paper, of its studies and of the runs behind them, and how rows are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from cfvit.errors import UsageError
from cfvit.evaluation.metrics import Collected
from cfvit.methods.base import create_method
from cfvit.modeling.config import Objective
from cfvit.paper.compare import OperatingPoint
from cfvit.paper.figures import count_right
from cfvit.paper.rows import Cell, Row, Sources, mean_row, published_curves, seed_of_picture, uncertainty
from cfvit.paper.runs import Record, Result, duration, parse_budget, time_left
from cfvit.paper.studies import DEFAULT, FAMILIES, PLAIN, RUNS, STUDIES, Published, find_studies, runs_needed
from cfvit.paper.write import KINDS, make, table_of, write_csv
from cfvit.training.recipe import RECIPES, Recipe

Fails = Callable[..., AbstractContextManager[None]]


def _published(table: str) -> dict[str, Published]:
    """What the paper prints in a table, by row."""
    study = STUDIES[table]
    of_variants = {variant.label: variant.published for variant in study.variants if variant.published is not None}
    return of_variants | {f"{row.family} {row.name}": row for row in study.published}


@pytest.mark.parametrize(
    ("table", "row", "values"),
    [
        ("table1", "plain ViT, coarse grid", {"accuracy": 73.2, "gmacs": 1.1}),
        ("table2", "DeiT-S 0.75", {"eta": 0.75, "accuracy": 80.7, "gmacs": 2.6, "images_per_second": 3701}),
        ("table2", "LV-ViT-S parity", {"eta": 0.63, "accuracy": 83.3, "gmacs": 3.1, "images_per_second": 3393}),
        ("table3", "DeiT-S PS-ViT", {"accuracy": 79.4, "gmacs": 2.6}),
        ("table3", "LV-ViT-S SiT", {"accuracy": 83.2, "gmacs": 4.0}),
        ("table4", "random", {"coarse": 75.3, "fine": 79.6}),
        ("table5", "linear instead of MLP", {"coarse": 75.3, "fine": 80.6}),
        ("table6", "alpha 0.4", {"fine": 80.4, "gmacs": 3.7}),
        ("table7", "beta 0.9", {"fine": 80.7}),
        ("table8", "CE + CE", {"coarse": 75.7, "fine": 80.3}),
    ],
)
def test_the_papers_figures(table: str, row: str, values: dict[str, float]) -> None:
    published = _published(table)[row]
    assert {name: published.values[name] for name in values} == values
    assert published.place.startswith(f"Table {table.removeprefix('table')},")


def test_contradictions_of_the_paper_are_noted_where_they_are() -> None:
    values = {name: row.values for name, row in _published("table2").items()}
    for family, eta, printed, really in (("DeiT-S", "0.75", 1.32, 1.42), ("LV-ViT-S", "1", 1.31, 1.20)):
        speeds = [values[f"{family} {kind}"]["images_per_second"] for kind in (eta, "plain")]
        assert round(speeds[0] / speeds[1], 2) == really
        assert values[f"{family} {eta}"]["speedup"] == printed
        assert any(str(printed) in note and f"{really:.2f}" in note for note in STUDIES["table2"].notes)
    others = {name: row for name, row in values.items() if row.get("speedup", 1.32) not in (1.32, 1.31)}
    assert len(others) == 4
    for name, row in others.items():
        ratio = row["images_per_second"] / values[f"{name.split()[0]} plain"]["images_per_second"]
        assert ratio == pytest.approx(row["speedup"], abs=0.015)


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_studies_are_of_runs_and_rows_that_there_are(study: Any) -> None:
    assert set(study.runs) <= set(RUNS)
    assert study.kind in KINDS
    for variant in study.variants:
        if study.kind == "ablation":
            assert set(variant.published.values) == set(study.measures) - {"gmacs_as_paper"}
    for eta in study.etas:
        assert {row.family for row in study.published if row.name == f"{eta}".removesuffix(".0")} == {
            "DeiT-S",
            "LV-ViT-S",
        }


def test_each_table_and_figure_of_experiments_is_there() -> None:
    figures = ["fig1a", "fig1b", "fig5", "fig6", "fig7", "fig8", "fig9"]
    assert list(STUDIES) == [*(f"table{i}" for i in range(1, 9)), *figures]
    assert find_studies("all") == list(STUDIES.values())
    assert [study.name for study in find_studies("table4")] == ["table4"]


def test_a_mistyped_name_gets_the_nearest(fails: Fails) -> None:
    with fails("no 'tabel4' to reproduce: did you mean 'table4'", UsageError):
        find_studies("tabel4")
    with fails("choose among table1, .*all", UsageError):
        find_studies("?")


def test_runs_differ_from_the_default_in_what_they_are_named_after_alone() -> None:
    base = Recipe(data=("here",), coarse_grid=7)
    default = RUNS[DEFAULT].recipe(base, seed=3)
    assert (default.seed, default.coarse_grid, default.data) == (3, 7, ("here",))
    for name, spec in RUNS.items():
        recipe = spec.recipe(base, seed=3)
        changed = {k for k in Recipe().to_dict() if getattr(recipe, k) != getattr(default, k)}
        assert changed == ({"coarse_grid"} if name == "larger-grid" else set(spec.changes)), name


@pytest.mark.parametrize(("grid", "larger"), [(7, 9), (3, 4), ((5, 8), (6, 10)), (1, 1)])
def test_the_larger_grid_is_as_9_to_7(grid: Any, larger: Any) -> None:
    assert RUNS["larger-grid"].recipe(Recipe(coarse_grid=grid), seed=0).coarse_grid == larger


def test_a_recipe_without_labels_keeps_its_loss_and_has_no_study_of_labels(fails: Fails) -> None:
    adapt = RECIPES["adapt"]
    run = RUNS["alpha-0.7"].recipe(adapt.replace({"informative_ratio": 0.9}), seed=3)
    assert (run.informative_ratio, run.seed) == (0.7, 3)
    assert all(getattr(run, f.name) == getattr(adapt, f.name) for f in dataclasses.fields(Objective))
    with fails("loss-ce learns from labels", UsageError):
        RUNS["loss-ce"].recipe(adapt, seed=0)


def test_shared_runs_come_first_and_once() -> None:
    names = [spec.name for spec in runs_needed(find_studies("all"))]
    assert names == list(RUNS)
    assert names[:2] == [DEFAULT, PLAIN]
    assert [spec.name for spec in runs_needed([STUDIES["table8"], STUDIES["fig8"]])] == [DEFAULT, "loss-ce"]


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("90m", 5400), ("300s", 300), ("1.5H", 5400)])
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["2", "h", "-2h", "2d", "0s", ""])
def test_what_is_no_budget(text: str, fails: Fails) -> None:
    with fails("give a time such as 2h, 90m or 300s", UsageError):
        parse_budget(text)


def test_durations() -> None:
    assert [duration(s) for s in (3.4, 89, 90, 3000, 9000)] == ["3 s", "89 s", "2 min", "50 min", "2.5 h"]


def _record(**changes: Any) -> Record:
    return dataclasses.replace(Record("run", "cf_vit", "2", 0, 10, {}), **changes)


def test_what_is_left_of_a_run_is_known_by_its_own_pace_or_by_others() -> None:
    alike, dearer = _record(epoch_seconds=10.0), _record(epoch_seconds=100.0, grid="3")
    assert time_left(_record(), [_record()]) is None
    assert time_left(_record(), [alike, dearer]) == 100
    assert time_left(_record(grid="4"), [alike, dearer]) == 1000
    assert time_left(_record(method="plain"), [alike, dearer]) == 1000
    assert time_left(_record(done=4.0, epoch_seconds=7.0), [alike]) == 42
    assert time_left(_record(done=9.0), [alike]) == 10


def test_it_is_told_how_sure_an_accuracy_is(runs: tuple[Result, Result]) -> None:
    scored = runs[0].validation
    right = round(float((scored.logits["fine"].argmax(-1) == scored.labels).double().sum()))
    low, high = (stats.beta.ppf(p, *ab) for p, ab in ((0.025, (right, 201 - right)), (0.975, (right + 1, 200 - right))))
    said = f"An accuracy of {right / 2:.1f}% on 200 images is sure to {50 * (high - low):.2g} points either way"
    assert uncertainty(scored).startswith(said)


def _sources(results: dict[str, list[Result]], classes: str, backbone: str = "test_vit") -> Sources:
    return Sources(results, {}, Recipe(backbone=backbone), classes)


def test_classes_without_images_are_named(runs: tuple[Result, Result]) -> None:
    note = "Of the validation data, class 'e' has none of the 200 images: nothing is known of them."
    assert note not in make(STUDIES["table8"], _sources({DEFAULT: [runs[0]]}, "abcd")).notes
    assert note in make(STUDIES["table8"], _sources({DEFAULT: [runs[0]]}, "abcde")).notes


def test_the_seed_of_a_picture_is_told_where_there_are_several(runs: tuple[Result, Result]) -> None:
    ours, plain = runs
    second = dataclasses.replace(ours, seed=1)
    assert list(seed_of_picture([ours], [plain])) == []
    assert list(seed_of_picture([second, ours])) == ["The picture is of seed 1."]
    assert list(seed_of_picture([second], [plain])) == ["The picture is of seed 1 and 0."]


@pytest.mark.parametrize(("backbone", "left_out"), [("lvvit_small_patch16_224", "DeiT-S"), ("test_vit", "LV-ViT-S")])
def test_notes_and_rows_are_of_the_family_beside_ours(backbone: str, left_out: str) -> None:
    made = make(STUDIES["table3"], _sources({}, "abcd", backbone))
    assert {row.place.split(",")[1].strip() for row in made.rows} == {"DeiT-S", "LV-ViT-S"} - {left_out}
    notes = STUDIES["table2"].notes
    kept = [note for note in notes if left_out not in note]
    assert list(make(STUDIES["table2"], _sources({}, "abcd", backbone)).notes)[:-1] == kept
    assert len(kept) == len(notes) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_published_curves_look_like_ours_of_the_same_method(family: str) -> None:
    alike = [curve.like for curve in published_curves(STUDIES["table2"], family)]
    assert sorted(alike) == sorted(
        variant.label for variant in STUDIES["fig5"].variants + STUDIES["table2"].variants[:1]
    )


def _scored(*logits: Tensor, labels: Tensor) -> Collected:
    names = ("coarse", "fine") if len(logits) == 2 else ("plain",)
    return Collected(dict(zip(names, logits, strict=True)), labels, torch.arange(len(labels)), [])


def _result(holdout: Collected, validation: Collected) -> Result:
    macs = {"coarse": 10**9, "fine": 4 * 10**9} if "fine" in validation.logits else {"plain": 5 * 10**9}
    method = create_method("cf_vit" if "fine" in macs else "plain")
    return Result(method, macs, validation, holdout, lambda: pytest.fail("opened"), seed=0)


@pytest.fixture
def runs() -> tuple[Result, Result]:
    """CF-ViT, better at the fine stage, and a plain ViT in between, on 200 images of 4 classes."""
    generator = torch.Generator().manual_seed(0)

    def answers(labels: Tensor, strength: float) -> Tensor:
        return torch.randn(len(labels), 4, generator=generator) + strength * torch.eye(4)[labels]

    parts = []
    for _ in range(2):
        labels = torch.randint(4, (200,), generator=generator)
        parts.append((_scored(answers(labels, 1), answers(labels, 3), labels=labels), answers(labels, 2), labels))
    ours = _result(parts[0][0], parts[1][0])
    plain = _result(*(_scored(logits, labels=labels) for _, logits, labels in parts))
    return ours, plain


def _accuracy(scored: Collected, eta: float) -> tuple[float, float]:
    """Top-1 in percent and the share that goes on, image by image."""
    right = hard = 0
    for coarse, fine, label in zip(*scored.logits.values(), scored.labels.tolist(), strict=True):
        goes_on = eta >= 1 or float(coarse.softmax(0).max()) < eta
        hard += goes_on
        right += int((fine if goes_on else coarse).argmax()) == label
    return 100 * right / len(scored.labels), hard / len(scored.labels)


def test_parity_is_the_cheapest_eta_as_good_as_the_plain_vit_on_the_holdout(runs: tuple[Result, Result]) -> None:
    ours, plain = runs
    eta = ours.parity(plain)
    assert eta is not None and ours.holdout is not None and plain.holdout is not None
    goal = 100 * float((plain.holdout.logits["plain"].argmax(-1) == plain.holdout.labels).double().mean())
    accuracy, share = _accuracy(ours.holdout, eta)
    assert accuracy >= goal
    cheaper = [_accuracy(ours.holdout, i / 1000) for i in range(1001)]
    assert all(a < goal for a, s in cheaper if s < share)
    (point,) = ours.at([eta])
    assert (point.accuracy, 1 - point.exit_share) == pytest.approx(_accuracy(ours.validation, eta))
    assert point.gmacs == pytest.approx(1 + 3 * (1 - point.exit_share))


def test_parity_out_of_reach_is_told(runs: tuple[Result, Result]) -> None:
    ours, plain = runs
    assert plain.holdout is not None
    perfect = _scored(torch.eye(4)[plain.holdout.labels], labels=plain.holdout.labels)
    point = OperatingPoint("CF-ViT, eta at parity", DEFAULT, "parity")
    row = point.row([ours], {0: _result(perfect, perfect)})
    assert row.cells["accuracy"].ours is None
    assert row.missing == "no eta reaches the plain ViT's accuracy on the images to choose it on"
    assert point.row([ours], {}).missing == "the plain ViT is not there"
    assert point.row([ours], {0: plain}).missing is None
    second = dataclasses.replace(ours, seed=1)
    both = point.row([ours, second], {0: plain})
    assert (both.seeds, both.missing) == (1, "the plain ViT is not there for 1 of 2 seeds")
    short = point.row([ours, second], {0: _result(perfect, perfect)}, "seed 2 is not there")
    assert short.missing == (
        "seed 2 is not there; no eta reaches the plain ViT's accuracy on the images to choose it on for 1 of 2 seeds; "
        "the plain ViT is not there for 1 of 2 seeds"
    )


@pytest.mark.parametrize("eta", [0.0, 0.4, 0.6, 1.0])
def test_counts_are_of_the_images_that_a_stage_answers(runs: tuple[Result, Result], eta: float) -> None:
    ours, _ = runs
    coarse, fine = count_right(ours, eta)
    assert 100 * (coarse + fine) / 200 == pytest.approx(_accuracy(ours.validation, eta)[0])
    assert (coarse == 0) == (eta == 1)
    assert (fine == 0) == (eta == 0)


def test_means_and_spreads_over_seeds() -> None:
    published = Published("Table 4", {"fine": 80.8})
    row = mean_row("fine", {"fine": [70.0, 74.0, 72.0], "coarse": [1.0, 1.0, 1.0]}, published)
    assert row == Row("fine", {"fine": Cell(72.0, 4.0, 80.8), "coarse": Cell(1.0)}, 3, "Table 4")
    assert mean_row("fine", {"fine": []}, published) == Row("fine", {"fine": Cell(None, 0.0, 80.8)}, 0, "Table 4")


def test_a_table_has_ours_beside_the_papers_and_says_what_is_missing(tmp_path: Path) -> None:
    rows = [
        Row("random", {"coarse": Cell(70.0, 4.0, 75.3), "fine": Cell(71.0)}, 2, "Table 4"),
        Row("none", {"coarse": Cell(None, 0.0, 75.2), "fine": Cell(None)}, 0, "", "did not fit"),
        Row("detail", {"fine": Cell(1.0)}, 1, shown=False),
    ]
    headings, lines = table_of(rows)
    assert headings == ["", "coarse top-1 %", "paper", "fine top-1 %", "place in the paper", "missing"]
    assert lines[0] == ["random", "70.00 (spread 4.00)", "75.3", "71.00 (spread 0.00)", "Table 4", ""]
    assert lines[1] == ["none", "-", "75.2", "-", "", "did not fit"]
    assert len(lines) == 2
    write_csv(tmp_path / "table.csv", rows)
    assert (tmp_path / "table.csv").read_text().splitlines() == [
        "row,coarse,coarse_spread,coarse_paper,fine,fine_spread,fine_paper,seeds,place,missing",
        "random,70,4,75.3,71,0,,2,Table 4,",
        "none,,,75.2,,,,0,,did not fit",
        "detail,,,,1,0,,1,,",
    ]
