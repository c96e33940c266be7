"""What a run tells of its speed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cfvit import count_macs
from cfvit.methods.base import create_method
from cfvit.modeling.config import ModelConfig
from cfvit.processes import Process
from cfvit.training import log
from cfvit.training.log import Pace, gradient_macs, matrix_rate
from cfvit.training.loop import train
from cfvit.training.recipe import Recipe

CPU = Process(rank=0, world=1, device=torch.device("cpu"))


def test_figures_are_those_since_the_start_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(log, "matrix_rate", lambda device, dtype: 50_000.0)
    monkeypatch.setattr(log, "gradient_macs", lambda method, model, split: int(1000 * split))
    anything: Any = SimpleNamespace(method=None, model=None, step=3)
    pace = Pace(Recipe(batch_size=10), anything, Process(rank=0, world=4, device=CPU.device))
    pace.start(0.5)
    for _ in range(6):
        now[0] += 0.5
        anything.step += 1
    assert pace.figures() == {"images_per_second": 80.0, "matrix_share": 0.2}
    pace.start(1.0)
    now[0] += 2.0
    anything.step += 1
    assert pace.figures() == {"images_per_second": 20.0, "matrix_share": 0.1}


def test_products_are_counted_once_for_each_split_and_that_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counted = [100.0], []

    def count(method: object, model: object, split: float) -> int:
        counted.append(split)
        now[0] += 50.0
        return 1000

    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(log, "matrix_rate", lambda device, dtype: 50_000.0)
    monkeypatch.setattr(log, "gradient_macs", count)
    anything: Any = SimpleNamespace(method=None, model=None, step=3)
    pace = Pace(Recipe(batch_size=10), anything, CPU)
    speeds = []
    for split in (1.0, 0.5, 0.5):
        pace.start(split)
        for _ in range(2):
            now[0] += 0.5
            anything.step += 1
            speeds.append(pace.figures()["images_per_second"])
    assert speeds == [20.0] * 6
    assert counted == [1.0, 0.5]


def test_gradients_cost_three_times_what_is_trained() -> None:
    config = ModelConfig(
        backbone="test_vit", num_classes=3, coarse_grid=4, informative_ratio=0.25, timm_kwargs={"patch_size": 4}
    )

    def macs(name: str, split: float) -> int:
        method = create_method(name)
        model = method.build(config)
        model.class_names = ["a", "b", "c"]
        return gradient_macs(method, model, split)

    cost = count_macs(create_method("cf_vit").build(config))
    assert macs("cf_vit", 0.25) == 3 * cost.both < macs("cf_vit", 1.0)
    assert macs("plain", 1.0) == 3 * cost.backbone
    assert macs("coarse_only", 1.0) == 3 * cost.coarse


def test_the_matrix_rate_is_measured_without_touching_the_random_state() -> None:
    matrix_rate.cache_clear()
    state = torch.get_rng_state()
    assert matrix_rate(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), state)


def test_the_log_tells_both(tiny_recipe: Recipe, tmp_path: Path) -> None:
    train(tiny_recipe.replace({"log_interval": 1}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert steps
    assert all(line["images_per_second"] > 0 and 0 < line["matrix_share"] < 1 for line in steps)
