"""The engine that runs torch: packed for a processor, recorded on a GPU, compiled, or the model as it is."""

from __future__ import annotations

import inspect
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cfvit.errors import CfvitError
from cfvit.inference.engines.packing import accelerate, frozen
from cfvit.modeling.model import CoarseState, CoarseToFineViT

COMPILED_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Batches of compiled code whose launches on a GPU are recorded: small ones, where launching may take longer than
computing."""

RECORDED_SIZES = (*COMPILED_SIZES, 96, 128, 192, 256)
"""The same for code that is not compiled, with more and smaller kernels to launch."""

COMPILATIONS = 64
"""How often torch may compile one function anew, where this can be set; beyond that it goes on in eager mode. Older
torch does so after 256 compilations of the same code in a process, such as those of many models' predictors."""

Stages = tuple[Callable[[Tensor], tuple[CoarseState, Tensor]], Callable[[Tensor, CoarseState], tuple[Tensor, Tensor]]]


class TorchEngine:
    """Both stages of a model in torch, with the weights, modules and exit rule that it has now.

    Args:
        model: is left as it is. What becomes of it later is not followed: make a new engine.
        compile: as of `cfvit.Predictor`.

    Raises:
        CfvitError: another value of ``compile``.
    """

    def __init__(self, model: CoarseToFineViT, compile: bool | None = None) -> None:
        if compile not in (None, True, False):
            raise CfvitError(f"compile is {compile!r}: give True, False, or None for what suits the device")
        self.model, self.compile = frozen(model), compile
        self.weight = next(self.model.parameters())
        self._plain = self._stages_of(self.model)
        self._packed = self._plain if compile is False else self._stages_of(accelerate(self.model))

    def _stages_of(self, network: CoarseToFineViT) -> Stages:
        rule = self.model.exit

        def coarse(images: Tensor) -> tuple[CoarseState, Tensor]:
            state = network.coarse(images)
            return state, rule.coarse(state.logits)

        def fine(images: Tensor, state: CoarseState) -> tuple[Tensor, Tensor]:
            logits = network.fine(images, state)
            return logits, rule.fine(logits)

        faster = compiled if self.compile else recorded if self.compile is None else lambda run: run
        return faster(coarse), faster(fine)

    def _stages(self) -> Stages:
        return self._plain if torch.is_autocast_enabled("cpu") else self._packed  # oneDNN's layers are in float32

    def coarse(self, images: Tensor) -> tuple[CoarseState, Tensor]:
        """The coarse stage and its confidence, see `cfvit.inference.engines.Engine`."""
        return self._stages()[0](images)

    def fine(self, images: Tensor, state: CoarseState) -> tuple[Tensor, Tensor]:
        """The fine stage and its confidence, see `cfvit.inference.engines.Engine`."""
        return self._stages()[1](images, state)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what was packed or compiled, which is made anew from the weights."""
        return TorchEngine, (self.model, self.compile)


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function of batches, for any number of images.

    On a GPU, batches of up to the last of `COMPILED_SIZES` are filled up to the next of these sizes, and their launches
    are recorded as a CUDA graph, by torch's ``reduce-overhead``. The first two batches of each size wait for that, in
    each thread of its own.

    Args:
        run: takes what an index picks images of, tensors and states, and gives one such thing or a tuple. Of the
            networks that it calls, weights may be written to and nothing else may change. torch would check every
            module at each call, which for one image on a CPU takes half as long as a block of DeiT-S (0.6 ms).
    """
    any_size = _compile(run)
    sized = in_sizes(_compile(run, "reduce-overhead"), COMPILED_SIZES)

    def call(images: Tensor, *more: Any) -> Any:
        if len(images) == 0:
            return run(images, *more)
        small = images.device.type == "cuda" and len(images) <= COMPILED_SIZES[-1]
        return (sized if small else any_size)(images, *more)

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
        for tensor in _tensors_of(parts):
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


def recorded(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of batches; on a GPU, all launches of a small one are replayed at once.

    Batches of up to the last of `RECORDED_SIZES` are filled up to the next of these. The first batch of a size runs as
    it is, the second is recorded as a CUDA graph, and from then on that is replayed; so in each thread of its own.
    Weights may be written to meanwhile. What waits for the GPU cannot be recorded, such as an answer whose shape
    depends on the images, and runs as it is; so do calls with gradients, under autocast, or within somebody else's
    recording.

    Args:
        run: as of `compiled`.
    """
    of_thread = threading.local()

    def replay(*parts: Any) -> Any:
        """Answers a batch of a recorded size, by this thread's own recording from its second call on."""
        known: dict[str, Callable[..., Any] | None] = vars(of_thread)
        mode = torch.is_inference_mode_enabled()  # what is kept in it cannot be written to without
        kind = str([mode, *((tensor.shape, tensor.dtype, tensor.device) for tensor in _tensors_of(parts))])
        if kind not in known:
            known[kind] = None
            return run(*parts)
        replayed = known[kind] = known[kind] or _record(run, parts)
        return replayed(*parts)

    filled = in_sizes(replay, RECORDED_SIZES)

    def call(images: Tensor, *more: Any) -> Any:
        """Answers a batch, by a recording where one is possible."""
        as_it_is = (
            not images.is_cuda
            or not 0 < len(images) <= RECORDED_SIZES[-1]
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
