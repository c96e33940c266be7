"""The same network, faster: matrix products by oneDNN, compilation for batches of any size, copies that do not wait."""

from __future__ import annotations

import copy
import inspect
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from timm.layers import GELU, Mlp
from torch import Tensor, nn

WORTHWHILE = 1.1
"""How many times faster a stand-in must be on this processor to be used."""

FEWEST_WEIGHTS = 2**15
"""Smaller layers are left as they are: calling them takes longer than multiplying."""

Network = TypeVar("Network", bound=nn.Module)


_OPERATORS = torch.library.Library("cfvit", "DEF")
_OPERATORS.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, SymInt out_features, bool gelu) -> Tensor")


@torch.library.impl(_OPERATORS, "packed_linear", "CompositeExplicitAutograd")
def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, gelu: bool) -> Tensor:
    """An operator of our own, as torch.compile takes torch's for constant weights alone."""
    name, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


@torch.library.register_fake("cfvit::packed_linear", lib=_OPERATORS)
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class PackedLinear(nn.Module):
    """A linear layer in float32 whose weights lie as oneDNN wants them, for inference on a CPU.

    torch gives such layers to MKL, which on processors of other makers than Intel uses half of their
    vector units; oneDNN uses all.

    Args:
        linear: the layer to stand in for.
        gelu: apply GELU to what comes out, in the same pass.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()  # as it was: timm multiplies by some layers' weights without calling them
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.cfvit.packed_linear.default(x, self.packed, self.bias, self.out_features, self.gelu)


class ConvolvedLinear(nn.Module):
    """A linear layer computed as a 1 x 1 convolution, forwards and backwards, for training on a CPU.

    torch gives convolutions to oneDNN, if more than one thread computes; see `PackedLinear`. The parameters are those
    of the layer that it stands in for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # an image of one column, channels last
        out = F.conv2d(rows, self.weight[..., None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def placed(images: Tensor, weight: Tensor) -> Tensor:
    """Images on the device and in the precision of a weight; from pinned memory nothing waits for the copy to a GPU.

    They are converted there: on the way torch would convert them on the host first, into memory that is not pinned.
    """
    overlaps = weight.device.type != "cpu"  # what the CPU reads at once has to be there
    there = images.to(weight.device, non_blocking=overlaps)
    return there.to(weight.dtype) if images.is_floating_point() else there  # integers are to be refused, not converted


def copied_ahead(batches: Iterable[Tensor], weight: Tensor) -> Iterator[Tensor]:
    """Batches of images as `placed` gives them; each is copied to a GPU while the one before it is computed on.

    For that a batch is asked for before the one in front of it is given, so this is not for images that come one by one
    and are waited for, nor for a source that fills the same pinned memory again. If the source raises, what came before
    is given first. On a CPU nothing is copied or asked for early.
    """
    if weight.device.type != "cuda":
        yield from (placed(batch, weight) for batch in batches)
        return
    beside = torch.cuda.Stream(weight.device)

    def copy_beside(batch: Tensor) -> tuple[Tensor, Any]:
        if batch.device.type == "cpu":
            batch = batch.pin_memory()
        else:
            beside.wait_stream(torch.cuda.current_stream(weight.device))  # which may still be writing it
            batch.record_stream(beside)
        with torch.cuda.stream(beside):
            return placed(batch, weight), beside.record_event()

    copies, failure = map(copy_beside, batches), None
    following = next(copies, None)
    while following is not None:
        images, done = following
        try:
            following = next(copies, None)
        except Exception as error:
            following, failure = None, error
        computing = torch.cuda.current_stream(weight.device)
        computing.wait_event(done)
        images.record_stream(computing)  # its memory is not to be filled again before it was computed on
        yield images
    if failure is not None:
        raise failure


RECORDED_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Batches of which a GPU's launches are recorded: small ones, where launching may take longer than computing."""

COMPILATIONS = 64
"""How often torch may compile one function anew, where it can be told; beyond that it would go on in eager mode, as it
does in a process that compiles 256 times what has the same code, such as predictors of many models."""


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function of batches, for any number of images.

    On a GPU batches of up to the last of `RECORDED_SIZES` are filled up to the next of them, and their launches
    recorded as a CUDA graph, by torch's ``reduce-overhead``: the first two batches of each size wait for that, in each
    thread of its own.

    Args:
        run: takes what an index picks images of, tensors and a ``CoarseState``, and gives one such thing or a tuple. Of
            the networks that it calls, weights may be written to and nothing else may change: torch would check every
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

    ``dynamic=True`` leaves more open: the sides of images, and Python's floats, which would come to a GPU from the host
    at each call.
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

    What it gives is copied, as the memory of a CUDA graph is written to again by the next call.

    Args:
        run: as of `compiled`.
        sizes: rising; no batch may be larger than the last, or empty.
    """

    @cache
    def places(count: int, device: torch.device) -> Tensor:
        return torch.arange(count, device=device)

    def call(images: Tensor, *more: Any) -> Any:
        """Fills the batch up, runs it, and gives the answers of the images that came."""
        count, device = len(images), images.device
        size = sizes[bisect_left(sizes, count)]
        parts = (images, *more)
        if size > count:
            filled = places(size, device).clamp(max=count - 1)
            parts = tuple(part[filled] for part in parts)
        answer, rows = run(*parts), places(count, device)
        return tuple(part[rows] for part in answer) if isinstance(answer, tuple) else answer[rows]

    return call


_ROWS = 50
"""For how many rows of input oneDNN lays out the weights: those of one coarse image. It is a twentieth faster for them
than a layout for 1,024 rows, and loses nothing by more; any number may come."""


def accelerate(network: Network) -> Network:
    """The network for inference on its own device, with the same answers up to rounding.

    On a CPU and in float32, a copy in which linear layers are packed for oneDNN, if a trial of some
    milliseconds, once in a process, finds that this pays on this processor; elsewhere the network itself. The
    copy is in evaluation mode and shares all other weights with the original; it must be made anew after training
    has changed them, and is not for autocast.
    """
    return _twin(network, PackedLinear).eval() if is_copied(network) else network


def is_copied(network: nn.Module) -> bool:
    """Whether `accelerate` makes a copy of it."""
    return _is_float32_on_a_cpu(network) and packing_pays()


def accelerate_training(network: Network) -> Network:
    """The network for training on its own device, with the same gradients up to rounding.

    On a CPU and in float32, a copy with all parameters and buffers of the original in which linear layers run as
    convolutions, if a trial as of `accelerate` finds that this pays; elsewhere the network itself.
    """
    return _twin(network, ConvolvedLinear) if _is_float32_on_a_cpu(network) and convolving_pays() else network


def _is_float32_on_a_cpu(network: nn.Module) -> bool:
    parameter = next(network.parameters(), None)
    return parameter is not None and parameter.device.type == "cpu" and parameter.dtype == torch.float32


def _twin(module: Any, stand_in: Callable[[nn.Linear], nn.Module]) -> Any:
    """A copy of the tree of modules that shares their tensors, with something else in the place of linear layers."""
    if _is_worth_packing(module):
        return stand_in(module)
    twin = copy.copy(module)
    children = module._modules.items()
    twin._modules = {name: _twin(child, stand_in) if child is not None else None for name, child in children}
    fuses = stand_in is PackedLinear and type(module) is Mlp
    if fuses and _is_worth_packing(module.fc1) and _is_exact_gelu(module.act):
        twin._modules |= {"fc1": PackedLinear(cast(nn.Linear, module.fc1), gelu=True), "act": nn.Identity()}
    return twin


def _is_worth_packing(module: nn.Module) -> bool:
    usual = type(module) is nn.Linear and type(module.weight) is nn.Parameter and not _is_hooked(module)
    return usual and cast(nn.Linear, module).weight.numel() >= FEWEST_WEIGHTS


def _is_hooked(module: nn.Module) -> bool:
    """Whether something listens to it, or makes its weights when it is called, as torch's pruning does."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_exact_gelu(activation: nn.Module) -> bool:
    usual = type(activation) in (nn.GELU, GELU) and not _is_hooked(activation)
    return usual and getattr(activation, "approximate", "none") == "none"


@cache
def packing_pays() -> bool:
    """Whether oneDNN multiplies matrices of a ViT's size notably faster than torch's default here."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    linear, rows = _trial()
    packed = PackedLinear(linear)
    with torch.inference_mode():
        return _quickest(lambda: linear(rows)) > WORTHWHILE * _quickest(lambda: packed(rows))


@cache
def convolving_pays() -> bool:
    """Whether linear layers train notably faster as convolutions here."""
    if not torch.backends.mkldnn.is_available():
        return False
    linear, rows = _trial()
    convolved, rows = ConvolvedLinear(linear), rows.requires_grad_()
    with torch.enable_grad():
        usual = _quickest(lambda: torch.autograd.grad(linear(rows).sum(), (rows, linear.weight)))
        return usual > WORTHWHILE * _quickest(lambda: torch.autograd.grad(convolved(rows).sum(), (rows, linear.weight)))


def _trial() -> tuple[nn.Linear, Tensor]:
    """A layer and its input, of the size that a ViT has."""
    with torch.random.fork_rng(devices=[]):  # a trial is not to change what a seed gives
        exact: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are
        return nn.Linear(384, 1536, **exact), torch.randn(1024, 384, **exact)


def _quickest(call: Callable[[], object], times: int = 8) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
