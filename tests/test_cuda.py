"""On a real GPU, where the machine has one: the answers are those of the CPU, and training goes on elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfvit import CoarseToFineViT, Predictor, load
from cfvit.deploy import Queues
from cfvit.deploy.scheduler import Scheduler
from cfvit.inference.engines.pytorch import TorchEngine, recorded
from cfvit.training.loop import train
from cfvit.training.recipe import Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SIZES = (0, 1, 3, 8, 64, 70)
WITHIN: Any = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture
def model(make_model: Callable[..., CoarseToFineViT]) -> CoarseToFineViT:
    return make_model()


@pytest.fixture
def images(model: CoarseToFineViT, make_images: Callable[..., Tensor]) -> Tensor:
    return make_images(model, max(SIZES))


@pytest.fixture
def eta(model: CoarseToFineViT, images: Tensor) -> float:
    """Between two confidences that are far apart, so that rounding changes no decision."""
    with torch.inference_mode():
        confidence = model.coarse(images).confidence.sort().values
    middle = len(images) // 3 + int(confidence[len(images) // 3 : -len(images) // 3].diff().argmax())
    return float(confidence[middle : middle + 2].mean())


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours.logits.cpu(), theirs.logits, **WITHIN)
    torch.testing.assert_close(ours.confidence.cpu(), theirs.confidence, **WITHIN)
    assert torch.equal(ours.stage.cpu(), theirs.stage)


@pytest.mark.parametrize("compile", [None, True])
def test_the_answers_are_those_of_the_cpu(
    model: CoarseToFineViT, images: Tensor, eta: float, compile: bool | None
) -> None:
    on_cpu = Predictor(model, eta)
    on_gpu = Predictor(model.cuda(), eta, compile=compile)
    for size in SIZES:
        for _ in range(3):  # the first of a size is computed, the next is recorded, then it is replayed
            same(on_gpu(images[-size:] if size else images[:0]), on_cpu(images[-size:] if size else images[:0]))


@torch.inference_mode()
def test_what_was_recorded_follows_the_weights(model: CoarseToFineViT, images: Tensor) -> None:
    engine = TorchEngine(model.cuda())
    batch = images[:8].cuda()
    before = [engine.coarse(batch)[0].logits for _ in range(3)][-1]
    head: Any = model.backbone.head
    head.bias.add_(1.0)
    torch.testing.assert_close(engine.coarse(batch)[0].logits, before + 1.0, **WITHIN)
    with torch.inference_mode(False), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(engine.coarse(batch.clone())[0].logits, before + 1.0, **WITHIN)


@torch.inference_mode()
def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    run = recorded(lambda images: images[images[:, 0] > 0].sum() + images)
    batch = torch.tensor([[1.0], [-2.0]], device="cuda")
    assert [run(batch).tolist() for _ in range(3)] == [[[2.0], [-1.0]]] * 3
    doubled = recorded(lambda images: 2 * images)
    assert [doubled(batch + k).tolist() for k in range(3)] == [[[2.0 + 2 * k], [-4.0 + 2 * k]] for k in range(3)]


def test_a_stream_answers_as_one_batch_does(model: CoarseToFineViT, images: Tensor, eta: float) -> None:
    expected = Predictor(model, eta)(images)
    batches: Iterator[Tensor] = (part.pin_memory() for part in images.split(9))
    parts = list(Predictor(model.cuda(), eta).stream(batches, fine_batch=16, ordered=True))
    torch.testing.assert_close(torch.cat([part.logits.cpu() for part in parts]), expected.logits, **WITHIN)
    assert torch.equal(torch.cat([part.stage.cpu() for part in parts]), expected.stage)


def test_a_scheduler_answers_as_one_batch_does(model: CoarseToFineViT, images: Tensor, eta: float) -> None:
    expected = Predictor(model, eta)(images)
    queues = Queues(coarse_batch=8, coarse_wait=1, fine_batch=16, fine_wait=10)
    scheduler = Scheduler(Predictor(model.cuda(), eta).engine, eta, queues)
    answers = [future.result(60) for part in images.split(5) for future in scheduler.submit(part)]
    torch.testing.assert_close(torch.stack([answer.logits.cpu() for answer in answers]), expected.logits, **WITHIN)
    assert [answer.stage for answer in answers] == expected.stage.tolist()


def test_a_run_on_the_gpu_learns_and_its_model_answers_on_the_cpu(tiny_recipe: Recipe, tmp_path: Path) -> None:
    quiet = {"auto_augment": "none", "random_erasing": 0.0, "repeated_augmentation": 1, "ema_decay": 0.0}
    recipe = tiny_recipe.replace({**quiet, "epochs": 6, "lr_base": 2e-3, "lr_base_size": 16, "warmup_epochs": 0.0})
    assert train(recipe, tmp_path / "run")["validation_fine_top1"] > 60
    model = load(tmp_path / "run")
    assert Predictor(model, 1.0)(torch.zeros(2, 3, *model.image_size)).stage.tolist() == [1, 1]
