"""How fast a run is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cfvit import count_macs, create_model
from cfvit.processes import Process
from cfvit.training import pace as pace_module
from cfvit.training.loop import train
from cfvit.training.pace import Pace, matrix_rate, pace_of
from cfvit.training.recipe import Recipe

CPU = Process(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only element."""
    now = [100.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    return now


def test_figures_are_those_since_the_start_of_all_processes(clock: list[float]) -> None:
    pace = Pace(images_per_step=10, world=4, gradient_macs=lambda ratio: int(1000 * ratio), matrix_rate=50_000.0)
    pace.start(0.5)
    for _ in range(6):
        clock[0] += 0.5
        pace.advance()
    assert pace.figures() == {"images_per_second": 80.0, "matrix_share": 0.2}
    pace.start(1.0)
    clock[0] += 2.0
    pace.advance()
    assert pace.figures() == {"images_per_second": 20.0, "matrix_share": 0.1}


def test_gradients_cost_three_times_what_is_trained() -> None:
    model = create_model("test_vit", num_classes=3, coarse_grid=4, patch_size=4, informative_ratio=0.25)
    macs = count_macs(model)
    recipe = Recipe(backbone="test_vit", coarse_grid=4)

    def gradient_macs(stages: str, ratio: float) -> int:
        return pace_of(recipe.replace({"stages": stages}), model, CPU).gradient_macs(ratio)

    assert gradient_macs("both", 0.25) == 3 * macs.both < gradient_macs("both", 1.0)
    assert gradient_macs("backbone", 1.0) == 3 * macs.backbone
    assert gradient_macs("coarse", 1.0) == 3 * macs.coarse


def test_the_matrix_rate_is_measured_without_touching_the_random_state() -> None:
    matrix_rate.cache_clear()
    state = torch.get_rng_state()
    assert matrix_rate(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), state)


def test_the_log_tells_both(colours: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        data=str(colours),
        holdout=0.2,
        backbone="test_vit",
        timm_kwargs={"patch_size": 4},
        coarse_grid=2,
        epochs=1,
        batch_size=16,
        workers=0,
        log_interval=1,
    )
    train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert steps
    assert all(line["images_per_second"] > 0 and 0 < line["matrix_share"] < 1 for line in steps)
