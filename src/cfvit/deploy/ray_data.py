"""Answers on a Ray cluster by Ray Data: images are decoded by tasks and answered by actors, each as fast as it can."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.functional import normalize

from cfvit.errors import CfvitError, first_line
from cfvit.inference.files import as_row, classify_files, read_image
from cfvit.inference.predictor import Predictor
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import best_device

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # these are read by Ray when it is imported
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

CPUS_TO_ANSWER = 2 / 3
"""Where there is no GPU, workers get this share of the processors, and decoding has the others."""

DECODING_BYTES = 500_000_000
"""What decoding a part may take: Ray starts no more decoders on a machine than its memory holds."""


def decode(row: dict[str, Any], data_config: dict[str, Any]) -> dict[str, Any]:
    """Reads a part's images to 8-bit pixels ``[n, 3, H, W]``: a quarter of the bytes that go to a worker in floats.

    Paths and errors are JSON, since not every path is text that Ray takes.
    """
    transform = create_transform(**data_config, is_training=False, normalize=False)
    folder, paths = json.loads(row["folder"]), json.loads(row["paths"])
    read = [read_image(Path(folder, path), transform) for path in paths]
    black = torch.zeros(data_config["input_size"], dtype=torch.uint8)
    pixels = torch.stack([black if isinstance(image, str) else image for image in read])
    errors = [image if isinstance(image, str) else None for image in read]
    return {**row, "pixels": pixels.numpy(), "errors": json.dumps(errors)}


class Answer:
    """A worker: answers the images of a part as `classify_files` does, on a GPU if it has one.

    Args:
        model: refers to a `CoarseToFineViT`, or to the folder of an exported model.
    """

    def __init__(self, model: ray.ObjectRef, threshold: float, batch_size: int) -> None:
        given = ray.get(model)
        given = given.to(best_device()) if isinstance(given, CoarseToFineViT) else given
        self.predictor, self.batch_size = Predictor(given, threshold), batch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        paths, config = list(map(Path, json.loads(row["paths"]))), self.predictor.model.data_config
        read = dict(zip(paths, zip(json.loads(row["errors"]), row["pixels"], strict=True), strict=True))

        def prepared(path: Path) -> Tensor | str:
            error, pixels = read[path]
            return error or normalize(torch.from_numpy(np.array(pixels)) / 255, config["mean"], config["std"])

        results = classify_files(paths, self.predictor, self.batch_size, read=prepared)
        return {"part": row["part"], "rows": json.dumps(list(map(as_row, results)))}


@contextmanager
def joined(address: str, workers: int | None) -> Iterator[None]:
    """Within it Ray is connected to a cluster; one that was started for it ends with it.

    Raises:
        CfvitError: the cluster cannot be reached, or fails.
    """
    started = not ray.is_initialized()
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, (workers or 1) + 1)}
    try:
        if started:
            ray.init(**options)
    except Exception as error:  # of whatever kind
        ray.shutdown()  # what was started before it failed
        raise CfvitError(f"no Ray cluster at {address} ({first_line(error)}): start one, or give local") from error
    try:
        yield
    except (RayError, ConnectionError, RuntimeError) as error:
        raise CfvitError(
            f"Ray failed ({first_line(error)}): check the cluster at {address}, and give the same command to go on"
        ) from error
    finally:
        if started:
            ray.shutdown()


def answers(
    parts: Iterable[tuple[int, list[Path]]],
    predictor: Predictor,
    batch_size: int,
    address: str,
    workers: int | None = None,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of each part's images, in the order in which they are done.

    A part whose worker or machine fails is answered by another.

    Args:
        parts: numbers and paths; each machine must have the images at these paths.
        predictor: whose model and threshold answer. Its model is sent to the workers; an exported one must be at the
            same path on each machine.
        address: of the cluster, or ``local`` to start one on this machine.
        workers: that answer; by default one for each GPU, or else `CPUS_TO_ANSWER`.

    Raises:
        CfvitError: the cluster cannot be reached, has but one processor, or fails.
    """
    folder = json.dumps(str(Path.cwd()))  # of relative paths; a worker may be in another one
    rows = [{"part": number, "folder": folder, "paths": json.dumps(list(map(str, paths)))} for number, paths in parts]
    if not rows:
        return
    with joined(address, workers):
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        if cpus < 2:
            raise CfvitError(f"the Ray cluster has {cpus} processors: give it 2, one to decode and one to answer")
        count = workers or gpus or max(1, int(cpus * CPUS_TO_ANSWER))
        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        exported = getattr(predictor.engine, "folder", None)
        model = ray.put(predictor.model.cpu() if exported is None else exported.resolve())
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            partial(decode, data_config=predictor.model.data_config),
            memory=DECODING_BYTES,  # a demand of its own also keeps Ray from decoding within the workers, one by one
        )
        data = data.map(
            cast(Any, Answer),
            fn_constructor_args=(model, predictor.threshold, batch_size),
            compute=ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        for row in data.iter_rows():
            yield row["part"], json.loads(row["rows"])
