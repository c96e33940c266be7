"""The same network, faster on a CPU: matrix products by oneDNN, for inference and for training."""

from __future__ import annotations

import copy
import time
import timeit
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from timm.layers import GELU, Mlp
from torch import Tensor, nn

WORTHWHILE = 1.1
"""How many times faster a replacement must be on this processor to be used."""

FEWEST_WEIGHTS = 2**15
"""Smaller layers stay as they are: calling them takes longer than multiplying."""

ROWS = 50
"""For how many rows of input oneDNN lays out the weights: those of one coarse image. It is a twentieth faster for them
than a layout for 1,024 rows, and loses nothing with more. Any number of rows is allowed."""

Network = TypeVar("Network", bound=nn.Module)

_OPERATORS = torch.library.Library("cfvit", "DEF")
_OPERATORS.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, SymInt out_features, bool gelu) -> Tensor")


@torch.library.impl(_OPERATORS, "packed_linear", "CompositeExplicitAutograd")
def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, gelu: bool) -> Tensor:
    """An operator of our own, because torch.compile takes torch's operator for constant weights alone."""
    name, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


@torch.library.register_fake("cfvit::packed_linear", lib=_OPERATORS)
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class PackedLinear(nn.Module):
    """A linear layer in float32 with its weights in oneDNN's layout, for inference on a CPU.

    torch gives such layers to MKL, which on processors of other makers than Intel uses half of their
    vector units; oneDNN uses all.

    Args:
        linear: the layer that it replaces.
        gelu: apply GELU to the result, in the same pass.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()  # as it was: timm multiplies by some layers' weights without calling them
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.cfvit.packed_linear.default(x, self.packed, self.bias, self.out_features, self.gelu)


class ConvolvedLinear(nn.Module):
    """A linear layer computed as a 1 x 1 convolution, forwards and backwards, for training on a CPU.

    torch gives convolutions to oneDNN, if more than one thread computes; see `PackedLinear`. The parameters are those
    of the layer that it replaces.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # an image of one column, channels last
        out = F.conv2d(rows, self.weight[..., None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def accelerate(network: Network) -> Network:
    """The network for inference on its own device, with the same answers up to rounding.

    On a CPU and in float32, a copy in which linear layers are packed for oneDNN, if a trial of some
    milliseconds, once in a process, finds that this pays on this processor; elsewhere the network itself. The
    copy is in evaluation mode and shares all other weights with the original. Make a new one after the weights have
    changed. It is not for autocast.
    """
    return _twin(network, PackedLinear).eval() if _is_float32_on_a_cpu(network) and packing_pays() else network


def accelerate_training(network: Network) -> Network:
    """The network for training on its own device, with the same gradients up to rounding.

    On a CPU and in float32, a copy with all parameters and buffers of the original in which linear layers run as
    convolutions, if a trial as of `accelerate` finds that this pays; elsewhere the network itself.
    """
    return _twin(network, ConvolvedLinear) if _is_float32_on_a_cpu(network) and convolving_pays() else network


def frozen(network: Network) -> Network:
    """The network as it is now, in evaluation mode: a copy that shares the memory of its weights.

    Its modules and parameters are its own. So it stays in evaluation mode, with its layers and on its device, whatever
    becomes of the original.
    """
    twin = _twin(network)
    for module in twin.modules():
        module._buffers = dict(module._buffers)
        module._parameters = {
            name: None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
            for name, parameter in module._parameters.items()
        }
    return twin.eval()


def _is_float32_on_a_cpu(network: nn.Module) -> bool:
    parameter = next(network.parameters(), None)
    return parameter is not None and parameter.device.type == "cpu" and parameter.dtype == torch.float32


def _twin(module: Any, replacement: Callable[[nn.Linear], nn.Module] | None = None) -> Any:
    """A copy of the tree of modules that shares their tensors, with other layers in the place of linear ones."""
    if replacement is not None and _is_worth_packing(module):
        return replacement(module)
    twin = copy.copy(module)
    children = module._modules.items()
    twin._modules = {name: None if child is None else _twin(child, replacement) for name, child in children}
    if replacement is PackedLinear and type(module) is Mlp and _is_worth_packing(module.fc1):
        exact = type(module.act) in (nn.GELU, GELU) and getattr(module.act, "approximate", "none") == "none"
        if exact and not _is_hooked(module.act):
            twin._modules |= {"fc1": PackedLinear(cast(nn.Linear, module.fc1), gelu=True), "act": nn.Identity()}
    return twin


def _is_worth_packing(module: nn.Module) -> bool:
    usual = type(module) is nn.Linear and type(module.weight) is nn.Parameter and not _is_hooked(module)
    return usual and cast(nn.Linear, module).weight.numel() >= FEWEST_WEIGHTS


def _is_hooked(module: nn.Module) -> bool:
    """Whether something listens to it, or makes its weights when it is called, as torch's pruning does."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
    with torch.random.fork_rng(devices=[]):  # a trial must not change what a seed gives
        exact: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are
        return nn.Linear(384, 1536, **exact), torch.randn(1024, 384, **exact)


def _quickest(call: Callable[[], object]) -> float:
    """In seconds of this thread's processor time, which leaves out what else the machine does meanwhile."""
    return min(timeit.repeat(call, number=1, repeat=8, timer=time.thread_time))
