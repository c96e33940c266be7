"""The paper's method, slow and literal: an oracle that shares no code with ``cfvit``.

Steps 1 to 7 of the method for one image at a time, with full attention maps, all fine patches
embedded and all coarse features reused; what is not needed is dropped only then. Weights are read
from a state dict by name. Equation and table numbers are those of the paper (AAAI 2023). `LVViTReference` is the
same for LV-ViT (Jiang et al., NeurIPS 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ReferenceState:
    """The coarse stage's result for a batch.

    Attributes:
        logits: ``[B, classes]``.
        tokens: ``[B, p + N, D]``, class token first, after the final norm.
        embedding: ``[B, N, D]``, with positions, before the first block.
        class_attention: ``[B, N]``, the global class attention (Eq. 9).
    """

    logits: Tensor
    tokens: Tensor
    embedding: Tensor
    class_attention: Tensor


@dataclass(frozen=True)
class Reference:
    """Both stages of a DeiT, perhaps distilled or with registers: ``p`` tokens stand in front of the patches.

    Attributes:
        weights: state dict of a ``CoarseToFineViT``.
        heads: H.
        grid: g, the side of the coarse grid.
        patch: P, the side of a patch in pixels.
        ratio: alpha, as a decimal.
        momentum: beta.
        selection: how cells are chosen, ``"attention"`` or ``"negative"`` (Table 4).
        reuse: ``"mlp"``, or a variant of Table 5.
    """

    weights: Mapping[str, Tensor]
    heads: int
    grid: int
    patch: int
    ratio: float
    momentum: float
    selection: str = field(default="attention", kw_only=True)
    reuse: str = field(default="mlp", kw_only=True)

    epsilon: ClassVar[float] = 1e-6
    """Of every LayerNorm in timm's ViT."""

    def plain(self, images: Tensor) -> Tensor:
        """The backbone alone, on all fine patches: logits ``[B, classes]``."""
        positions = self.weights["backbone.pos_embed"][0]
        front = self._front(positions)
        sequences = [torch.cat([front, p + positions[len(front) :]]) for p in self._embed_patches(images)]
        return torch.stack([self._head(self._network(tokens)[0]) for tokens in sequences])

    def coarse(self, images: Tensor) -> ReferenceState:
        """Steps 1 to 3 (Eqs. 5 to 9): images ``[B, 3, S, S]``."""
        half = self.grid * self.patch
        small = F.interpolate(images, size=(half, half), mode="bilinear", align_corners=True)
        positions = self.weights["coarse_pos_embed"][0]
        results = []
        for patches in self._embed_patches(small):
            front = self._front(positions)
            embedding = torch.stack([patch + positions[len(front) + i] for i, patch in enumerate(patches)])
            tokens, maps = self._network(torch.cat([front, embedding]))
            results.append((self._head(tokens), tokens, embedding, self._global_class_attention(maps)))
        return ReferenceState(*(torch.stack(column) for column in zip(*results, strict=True)))

    def fine(self, images: Tensor, state: ReferenceState) -> Tensor:
        """Steps 4 to 7 (Eqs. 10 to 13): logits ``[B, classes]``."""
        return torch.stack([self._head(tokens) for tokens in self.fine_sequences(images, state)])

    def fine_sequences(self, images: Tensor, state: ReferenceState) -> list[Tensor]:
        """Each image's mixed sequence after the final norm, cell by cell: ``[p + 4k + N - k, D]``."""
        sequences = []
        for i, patches in enumerate(self._embed_patches(images)):
            informative = self.informative(state.class_attention[i])
            tokens = self._fine_tokens(patches, state.embedding[i], informative)
            if self.reuse != "none":
                tokens = tokens + self._reused_features(state.tokens[i], informative)
            sequences.append(self._network(tokens)[0])
        return sequences

    def _front(self, positions: Tensor) -> Tensor:
        """Class token, distillation token, registers, as far as there are any, each at its position: ``[p, D]``."""
        names = ("backbone.cls_token", "backbone.dist_token", "backbone.reg_token")
        tokens = torch.cat([self.weights[name][0] for name in names if name in self.weights])
        return torch.stack([token + positions[i] for i, token in enumerate(tokens)])

    def _embed_patches(self, images: Tensor) -> Tensor:
        """All patches of images, row by row: ``[B, 3, h, w] -> [B, patches, D]``."""
        maps = self._project(images, self.patch)
        rows, columns = maps.shape[2:]
        return torch.stack([maps[:, :, y, x] for y in range(rows) for x in range(columns)], dim=1)

    def _project(self, images: Tensor, stride: int) -> Tensor:
        name = "backbone.patch_embed.proj"
        return F.conv2d(images, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride=stride)

    def _network(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Blocks and final norm, ``[T, D] -> [T, D]``, and each block's attention ``[H, T, T]``."""
        maps = []
        depth = sum(name.endswith(".attn.qkv.weight") for name in self.weights)
        for k in range(depth):
            name = f"backbone.blocks.{k}"
            update, attention = self._attend(f"{name}.attn", self._norm(f"{name}.norm1", tokens))
            tokens = self._residual(tokens, update)
            tokens = self._residual(tokens, self._mlp(f"{name}.mlp", self._norm(f"{name}.norm2", tokens)))
            maps.append(attention)
        return self._norm("backbone.norm", tokens), maps

    def _residual(self, tokens: Tensor, update: Tensor) -> Tensor:
        return tokens + update

    def _attend(self, name: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``softmax(Q K^T / sqrt(d)) V`` of each head (Eq. 1), and the maps ``[H, T, T]``."""
        query, key, value = self._queries_keys_values(f"{name}.qkv", tokens).chunk(3, dim=-1)
        width = query.shape[-1] // self.heads
        outputs, maps = [], []
        for head in range(self.heads):
            own = slice(head * width, (head + 1) * width)
            attention = torch.softmax(query[:, own] @ key[:, own].T / math.sqrt(width), dim=-1)
            outputs.append(attention @ value[:, own])
            maps.append(attention)
        return self._linear(f"{name}.proj", torch.cat(outputs, dim=-1)), torch.stack(maps)

    def _queries_keys_values(self, name: str, tokens: Tensor) -> Tensor:
        return self._linear(name, tokens)

    def _global_class_attention(self, maps: list[Tensor]) -> Tensor:
        """Eq. 9 from the 4th encoder on, heads averaged: ``[N]``."""
        cells = self.grid**2
        average = torch.zeros(cells, dtype=maps[0].dtype)
        for k, attention in enumerate(maps, start=1):
            if k >= 4:
                row = sum(attention[head, 0, -cells:] for head in range(self.heads)) / self.heads
                average = self.momentum * average + (1 - self.momentum) * row
        return average

    def informative(self, class_attention: Tensor) -> list[int]:
        """The ``ceil(alpha * N)`` cells of highest global class attention (Eq. 10), or of lowest (Table 4)."""
        scores = class_attention.tolist()
        count = math.ceil(Fraction(str(self.ratio)) * len(scores))
        sign = {"attention": -1, "negative": 1}[self.selection]
        return sorted(range(len(scores)), key=lambda cell: sign * scores[cell])[:count]

    def _fine_tokens(self, patches: Tensor, embedding: Tensor, informative: list[int]) -> Tensor:
        """The mixed sequence (Eq. 11), cell by cell: ``[p + 4k + N - k, D]``."""
        positions = self.weights["backbone.pos_embed"][0]
        front = self._front(positions)
        tokens = list(front)
        for cell in range(self.grid**2):
            if cell not in informative:
                tokens.append(embedding[cell])
                continue
            row, column = divmod(cell, self.grid)
            for down in (0, 1):
                for right in (0, 1):
                    child = (2 * row + down) * 2 * self.grid + 2 * column + right
                    tokens.append(patches[child] + positions[len(front) + child])
        return torch.stack(tokens)

    def _reused_features(self, coarse_tokens: Tensor, informative: list[int]) -> Tensor:
        """Feature reuse (Eq. 12), zero for class token and uninformative cells but in Table 5; as `_fine_tokens`."""
        normed = self._norm("feature_reuse.norm", coarse_tokens)
        transform = self._linear if self.reuse == "linear" else self._mlp
        features = transform("feature_reuse.mlp", normed)
        zero = torch.zeros_like(features[0])
        front = len(features) - self.grid**2
        reused = [zero] * front
        if self.reuse == "class_token":
            reused[0] = features[0]
        for cell in range(self.grid**2):
            own = features[front + cell]
            if cell in informative:
                reused += [own] * 4
            else:
                reused += [own if self.reuse == "uninformative" else zero]
        return torch.stack(reused)

    def _head(self, tokens: Tensor) -> Tensor:
        """Logits from the class token, of a distilled DeiT averaged with its second: ``[T, D] -> [classes]``."""
        logits = self._linear("backbone.head", tokens[0])
        if "backbone.head_dist.weight" in self.weights:
            logits = (logits + self._linear("backbone.head_dist", tokens[1])) / 2
        return logits

    def _mlp(self, name: str, tokens: Tensor) -> Tensor:
        return self._linear(f"{name}.fc2", F.gelu(self._linear(f"{name}.fc1", tokens)))

    def _linear(self, name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, tokens: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(tokens, weight.shape, weight, bias, self.epsilon)


@dataclass(frozen=True)
class LVViTReference(Reference):
    """Both stages of an LV-ViT, as its authors and those of CF-ViT compute them, in evaluation mode.

    Attributes:
        skip_lam: what each residual branch is divided by.
    """

    skip_lam: float

    epsilon: ClassVar[float] = 1e-5
    """Of every LayerNorm, and of the stem's batch norms: PyTorch's default."""

    def coarse(self, images: Tensor) -> ReferenceState:
        """As DeiT's, but for logits divided by 1 + 0.25; the authors leave the fine ones as they are."""
        state = super().coarse(images)
        return replace(state, logits=state.logits / 1.25)

    def class_answer(self, tokens: Tensor) -> Tensor:
        """Logits of the class token alone: ``[1 + T, D] -> [classes]``."""
        return super()._head(tokens)

    def token_answers(self, tokens: Tensor) -> Tensor:
        """Logits of each patch token: ``[1 + T, D] -> [T, classes]``."""
        return self._linear("backbone.aux_head", tokens[1:])

    def _head(self, tokens: Tensor) -> Tensor:
        return self.class_answer(tokens) + 0.25 * self.token_answers(tokens).max(dim=0).values

    def _project(self, images: Tensor, stride: int) -> Tensor:
        """Convolutions of 7 pixels at stride 2, of 3, of 3; then a patch is half as many places of their result."""
        for i, (side, step) in enumerate(((7, 2), (3, 1), (3, 1)), start=1):
            name = "backbone.patch_embed"
            images = F.conv2d(images, self.weights[f"{name}.conv{i}.weight"], stride=step, padding=side // 2)
            images = torch.relu(self._batch_norm(f"{name}.bn{i}", images))
        return super()._project(images, stride // 2)

    def _batch_norm(self, name: str, maps: Tensor) -> Tensor:
        """With the statistics of training: ``[B, C, h, w]``."""
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (self.weights[f"{name}.{part}"][:, None, None] for part in parts)
        return (maps - mean) / torch.sqrt(variance + self.epsilon) * weight + bias

    def _residual(self, tokens: Tensor, update: Tensor) -> Tensor:
        return tokens + update / self.skip_lam

    def _queries_keys_values(self, name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weights[f"{name}.weight"])
