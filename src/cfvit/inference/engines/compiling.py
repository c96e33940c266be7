"""``torch.compile`` for batches of any size, with the launches of small ones recorded on a GPU."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

RECORDED_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Batches of which a GPU's launches are recorded: small ones, where launching may take longer than computing."""

COMPILATIONS = 64
"""How often torch may compile one function anew, where this can be set; beyond that it goes on in eager mode. Older
torch does so after 256 compilations of the same code in a process, such as those of many models' predictors."""


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function of batches, for any number of images.

    On a GPU, batches of up to the last of `RECORDED_SIZES` are filled up to the next of these sizes, and their launches
    are recorded as a CUDA graph, by torch's ``reduce-overhead``. The first two batches of each size wait for that, in
    each thread of its own.

    Args:
        run: takes what an index picks images of, tensors and states, and gives one such thing or a tuple. Of the
            networks that it calls, weights may be written to and nothing else may change. torch would check every
            module at each call, which for one image on a CPU takes half as long as a block of DeiT-S (0.6 ms).
    """
    any_size = _compile(run)
    recorded = in_sizes(_compile(run, "reduce-overhead"), RECORDED_SIZES)

    def call(images: Tensor, *more: Any) -> Any:
        if len(images) == 0:
            return run(images, *more)
        small = images.device.type == "cuda" and len(images) <= RECORDED_SIZES[-1]
        return (recorded if small else any_size)(images, *more)

    return call


def _compile(run: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    """Compiled with the number of images alone left open.

    ``dynamic=True`` leaves more open: the sides of images, and Python's floats, which would be copied to a GPU at each
    call.
    """
    from torch._dynamo import maybe_mark_dynamic  # some seconds to import

    own = {"isolate_recompiles": True, "recompile_limit": COMPILATIONS}
    known = {name: value for name, value in own.items() if name in inspect.signature(torch.compile).parameters}
    options: dict[str, Any] = torch._inductor.list_mode_options(mode)
    if "isolate_recompiles" in known:  # else what was compiled for one network would be taken for another
        options |= {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    fast = torch.compile(run, options=options, **known)

    def call(*parts: Any) -> Any:
        for part in parts:
            for tensor in (part,) if isinstance(part, Tensor) else vars(part).values():
                maybe_mark_dynamic(tensor, 0)
        return fast(*parts)

    return call


def in_sizes(run: Callable[..., Any], sizes: Sequence[int]) -> Callable[..., Any]:
    """The same function, called with batches of the given sizes alone: the last image fills a batch up.

    What it gives is copied, because the next call writes to the memory of a CUDA graph again.

    Args:
        run: as of `compiled`.
        sizes: rising; no batch may be larger than the last, or empty.
    """

    @cache
    def places(count: int, device: torch.device) -> Tensor:
        return torch.arange(count, device=device)

    def call(images: Tensor, *more: Any) -> Any:
        """A batch, filled up to the next size."""
        count, device = len(images), images.device
        size = sizes[bisect_left(sizes, count)]
        parts = (images, *more)
        if size > count:
            filled = places(size, device).clamp(max=count - 1)
            parts = tuple(part[filled] for part in parts)
        answer, rows = run(*parts), places(count, device)
        return tuple(part[rows] for part in answer) if isinstance(answer, tuple) else answer[rows]

    return call
