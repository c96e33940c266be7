"""The launches of small batches on a GPU, recorded and replayed as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cfvit.inference.engines.compiling import in_sizes

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batches that are recorded: small ones, whose kernels take longer to launch, one by one, than to run."""


def recorded(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of batches; on a GPU, all launches of a small one are replayed at once.

    Batches of up to the last of `SIZES` are filled up to the next of these. The first batch of a size runs as it is,
    the second is recorded as a CUDA graph, and from then on that is replayed; so in each thread of its own. Weights may
    be written to meanwhile. What waits for the GPU cannot be recorded, such as an answer whose shape depends on the
    images, and runs as it is; so do calls with gradients, under autocast, or within somebody else's recording.

    Args:
        run: as of `cfvit.inference.engines.compiling.compiled`.
    """
    of_thread = threading.local()

    def replay(*parts: Any) -> Any:
        known: dict[str, Callable[..., Any] | None] = vars(of_thread)
        mode = torch.is_inference_mode_enabled()  # what is kept in it cannot be written to without
        kind = str([mode, *((tensor.shape, tensor.dtype, tensor.device) for tensor in _tensors_of(parts))])
        if kind not in known:
            known[kind] = None
            return run(*parts)
        replayed = known[kind] = known[kind] or _record(run, parts)
        return replayed(*parts)

    filled = in_sizes(replay, SIZES)

    def call(images: Tensor, *more: Any) -> Any:
        """Answers a batch, by a recording where one is possible."""
        as_it_is = (
            not images.is_cuda
            or not 0 < len(images) <= SIZES[-1]
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cuda")
            or torch.cuda.is_current_stream_capturing()
        )
        return (run if as_it_is else filled)(images, *more)

    return call


def _record(run: Callable[..., Any], parts: Sequence[Any]) -> Callable[..., Any]:
    """The function for batches of this size, which gives its answers in the same memory each time."""
    every = torch.arange(len(parts[0]), device=parts[0].device)
    held = [part[every] for part in parts]  # copies
    graph, inputs = torch.cuda.CUDAGraph(), _tensors_of(held)
    try:
        with torch.cuda.device(every.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            answer = run(*held)
    except RuntimeError:  # it waits for the GPU, or memory is short
        torch.cuda.synchronize(every.device)
        return run

    def replay(*parts: Any) -> Any:
        for ours, theirs in zip(inputs, _tensors_of(parts), strict=True):
            ours.copy_(theirs)
        graph.replay()
        return answer

    return replay


def _tensors_of(parts: Sequence[Any]) -> list[Tensor]:
    return [tensor for part in parts for tensor in ([part] if isinstance(part, Tensor) else vars(part).values())]
