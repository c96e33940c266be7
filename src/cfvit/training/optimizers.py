"""Optimisers: timm's, each where it runs as fast as it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm.optim.muon
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from cfvit.errors import CfvitError, first_line
from cfvit.training.recipe import Recipe


def create_optimizer(recipe: Recipe, trainable: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Timm's optimiser; of a hybrid one such as Muon, AdamW takes the embeddings and the head.

    Raises:
        CfvitError: timm has none of that name.
    """
    one_pass: dict[str, Any] = {"fused": True} if recipe.optimizer == "adamw" else {}
    try:
        return create_optimizer_v2(
            trainable,
            opt=recipe.optimizer,
            lr=lr,
            weight_decay=recipe.weight_decay,
            fallback_no_weight_decay=True,
            fallback_list=("*head.weight", "*patch_embed.*"),
            **one_pass,
        )
    except ValueError as error:
        raise CfvitError(
            f"optimizer {recipe.optimizer!r}: {first_line(error)}; give one of timm's, such as adamw"
        ) from error


def resume_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes over the state of a run's optimiser; whether it updates in one pass is no part of that."""
    one_pass = {"fused": optimizer.defaults["fused"]} if "fused" in optimizer.defaults else {}
    groups = [{**group, **one_pass} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


@contextmanager
def orthogonalising_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within it, Muon's matrix products on a CPU that trains in float32 are computed in that.

    timm computes them in bfloat16, as suits a GPU, and has no option for it. A CPU without instructions for
    that takes several times as long for Muon as for all the rest of a step. Not for threads that train side by
    side: timm's function is exchanged for all of them.
    """
    if device.type != "cpu" or dtype is not torch.float32:
        yield
        return
    usual = timm.optim.muon.zeropower_via_newtonschulz
    timm.optim.muon.zeropower_via_newtonschulz = partial(usual, dtype=torch.float32)
    try:
        yield
    finally:
        timm.optim.muon.zeropower_via_newtonschulz = usual
