"""`cfvit reproduce` from the first training to the written tables, on images that are quick to learn."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from PIL import Image
from safetensors.torch import load_file, save_file

from cfvit import load, save
from cfvit.benchmark.conditions import conditions_of
from cfvit.data import EvalImages, open_data
from cfvit.errors import UsageError
from cfvit.evaluation.metrics import Collected, evaluate_model, labelled_images
from cfvit.evaluation.timing import Timing
from cfvit.methods.base import create_method
from cfvit.modeling.exit import Exit, goes_on
from cfvit.paper import compare, figures
from cfvit.paper import runs as running
from cfvit.paper.compare import Setting, measure_speed, plain_setting
from cfvit.paper.given import Contestant
from cfvit.paper.given import compared as compare_with_plain
from cfvit.paper.runs import Missing, Result, Run, Runs, logged_speed, read_record
from cfvit.paper.studies import DEFAULT, RUNS
from cfvit.paper.write import Request, reproduce
from cfvit.processes import Process
from cfvit.training.loop import Stopped, train
from cfvit.training.recipe import DIGITS, Recipe
from cfvit.training.setup import open_run

pytestmark = pytest.mark.usefixtures("each_block_gives_its_class_attention")
MEASURED = "Images per second are of the first seed"
CPU = Process(0, 1, torch.device("cpu"))
Fails = Callable[..., AbstractContextManager[None]]
Main = Callable[..., Outcome]

TINY: dict[str, Any] = {
    "holdout": 0.2,
    "backbone": "test_vit",
    "timm_kwargs": {"patch_size": 4, "depth": 2},
    "coarse_grid": 3,
    "epochs": 2,
    "all_cells_share": 0.5,
    "batch_size": 24,
    "lr_base": 2e-3,
    "lr_base_size": 24,
    "warmup_epochs": 0.0,
    "auto_augment": "none",
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema_decay": 0.0,
    "repeated_augmentation": 1,
    "workers": 0,
}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch, timed_at_once: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _write_spots(folder: Path, per_class: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for channel, name in enumerate(("blue spot", "green spot", "red spot")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.normal(128, 40, (24, 24, 3))
            row, column = 8 * generator.integers(3, size=2)
            pixels[row : row + 8, column : column + 8, 2 - channel] += 90
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def spots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a coloured spot in one cell: not learnt in two epochs, so that runs differ. Only to be read."""
    folder = tmp_path_factory.mktemp("spots")
    _write_spots(folder / "train", 30, seed=0)
    _write_spots(folder / "val", 20, seed=1)
    return folder


@pytest.fixture(scope="module")
def recipe(spots: Path) -> Recipe:
    return Recipe(data=(str(spots),)).replace(TINY)


@pytest.fixture(scope="module")
def config(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(recipe.to_yaml())
    return path


def _request(recipe: Recipe, out: Path, name: str, **changes: Any) -> Request:
    given: dict[str, Any] = {"name": name, "recipe": recipe, "recipe_name": "deit", "out": out, "seeds": (0,)}
    return Request(**{**given, "command": f"cfvit reproduce {name}", **changes})


def _quiet(*_: object) -> None:
    """In place of what shows a study or says a line."""


@pytest.fixture(scope="module")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 4 as `reproduce` leaves it. Only to be read."""
    out = tmp_path_factory.mktemp("reproduction")
    missing = reproduce(_request(recipe, out, "table4"), _quiet, _quiet)
    assert missing == []
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to go on from."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "train", lambda *_, **__: pytest.fail("trained"))


def _runs(recipe: Recipe, out: Path, budget: float | None = None, say: Callable[[str], object] = _quiet) -> Runs:
    return Runs(recipe, out, budget, 72, conditions_of(torch.float32, ""), say)


def _table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def _require_picture(path: Path) -> None:
    with Image.open(path) as image:
        image.verify()


def test_table_4_has_each_way_to_choose_regions(trained: Path, recipe: Recipe) -> None:
    table = _table(trained / "table4.csv")
    assert [float(row["fine_paper"]) for row in table.values()] == [77.6, 79.6, 80.3, 80.8]
    source_of = {
        "lowest global class attention": "select-negative",
        "last block's class attention": "beta-0",
        "global class attention": DEFAULT,
    }
    for label, run in source_of.items():
        model = load(trained / "runs" / f"{run}-seed0")
        result = evaluate_model(model, labelled_images(model, recipe.data[0]), (1.0,), 64, 0, CPU)
        expected = [result.stages[stage].top1 for stage in (0, 1)]
        assert [float(table[label][stage]) for stage in ("coarse", "fine")] == pytest.approx(expected, abs=1e-3)
    assert load(trained / "runs" / "select-random-seed0").config.selection == "random"
    assert load(trained / "runs" / "select-negative-seed0").config.selection == "negative"
    assert load(trained / "runs" / "beta-0-seed0").config.attention_momentum == 0
    _require_picture(trained / "table4.png")


def test_variants_that_differ_later_share_the_first_epochs(trained: Path) -> None:
    for run, forked_from, epochs in ((DEFAULT, None, 2), ("beta-0", "default-seed0", 1)):
        record = read_record(trained / "runs" / f"{run}-seed0")
        assert record is not None
        assert (record.finished, record.forked_from, record.epochs) == (True, forked_from, epochs)
        assert record.seconds > 0
    log = (trained / "runs" / "select-random-seed0" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1]


def test_it_is_written_what_was_run(trained: Path, recipe: Recipe) -> None:
    text = (trained / "table4.md").read_text()
    for said in (
        "![Table 4: which regions are split](table4.png)",
        "| random |",
        "| 79.6 | Table 4, row 'random' |",
        "- command: `cfvit reproduce table4`",
        f"- data: {recipe.data[0]}",
        "- images: 72 to train on, 18 held out, 60 to validate on (one is 1.7 points)",
        "- recipe: deit, with holdout 0.2, backbone test_vit,",
        "- epochs: 2",
        "- seeds: 0",
        "- dtype: float32",
        f"torch {torch.__version__.split('+')[0]}",
        "the same run and the same 80.3 as in Table 7",
    ):
        assert said in text
    assert "eval_interval" not in text
    with (trained / "runs.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == ["beta-0-seed0", "default-seed0", "select-negative-seed0", "select-random-seed0"]
    default = rows["default-seed0"]
    assert (default["grid"], default["seed"], default["epochs"], default["dtype"]) == ("3", "0", "2", "float32")
    assert default["command"] == "cfvit reproduce table4"
    assert float(default["fine"]) == pytest.approx(
        float(_table(trained / "table4.csv")["global class attention"]["fine"])
    )


@pytest.mark.usefixtures("no_training")
def test_nothing_is_trained_twice(out: Path, config: Path, cfvit_main: Main) -> None:
    before = _table(out / "table4.csv")
    outcome = cfvit_main("reproduce", "table4", "--config", config, "--out", out, "--json")
    assert outcome.status == 0
    rows = [json.loads(line) for line in outcome.out]
    assert [row["row"] for row in rows] == list(before)
    assert rows[1]["study"] == "table4"
    assert rows[1]["measures"]["fine"]["paper"] == 79.6
    assert rows[1]["measures"]["fine"]["ours"] == pytest.approx(float(before["random"]["fine"]), abs=1e-3)
    assert rows[1]["missing"] is None
    assert _table(out / "table4.csv") == before


def _last_scores(out: Path, run: str, seed: int) -> list[float]:
    log = (out / "runs" / f"{run}-seed{seed}" / "log.jsonl").read_text().splitlines()
    return [json.loads(log[-1])[f"validation_{stage}_top1"] for stage in ("coarse", "fine")]


def test_table_5_has_each_way_to_reuse_features(out: Path, config: Path, cfvit_main: Main) -> None:
    outcome = cfvit_main("reproduce", "table5", "--config", config, "--out", out)
    assert outcome.status == 0, outcome.err
    assert outcome.out[0] == "Table 5: what the fine stage reuses of the coarse features"
    table = _table(out / "table5.csv")
    source_of = {
        "nothing": ("none", "reuse-none"),
        "with the class token": ("class_token", "reuse-class-token"),
        "with uninformative tokens": ("uninformative", "reuse-uninformative"),
        "linear instead of MLP": ("linear", "reuse-linear"),
        "MLP": ("mlp", DEFAULT),
    }
    assert list(table) == list(source_of)
    for label, (reuse, run) in source_of.items():
        assert load(out / "runs" / f"{run}-seed0").config.feature_reuse == reuse
        scores = [float(table[label][stage]) for stage in ("coarse", "fine")]
        assert scores == pytest.approx(_last_scores(out, run, 0), abs=1e-3)
    record = read_record(out / "runs" / "reuse-none-seed0")
    assert record is not None
    assert record.forked_from is None
    _require_picture(out / "table5.png")


def test_seeds_are_averaged(out: Path, config: Path, cfvit_main: Main) -> None:
    outcome = cfvit_main("reproduce", "table8", "--config", config, "--out", out, "--seeds", "0", "1")
    assert outcome.status == 0, outcome.err
    table = _table(out / "table8.csv")
    for label, run in (("CE + CE", "loss-ce"), ("CE + KL", DEFAULT)):
        fine = [_last_scores(out, run, seed)[1] for seed in (0, 1)]
        row = table[label]
        assert float(row["fine"]) == pytest.approx(sum(fine) / 2, abs=1e-3)
        assert float(row["fine_spread"]) == pytest.approx(max(fine) - min(fine), abs=1e-3)
        assert row["seeds"] == "2"
    assert "- seeds: 0, 1" in (out / "table8.md").read_text()


def test_table_2_compares_with_the_plain_vit(
    out: Path, config: Path, cfvit_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "MOST_ROUNDS", 1)
    outcome = cfvit_main("reproduce", "table2", "--config", config, "--out", out)
    assert outcome.status == 0, outcome.err
    table = _table(out / "table2.csv")
    assert list(table) == [
        "plain ViT",
        *(f"CF-ViT{grid}, eta {eta}" for grid in ("", ", larger grid") for eta in ("at parity", "0.75", "1")),
    ]
    end = table["CF-ViT, eta 1"]
    assert (float(end["exit_share"]), end["accuracy_paper"], end["images_per_second_paper"]) == (0, "80.8", "2760")
    assert float(end["images_per_second"]) > 0
    assert float(end["speedup"]) == pytest.approx(
        float(end["images_per_second"]) / float(table["plain ViT"]["images_per_second"]), rel=1e-3
    )
    assert table["CF-ViT, larger grid, eta 1"]["accuracy_paper"] == ""
    assert float(table["CF-ViT, larger grid, eta 1"]["gmacs"]) > float(end["gmacs"])
    assert (load(out / "runs" / "larger-grid-seed0").config.coarse_grid, load(out / "runs" / "default-seed0").grid) == (
        4,
        (3, 3),
    )
    with (out / "runs.csv").open(newline="") as file:
        lines = {row["run"]: row for row in csv.DictReader(file)}
    assert float(lines["plain-seed0"]["images_per_second"]) > 0
    text = (out / "table2.md").read_text()
    assert all(said in text for said in ("1.32", MEASURED, "- An accuracy of "))
    assert "LV-ViT" not in text
    _require_picture(out / "table2.png")


def _stop_after(monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    """The deadline passes once it was asked for so often."""
    count = iter(range(10**6))
    monkeypatch.setattr(Runs, "time_is_up", lambda self: next(count) >= asked)


def test_a_run_that_the_budget_stops_is_resumed_as_if_it_never_stopped(
    recipe: Recipe, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stop_after(patch, 1)
        stopped = _runs(recipe, tmp_path).make(RUNS[DEFAULT], 0)
    assert isinstance(stopped, Missing)
    assert "can be resumed" in stopped.reason
    record = read_record(tmp_path / "default-seed0")
    assert record is not None
    assert not record.finished
    assert (record.done, record.epochs) == (pytest.approx(2 / 3), 2)
    assert record.epoch_seconds is not None
    assert stopped.seconds == pytest.approx(4 / 3 * record.epoch_seconds)
    other = _runs(recipe, tmp_path, -1.0).make(RUNS["plain"], 0)
    assert isinstance(other, Missing)
    assert other.seconds == pytest.approx(2 * record.epoch_seconds)
    finished = _runs(recipe, tmp_path).make(RUNS[DEFAULT], 0)
    before = _runs(recipe, trained / "runs").make(RUNS[DEFAULT], 0)
    assert isinstance(finished, Run)
    assert isinstance(before, Run)
    for ours, theirs in zip(finished.validation.logits.values(), before.validation.logits.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert finished.record.seconds > record.seconds
    assert finished.record.done == 2


def test_a_signal_ends_the_command_and_not_the_run_alone(
    recipe: Recipe, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise Stopped("stopped at step 1: add --resume to continue")

    monkeypatch.setattr(running, "train", interrupted)
    with fails("stopped in default-seed0: the same command again", Stopped):
        _runs(recipe, tmp_path).make(RUNS[DEFAULT], 0)


@pytest.mark.usefixtures("no_training")
def test_what_does_not_fit_into_the_budget_is_left_out_and_told(out: Path, config: Path, cfvit_main: Main) -> None:
    folder = out / "runs" / "default-seed0"
    record = read_record(folder)
    assert record is not None
    replace(record, epoch_seconds=2000.0).write(folder)
    outcome = cfvit_main("reproduce", "table8", "--config", config, "--out", out, "--budget", "10m", "--json")
    assert outcome.status == 0
    without, default = (json.loads(line) for line in outcome.out)
    assert without["measures"]["fine"] == {"ours": None, "spread": 0.0, "paper": 80.3}
    assert without["missing"] == "loss-ce-seed0 does not fit into the budget"
    assert default["measures"]["fine"]["ours"] is not None
    assert "not run: loss-ce-seed0 does not fit into the budget, about 67 min more" in outcome.err
    assert outcome.err[-1] == "the same command goes on from here; about 67 min are left"
    assert "loss-ce-seed0 does not fit" in (out / "table8.md").read_text()
    _require_picture(out / "table8.png")


@pytest.mark.usefixtures("no_training")
def test_a_spent_budget_starts_nothing(recipe: Recipe, tmp_path: Path) -> None:
    made = _runs(recipe, tmp_path, -1.0).make(RUNS[DEFAULT], 0)
    assert made == Missing("default-seed0", "does not fit into the budget", None)


def test_a_budget_that_is_too_short_for_the_first_run_starts_none(
    config: Path, tmp_path: Path, cfvit_main: Main
) -> None:
    arguments = ("--config", config, "--epochs", "2000", "--out", tmp_path / "out")
    outcome = cfvit_main("reproduce", "table8", *arguments, "--budget", "20s", "--json")
    assert outcome.status == 0, outcome.err
    missing = [json.loads(line)["missing"] for line in outcome.out]
    assert missing == [f"{run}-seed0 does not fit into the budget" for run in ("loss-ce", DEFAULT)]
    assert not (tmp_path / "out" / "runs").exists()
    assert "default-seed0: 4 steps are tried, to estimate its time" in outcome.err
    assert any("not run: default-seed0 does not fit into the budget, about" in line for line in outcome.err)


def test_a_run_of_cfvit_train_is_found(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = RUNS["plain-coarse-grid"].recipe(recipe, 5)
    figures = train(final, tmp_path / "plain-coarse-grid-seed5")
    monkeypatch.setattr(running, "train", lambda *_, **__: pytest.fail("trained"))
    made = _runs(recipe, tmp_path).make(RUNS["plain-coarse-grid"], 5)
    assert isinstance(made, Run)
    assert made.record.done == 0, "its training was not timed"
    assert list(made.validation.logits) == ["coarse"]
    right = (made.validation.logits["coarse"].argmax(-1) == made.validation.labels).double().mean()
    assert 100 * float(right) == pytest.approx(figures["validation_coarse_top1"], abs=1e-3)


@pytest.mark.usefixtures("no_training")
def test_a_folder_with_another_run_is_refused(out: Path, recipe: Recipe, fails: Fails) -> None:
    with fails("default-seed0 holds a run with drop_path_rate 0.1, not 0.3: give the same recipe"):
        _runs(recipe.replace({"drop_path_rate": 0.3}), out / "runs").make(RUNS[DEFAULT], 0)
    (out / "runs" / "default-seed0" / "run.json").write_text("{")
    with fails("run.json is damaged"):
        _runs(recipe.replace({"workers": 1}), out / "runs").make(RUNS[DEFAULT], 0)


def test_a_recipe_that_a_variant_contradicts_is_a_missing_run(recipe: Recipe, tmp_path: Path) -> None:
    changes = {"backbone": "lvvit_small_patch16_224", "teacher": "resnet10t", "mixup": 0.0, "cutmix": 0.0}
    made = _runs(recipe.replace(changes), tmp_path).make(RUNS["loss-ce"], 0)
    assert isinstance(made, Missing)
    assert made.reason.startswith("cannot be trained so: token labels")


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["tabel4"], 2, "did you mean 'table4'?"),
        (["table4", "--budget", "soon"], 2, "budget is 'soon': give a time such as 2h"),
        (["table4", "--data", ""], 2, "no data: name what to train"),
        (["table6", "--informative-ratio", "0.6"], 2, "informative_ratio is 0.6: the studies set it themselves"),
        (["table4", "--holdout", "0"], 2, "holdout is 0.0: eta is chosen on the hold-out"),
        (["table4", "--model", "deit_tiny_imagenet"], 2, "table4 needs more than one trained model"),
        (["fig5", "--model", "deit_tiny_patch16_224"], 2, "fig5 needs more than a plain ViT"),
        (["fig5", "--model", "nothing"], 1, "no model 'nothing'"),
        (["fig1a", "--model", "local-dir:nothing"], 1, "timm's model local-dir:nothing cannot be had"),
        (["fig1a", "--model", "resnet18"], 1, "resnet18 is a hierarchy of convolutions"),
        (["table4", "--data", "nowhere"], 1, "no data at nowhere"),
        (["table4", "--seeds", "0", "-1"], 2, "seed -1 is below 0: give numbers from 0"),
        (["table4", "--seeds"], 2, "--seeds has no number: give numbers from 0"),
    ],
)
def test_refusals(arguments: list[str], status: int, said: str, config: Path, tmp_path: Path, cfvit_main: Main) -> None:
    outcome = cfvit_main("reproduce", *arguments, "--config", config, "--out", tmp_path / "out")
    assert (outcome.status, outcome.out, len(outcome.err)) == (status, [], 1)
    assert said in outcome.err[0]
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", ["fig1a", "fig1b", "table2"])
def test_no_other_run_stands_for_a_plain_vit_that_is_missing(out: Path, recipe: Recipe, name: str) -> None:
    reproduce(_request(recipe, out, name, budget=1e-9), _quiet, _quiet)
    reasons = [row["missing"] for row in _table(out / f"{name}.csv").values()]
    assert "plain-seed0 does not fit into the budget" in reasons
    assert MEASURED not in (out / f"{name}.md").read_text()
    assert (out / f"{name}.png").exists() == (name == "table2")


@pytest.mark.usefixtures("no_training")
def test_it_is_told_where_and_by_what_code_runs_were_trained(out: Path, recipe: Recipe) -> None:
    assert "trained on" not in (out / "table4.md").read_text()
    record = read_record(out / "runs" / "beta-0-seed0")
    assert record is not None
    changed = {**record.conditions, "commit": "abc", "versions": "torch 1"}
    replace(record, conditions=changed).write(out / "runs" / "beta-0-seed0")
    reproduce(_request(recipe, out, "table4"), _quiet, _quiet)
    text = (out / "table4.md").read_text()
    assert f"- trained on: {changed['hardware']}, float32, torch 1, commit abc\n" in text


@pytest.mark.usefixtures("no_training")
def test_parity_is_sought_by_the_confidence_that_the_model_exits_by() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    coarse, fine = (noise * torch.randn(40, 4) + torch.eye(4)[labels] for noise in (0.8, 0.4))
    scored = Collected({"coarse": coarse, "fine": fine}, labels, torch.arange(40), [])
    plain = Collected({"plain": fine}, labels, torch.arange(40), [])
    rule = Exit("margin", 2.0)
    method: Any = create_method("cf_vit")
    result = Result(method, {"coarse": 1, "fine": 2}, scored, scored, lambda: (None, None), rule=rule)  # type: ignore[arg-type]
    eta = result.parity(Result(method, {"plain": 2}, plain, plain, lambda: (None, None)), below=5.0)  # type: ignore[arg-type]
    assert eta is not None
    order = rule.coarse(coarse).argsort()
    right = torch.stack([coarse.argmax(-1) == labels, fine.argmax(-1) == labels])[:, order]
    counts = [int(right[1, :hard].sum() + right[0, hard:].sum()) for hard in range(41)]
    fewest = next(hard for hard, count in enumerate(counts) if count >= counts[-1] - 2)
    assert 0 < fewest < 40
    assert int(goes_on(rule.coarse(coarse), eta).sum()) == fewest
    (point,) = result.at([eta])
    assert point.accuracy == pytest.approx(100 * counts[fewest] / 40)
    network: Any = SimpleNamespace(exit=rule)
    create_method("cf_vit").choose_exit(network, scored.logits, labels, 5.0)
    failing = [hard for hard, count in enumerate(counts) if count < counts[-1] - 2]
    assert int(goes_on(rule.coarse(coarse), network.threshold).sum()) == failing[-1] + 1


@pytest.mark.usefixtures("no_training")
def test_unreadable_images_are_not_drawn(
    colour_model: Path, make_colours: Callable[..., Path], tmp_path: Path, cfvit_main: Main
) -> None:
    data = make_colours(per_class=2)
    (data / "blue" / "0.png").write_text("no image")
    given = ["--data", data, "--model", colour_model, "--workers", "0", "--out", tmp_path / "out"]
    assert cfvit_main("reproduce", "fig1b", *given).status == 0
    names = list(_table(tmp_path / "out" / "fig1b.csv"))
    assert len(names) == 4
    assert (names[0], names[-1]) == ("blue/1.png", "red/1.png")


def test_data_without_validation_images_are_refused(
    recipe: Recipe, make_colours: Callable[..., Path], tmp_path: Path, fails: Fails
) -> None:
    alone = recipe.replace({"data": str(make_colours())})
    with fails("has no validation images: name some with --val-data"):
        reproduce(_request(alone, tmp_path, "table4"), _quiet, _quiet)


def test_many_processes_are_refused(
    recipe: Recipe, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with fails("train single runs by torchrun", UsageError):
        reproduce(_request(recipe, tmp_path, "table4"), _quiet, _quiet)


def test_a_place_that_cannot_be_written_is_refused_before_the_training(
    recipe: Recipe, tmp_path: Path, fails: Fails
) -> None:
    (tmp_path / "file").write_text("")
    with fails("cannot write"):
        reproduce(_request(recipe, tmp_path / "file", "table4"), _quiet, _quiet)


@pytest.mark.usefixtures("no_training")
def test_figures_of_a_given_model(
    colour_model: Path, colours: Path, tmp_path: Path, cfvit_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    draw = figures.pictures.draw_highest_lowest

    def drawn(*arguments: Any, **options: Any) -> None:
        titles.append(options["title"])
        draw(*arguments, **options)

    monkeypatch.setattr(figures.pictures, "draw_highest_lowest", drawn)
    given = ["--data", colours, "--model", colour_model, "--workers", "0"]
    outcome = cfvit_main("reproduce", "all", *given, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    pictures = sorted(path.stem for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["fig1a", "fig1b", "fig5", "fig6", "fig8", "fig9"]
    counts = _table(tmp_path / "out" / "fig8.csv")
    model = load(colour_model)
    result = evaluate_model(model, labelled_images(model, str(colours)), (0.0, 1.0), 64, 0, CPU)
    ends = [counts["eta 0"]["right_coarse"], counts["eta 1"]["right_fine"]]
    assert [float(end) for end in ends] == pytest.approx([33 * point.accuracy / 100 for point in _ends(result.sweep)])
    assert f"none, the model {colour_model} as it was given" in (tmp_path / "out" / "fig8.md").read_text()
    assert titles == ["The backbone of a CF-ViT, run alone, on 33 of its 64 patches, by class attention"]
    for name in ("fig1a", "fig1b"):
        assert "stands the backbone of the given CF-ViT" in (tmp_path / "out" / f"{name}.md").read_text()
    text = (tmp_path / "out" / "fig6.md").read_text()
    assert "Ours is built on deit_tiny_patch16_224, the published CF-ViT on LV-ViT-S." in text
    assert "--recipe" not in text


def _ends(sweep: list[Any]) -> Iterator[Any]:
    return (point for point in sweep if point.threshold in (0.0, 1.0))


@pytest.fixture
def plain_weights(colour_model: Path, tmp_path: Path) -> Path:
    """Weights of the plain ViT that the model of the colours was made from."""
    weights = load(colour_model).backbone.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


@pytest.mark.usefixtures("no_training")
def test_table_2_of_a_given_model_is_in_pairs_with_its_plain_vit(
    colour_model: Path,
    colours: Path,
    plain_weights: Path,
    make_colours: Callable[..., Path],
    tmp_path: Path,
    cfvit_main: Main,
) -> None:
    held = make_colours("held", per_class=20, seed=7)
    (tmp_path / "reds.txt").write_text("red\n")
    given = ["--model", colour_model, "--plain", plain_weights, "--calibration-data", held, "--data", colours]
    options = ["--part", tmp_path / "reds.txt", "--no-speed", "--workers", "0", "--out", tmp_path / "out"]
    outcome = cfvit_main("reproduce", "table2", *given, *options, "--json")
    assert outcome.status == 0, outcome.err
    table = {row["row"]: row["measures"] for row in map(json.loads, outcome.out)}
    etas = ("for 0.5 points below parity", "at parity", "0.75", "1")
    points = ["plain ViT", *(f"CF-ViT, eta {eta}" for eta in etas)]
    names = [f"{point}{part}" for part in ("", ", reds", ", other classes") for point in points]
    assert [name for name in table if "published" not in name] == names

    model = load(colour_model)
    source = labelled_images(model, str(colours))
    images = EvalImages(source, model.data_config)
    batch, labels = torch.stack([images[i][0] for i in range(33)]), torch.tensor([images[i][1] for i in range(33)])
    with torch.inference_mode():
        plain, (coarse, fine) = model.backbone(batch).argmax(-1), model(batch)
    sure = coarse.softmax(-1).amax(-1) >= 0.75
    answers = {"plain ViT": plain, "CF-ViT, eta 1": fine.argmax(-1)}
    answers["CF-ViT, eta 0.75"] = torch.where(sure, coarse.argmax(-1), fine.argmax(-1))
    red = labels == source.class_names.index("red")
    for name, classes in answers.items():
        for part, kept in (("", red | ~red), (", reds", red), (", other classes", ~red)):
            row = table[f"{name}{part}"]
            accuracy = row["accuracy"]
            right = (classes == labels)[kept].double().mean()
            assert accuracy["ours"] == pytest.approx(100 * float(right))
            assert accuracy["interval"][0] <= accuracy["ours"] <= accuracy["interval"][1]
            bias = (classes == source.class_names.index("red"))[~red].double().mean()
            assert ("bias" in row) == (part != ", reds")
            assert part == ", reds" or row["bias"]["ours"] == pytest.approx(100 * float(bias))
            if name != "plain ViT":
                base = table[f"plain ViT{part}"]["accuracy"]["ours"]
                assert row["difference"]["ours"] == pytest.approx(accuracy["ours"] - base)
                assert row["agreement"]["ours"] == pytest.approx(100 * float((classes == plain)[kept].double().mean()))
                spent = row["gmacs"]["ours"] / table["plain ViT"]["gmacs"]["ours"]
                assert row["saving"]["ours"] == pytest.approx(100 * (1 - spent))
    text = (tmp_path / "out" / "table2.md").read_text()
    for part in (f"eta chosen on {held}", "eta is chosen on 60 images, and the 33 test images", "reds: 11 images"):
        assert part in text
    assert "hold-out" not in text
    header = (tmp_path / "out" / "table2.csv").read_text().splitlines()[0]
    assert "accuracy,accuracy_spread,accuracy_paper,accuracy_low,accuracy_high" in header


@pytest.mark.usefixtures("no_training")
def test_a_comparison_that_would_mislead_is_refused(
    colour_model: Path, colours: Path, plain_weights: Path, make_colours: Callable[..., Path], tmp_path: Path,
    cfvit_main: Main,
) -> None:  # fmt: skip
    held = make_colours("held", per_class=2, seed=7)
    (tmp_path / "greys.txt").write_text("grey\n")
    reordered = load(colour_model)
    reordered.class_names = reordered.class_names and reordered.class_names[::-1]
    save(reordered, tmp_path / "reordered")
    trained = Path(shutil.copytree(colour_model, tmp_path / "trained"))
    (trained / "recipe.yaml").write_text(DIGITS.replace({"data": str(held), "holdout": 0.0}).to_yaml())
    given = {"--model": colour_model, "--plain": plain_weights, "--calibration-data": held, "--data": colours}
    for changes, status, message in (
        ({"--calibration-data": colours}, 1, "33 images to score on are also among those to choose eta on"),
        ({"--model": trained}, 1, "6 of 6 images are among the training images"),
        ({"--plain": colour_model}, 0, ""),
        ({"--plain": tmp_path / "reordered"}, 1, "class 0 is 'blue' here, 'red' there; give the plain ViT that it was"),
        ({"--part": tmp_path / "greys.txt"}, 2, "greys.txt names 'grey', which is no class of the data"),
        ({"--calibration-data": None}, 2, "--plain and --calibration-data go together"),
        ({"--plain": None, "--calibration-data": None, "--part": held}, 2, "--part divides images that --plain and"),
        ({"--runs": held}, 2, "--runs needs --plain and --calibration-data, no --model, and is for table3, fig5, all"),
        ({"--seeds": 1}, 2, "--seeds is for training, and with --model nothing is trained: leave it out"),
        ({"--recipe": "adapt"}, 2, "--recipe is for training, and with --model nothing is trained: leave it out"),
        ({"--budget": "1h", "--model": None, "--runs": held}, 2, "--budget is for training, and with --runs nothing"),
        ({"--all-cells-share": 0.5}, 2, "--all-cells-share is for training"),
    ):
        words = [word for pair in {**given, **changes}.items() if pair[1] is not None for word in pair]
        options = ["--no-speed", "--workers", "0", "--out", tmp_path / "out"]
        outcome = cfvit_main("reproduce", "table2", *words, *options)
        assert outcome.status == status, outcome.err
        assert status == 0 or message in outcome.err[-1]


@pytest.fixture
def rivals(colour_model: Path, tmp_path: Path) -> Path:
    """Folders of runs of four methods as `cfvit train` leaves them, with the weights of the model of the colours."""
    model = load(colour_model)
    kwargs = {**model.config.timm_kwargs}
    for name in ("cf_vit", "evit", "dvt", "plain"):
        recipe = Recipe(backbone=model.config.backbone, timm_kwargs=kwargs, coarse_grid=4, method=name, crop_pct=1.0)
        torch.manual_seed(0)
        method, folder = create_method(name), tmp_path / "rivals" / name
        network = method.build(recipe.model_config(3), None, model.class_names)
        weights = model.state_dict() if name == "cf_vit" else model.backbone.state_dict()
        for part in network.vits if name == "dvt" else [network]:
            own = part.state_dict()
            part.load_state_dict({**own, **{k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}})
        network.data_config["crop_pct"] = 1.0
        folder.mkdir(parents=True)
        method.save(network, folder)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        (folder / "class_names.json").write_text(json.dumps(model.class_names))
    return tmp_path / "rivals"


@pytest.mark.usefixtures("no_training")
def test_runs_of_any_methods_are_set_side_by_side(
    rivals: Path,
    colours: Path,
    plain_weights: Path,
    make_colours: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cfvit_main: Main,
) -> None:
    monkeypatch.setattr("cfvit.paper.compare.MOST_ROUNDS", 1)
    (tmp_path / "reds.txt").write_text("red\n")
    held = make_colours("held", per_class=20, seed=7)
    given = ["--runs", rivals, "--plain", plain_weights, "--calibration-data", held, "--data", colours]
    options = ["--part", tmp_path / "reds.txt", "--workers", "0", "--out", tmp_path / "out"]
    outcome = cfvit_main("reproduce", "all", *given, *options, "--json")
    assert outcome.status == 0, outcome.err
    rows = [row for row in map(json.loads, outcome.out) if row["study"] == "table3"]
    table = {row["row"]: row["measures"] for row in rows}
    assert len(table) == len(rows), "no name stands for two rows"
    base = table["plain ViT"]
    assert table["plain ViT (run plain)"]["accuracy"]["ours"] == base["accuracy"]["ours"], "a run of its own beside it"
    for name in ("CF-ViT, always fine", "DVT, always 4x4", "EViT, keep rate 0.7"):
        assert {f"{name}{part}" for part in ("", ", reds", ", other classes")} <= set(table)
        assert table[name]["saving"]["ours"] == pytest.approx(
            100 * (1 - table[name]["gmacs"]["ours"] / base["gmacs"]["ours"])
        )

    images = EvalImages(open_data(str(colours), "validation"), load(rivals / "cf_vit").data_config)
    batch, labels = torch.stack([images[i][0] for i in range(33)]), torch.tensor([images[i][1] for i in range(33)])
    for name, title in (("cf_vit", "CF-ViT"), ("dvt", "DVT"), ("evit", "EViT, keep rate 0.7")):
        _, method, network = open_run(rivals / name)
        with torch.inference_mode():
            answers = method.answers(network, batch)
        for point, logits in answers.items():
            row = table[title if len(answers) == 1 else f"{title}, always {point}"]
            right = logits.argmax(-1) == labels
            assert row["accuracy"]["ours"] == pytest.approx(100 * float(right.double().mean()))
            assert row["difference"]["ours"] == pytest.approx(row["accuracy"]["ours"] - base["accuracy"]["ours"])
            for size in (1, 8, 32):
                assert row[f"images_per_second_{size}"]["ours"] > 0
        exits = [row for row in table if row.startswith(f"{title}, for 2 points, eta ") and row.count(",") < 4]
        assert bool(exits) == (len(answers) > 1)
        for row in exits:
            costs = list(method.macs(network).values())
            assert costs[0] <= 1e9 * table[row]["gmacs"]["ours"] <= costs[-1] + 1e4
            assert 0 <= table[row]["exit_share"]["ours"] <= 100
    for name in ("table3", "fig5"):
        _require_picture(tmp_path / "out" / f"{name}.png")
        assert f"the runs in {rivals} as they were given" in (tmp_path / "out" / f"{name}.md").read_text()


@pytest.mark.parametrize(
    "content", ['"abc"', "5", "{}", "[1, 2, 3]", "[", '["red", "blue"]', '["red", "green", "blue"]']
)
def test_a_run_whose_classes_are_damaged_is_refused(
    content: str, rivals: Path, fails: Callable[..., AbstractContextManager[None]]
) -> None:
    for name in ("cf_vit", "evit"):
        if name == "evit" and content.count('"') == 6:
            continue  # as many other names, of which its weights know nothing
        (rivals / name / "class_names.json").write_text(content)
        with fails("is no folder of cfvit train, or damaged|names other classes|does not fit its recipe: head.bias is"):
            open_run(rivals / name)


def test_a_run_of_classes_that_are_no_unicode_is_opened(rivals: Path) -> None:
    names = ["\udcff", "green", "red"]  # as Python reads a folder of the one byte 0xff
    (rivals / "evit" / "class_names.json").write_text(json.dumps(names))
    assert open_run(rivals / "evit")[2].class_names == names


def test_a_run_of_an_unknown_method_or_of_weights_that_are_no_numbers_or_too_few_is_refused(
    rivals: Path, fails: Callable[..., AbstractContextManager[None]]
) -> None:
    path = rivals / "dvt" / "model.safetensors"
    weights = load_file(path)
    first, *others = weights
    save_file({**weights, first: weights[first].float() * float("nan")}, path)
    with fails(f"{first} holds values that are not finite"):
        open_run(path.parent)
    save_file({name: weights[name] for name in others}, path)
    with fails(f"does not fit its recipe: missing {first}"):
        open_run(path.parent)
    recipe = rivals / "dvt" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("method: dvt", "method: own"))
    with fails("dvt is a run that this cfvit does not know: there is no method 'own'"):
        open_run(path.parent)


def test_figure_1a_of_a_plain_vit_of_timms(
    recipe: Recipe, config: Path, tmp_path: Path, cfvit_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = train(RUNS["plain"].recipe(recipe, 0), tmp_path / "plain")
    monkeypatch.setattr(running, "train", lambda *_, **__: pytest.fail("trained"))
    model = f"local-dir:{tmp_path / 'plain'}"
    for name in ("fig1a", "fig1b"):
        outcome = cfvit_main("reproduce", name, "--config", config, "--model", model, "--out", tmp_path / "out")
        assert outcome.status == 0, outcome.err
        _require_picture(tmp_path / "out" / f"{name}.png")
    table = _table(tmp_path / "out" / "fig1a.csv")
    assert list(table) == [*(f"block {i}" for i in range(1, len(table))), "all patches"]
    assert float(table["all patches"]["highest"]) == pytest.approx(figures["validation_plain_top1"], abs=1e-3)
    assert "18 of 36 patches are kept" in (tmp_path / "out" / "fig1a.md").read_text()


def test_a_study_whose_runs_are_all_missing_has_no_picture(recipe: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    missing = reproduce(_request(recipe, tmp_path, "fig8", budget=1e-9), _quiet, said.append)
    assert missing == [Missing("default-seed0", "does not fit into the budget", None)]
    assert not (tmp_path / "fig8.png").exists()
    assert "does not fit into the budget" in (tmp_path / "fig8.md").read_text()
    assert said[-1] == "the same command goes on from here"


def test_conditions_say_where_it_ran(recipe: Recipe) -> None:
    told = asdict(conditions_of(torch.float32, "the command"))
    assert told["command"] == "the command"
    assert "thread" in told["hardware"]
    assert "timm " in told["versions"]
    assert all(told.values())


def test_speed_is_the_mean_of_operating_points_by_the_share_of_images_that_each_answers(
    colour_model: Path,
    colours: Path,
    plain_weights: Path,
    make_colours: Callable[..., Path],
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost, answered = {"timm": 9.0, "plain/plain": 4.0, "default/coarse": 1.0, "default/fine": 3.0}, {}

    def time_in_turn(calls: dict[str, Any], rounds: int, device: torch.device, seconds: float) -> dict[str, Timing]:
        answered.update({name: [call() for call in calls[name]] for name in cost})
        return {name: Timing(((cost.get(name, 1.0),),) * 8) for name in calls}

    monkeypatch.setattr("cfvit.benchmark.measure.time_in_turn", time_in_turn)
    model = load(colour_model)
    ours = Contestant(create_method("cf_vit"), model, model.config)
    held, scored = make_colours("held", per_class=2, seed=7), recipe.replace({"data": str(colours)})
    results, _ = compare_with_plain({DEFAULT: ours}, str(plain_weights), str(held), scored, ())
    (plain,), (result,) = results["plain"], results[DEFAULT]
    half = torch.arange(len(result.validation.labels) - 1) % 2
    settings = [plain_setting(plain), *(Setting("all", DEFAULT, result, stops) for stops in (0 * half, half))]
    timm, *rows = measure_speed(settings, scored, (4,))[4].rows
    assert [row.images_per_second for row in rows] == pytest.approx([32 / 4, 32 / 1, 32 / 2])
    assert [row.ratio.value for row in rows] == pytest.approx([1, 4, 2])
    assert (timm.engine, timm.images_per_second) == ("eager", pytest.approx(32 / 9))
    assert [[len(logits) for logits in each] for each in answered.values()] == [[4] * 8] * 4


def test_the_pace_of_a_training_is_the_median_of_its_log(tmp_path: Path) -> None:
    assert logged_speed(tmp_path) == {}
    lines = [{"event": "train", "images_per_second": speed, "matrix_share": speed / 100} for speed in (5, 20, 8)]
    lines += [{"event": "eval", "holdout_fine_top1": 50.0}, {"event": "train", "images_per_second": 9}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert logged_speed(tmp_path) == {"images_per_second": 8.5, "matrix_share": 0.08}
