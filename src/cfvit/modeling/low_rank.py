"""Weights of the coarse stage's own: low-rank matrices added to those that both stages share.

Where one set of weights has to answer at two scales, what the coarse stage learns disturbs the fine one. With a rank
above 0 (``ModelConfig.coarse_rank``) it does not: to each matrix ``W`` of blocks and head the coarse stage adds its own
``U V`` of that rank (LoRA; Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022), it has norms
and biases of its own, and leaves ``W`` as the fine stage trains it. Inference computes with the sums, at no cost.
"""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class LowRankLinear(nn.Module):
    """``[..., in] -> [..., out]`` by the weight of another layer, which it does not train, plus ``up @ down``.

    Args:
        shared: the other layer. It begins with the same answers, and with a copy of its bias.
        rank: of the matrix that is added. Its first factor is drawn so that a step of Adam changes the sum about as
            much as it would change the weight itself.
    """

    def __init__(self, shared: nn.Linear, rank: int) -> None:
        super().__init__()
        self._shared = (shared,)  # in a tuple it is no module of this one, whose weights would be saved twice
        self.down = nn.Parameter(torch.randn(rank, shared.in_features).to(shared.weight) / math.sqrt(rank))
        self.up = nn.Parameter(shared.weight.new_zeros(shared.out_features, rank))
        self.bias = None if shared.bias is None else nn.Parameter(shared.bias.detach().clone())

    @property
    def shared(self) -> nn.Linear:
        """The layer whose weight it adds to."""
        return self._shared[0]

    @property
    def weight(self) -> Tensor:
        """The sum, ``[out, in]``."""
        return self.shared.weight.detach() + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def learn(self, weight: Tensor) -> None:
        """Makes the sum as near to a weight ``[out, in]`` as the rank allows, in least squares."""
        rank = self.down.shape[0]
        left, values, right = torch.linalg.svd((weight - self.shared.weight).float(), full_matrices=False)
        kept = values[:rank].sqrt()
        self.up.zero_()[:, : len(kept)] = left[:, :rank] * kept
        self.down.zero_()[: len(kept)] = kept[:, None] * right[:rank]

    def summed(self) -> nn.Linear:
        """An ordinary layer with the sum as its weight."""
        linear = copy.copy(self.shared)
        linear._parameters = {"weight": nn.Parameter(self.weight.detach(), requires_grad=False), "bias": self.bias}
        return linear


def own_layers(backbone: Any, rank: int) -> Any:
    """What the coarse stage has in the place of a backbone's blocks, norms and head: copies with `LowRankLinear`.

    It can be read as the backbone is, but for patches, positions and extra tokens, which it lacks.
    """
    twin = copy.deepcopy(backbone)
    for shared in ("patch_embed", "rope"):
        twin._modules.pop(shared, None)
    twin._parameters.clear()
    twin._buffers.clear()
    for name, layer in list(twin.named_modules()):
        if type(layer) is nn.Linear:
            twin.set_submodule(name, LowRankLinear(backbone.get_submodule(name), rank))
    return twin


def summed(network: Network) -> Network:
    """The network with ordinary layers in the place of `LowRankLinear`: a copy that shares all other tensors.

    A network without any is given back as it is.
    """
    if not any(isinstance(layer, LowRankLinear) for layer in network.modules()):
        return network
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, LowRankLinear):
            twin.set_submodule(name, layer.summed())
    return twin
