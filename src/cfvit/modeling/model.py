"""The coarse-to-fine vision transformer: configuration, feature reuse and the two stages.

The two stages meet in a `CoarseState`; nothing is kept on the module between calls::

    state = model.coarse(images)
    hard = state.confidence < 0.5
    logits = model.fine(images[hard], state[hard])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from cfvit.errors import CfvitError, UsageError
from cfvit.modeling import backbones, timm_vit
from cfvit.modeling.batches import Rows, check_images
from cfvit.modeling.config import ModelConfig, Preprocessing, Reuse, Selection
from cfvit.modeling.exit import Exit, HasExit, confidence_of
from cfvit.modeling.tokens import (
    accumulate_attention,
    child_positions,
    coarse_image,
    gather_tokens,
    mirrored_sources,
    num_informative,
    rank_cells,
    repeat_for_children,
    score_cells,
)
from cfvit.modeling.weights import Weights, read_weights

FIRST_ATTENTION_BLOCK = 3
"""The global class attention begins at the 4th block: earlier rows are unstable (Fig. 1a)."""


@dataclass(eq=False)
class CoarseState(Rows):
    """What the coarse stage knows of a batch, and all that the fine stage needs of it.

    Index it like a tensor along the batch: ``state[hard]`` with a mask, indices or a slice.

    Attributes:
        logits: ``[B, classes]``, the coarse answer.
        tokens: ``[B, N, D]``, patch tokens after the final norm, for feature reuse.
        embedding: ``[B, N, D]``, patch tokens before the first block, for cells that are not split.
        class_attention: ``[B, N]``, global class attention in float32 (Eq. 9), by which cells are ranked; of
            a model with another `Selection`, what it ranks them by.
        class_token: ``[B, D]``, after the final norm.
    """

    logits: Tensor
    tokens: Tensor
    embedding: Tensor
    class_attention: Tensor
    class_token: Tensor

    @property
    def confidence(self) -> Tensor:
        """The highest softmax probability of each image, as in the paper: ``[B]`` in float32, -1 where not a number.

        A model may have been calibrated for another measure: see ``model.exit.coarse(state.logits)``.
        """
        return confidence_of(self.logits)


class CoarseToFineOutput(NamedTuple):
    """Logits of both stages for every image, each ``[B, classes]``."""

    coarse: Tensor
    fine: Tensor


class TokenOutput(NamedTuple):
    """What training with token labels needs of a batch: answers of the class token and of each patch token."""

    coarse: Tensor  # the coarse class token's logits, ``[B, classes]``
    fine: Tensor  # the fine class token's logits, ``[B, classes]``
    tokens: Tensor  # the auxiliary head's logits for the fine sequence, ``[B, 4k + N - k, classes]``
    informative: Tensor  # the cells of the first ``4k`` tokens, ``[B, k]``
    others: Tensor  # the cells of the rest, ``[B, N - k]``


class FeatureReuse(nn.Module):
    """LayerNorm and an MLP on the coarse stage's output tokens (Fig. 4): ``[B, n, D] -> [B, n, D]``.

    Args:
        hidden: channels inside the MLP; None puts one linear layer in its place (Table 5).
    """

    def __init__(self, dim: int, hidden: int | None, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Linear(dim, dim) if hidden is None else Mlp(dim, hidden)
        for layer in self.mlp.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def start_at_zero(self) -> None:
        """Makes the result zero, so that a trained backbone begins with what it knows."""
        last = [layer for layer in self.mlp.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.zeros_(last.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.norm(tokens))


class CoarseToFineViT(HasExit, nn.Module):
    """A ViT that reads an image coarsely, and again with its informative cells split 2 x 2.

    Build one with `create_model` or `cfvit.load`. ``backbone`` is timm's model at the full image
    size; its own position embedding serves the fine stage. All other weights are the position
    embedding of the coarse grid and the feature reuse. Rotations of rotary positions are made once, as
    buffers, unless the backbone learns them.

    Attributes:
        config: the `ModelConfig` it was built from.
        trained: the same with the fine stage that it was trained with, where ``cfvit calibrate --best`` chose another;
            None if its fine stage was not trained.
        data_config: preprocessing in timm's keys (``input_size``, ``mean``, ``std``, ...).
        class_names: a name for each class, or None.
        class_order: of a model without names, how the folders of its classes are numbered: ``"natural"`` or
            ``"torchvision"``; None if that is not known.
        exit: how confidence is measured, at which eta the coarse answer is given, how both are mixed; see `Exit`.
    """

    fine_rotation: Tensor | None
    cell_rotation: Tensor | None

    def __init__(self, config: ModelConfig, pretrained_backbone: backbones.Pretrained = False) -> None:
        super().__init__()
        patch = backbones.patch_size(config.backbone, **config.timm_kwargs)
        self.config = config
        self.trained: ModelConfig | None = config
        self.grid = config.grid
        self.image_size = (2 * self.grid[0] * patch[0], 2 * self.grid[1] * patch[1])
        self.coarse_size = (self.image_size[0] // 2, self.image_size[1] // 2)
        self.backbone = backbones.create_backbone(
            config.backbone,
            img_size=self.image_size,
            num_classes=config.num_classes,
            pretrained=pretrained_backbone,
            **config.timm_kwargs,
        )
        if config.fine_merged and timm_vit.refuses_merging(self.backbone):
            raise UsageError("fine_merged is not for rotary positions, nor for tokens beside class token and patches")
        self.coarse_pos_embed: nn.Parameter | None = None
        if self.backbone.pos_embed is not None:
            positions, fine_grid = self.backbone.pos_embed.detach(), (2 * self.grid[0], 2 * self.grid[1])
            coarse = timm_vit.resample_positions(self.backbone, positions, fine_grid, self.grid)
            self.coarse_pos_embed = nn.Parameter(coarse.clone())
            if pretrained_backbone is False:
                trunc_normal_(self.coarse_pos_embed, std=0.02)
        self.feature_reuse: FeatureReuse | None = None
        if config.feature_reuse != "none":
            hidden = None if config.feature_reuse == "linear" else timm_vit.mlp_width(self.backbone)
            eps = getattr(self.backbone.norm, "eps", 1e-6)
            self.feature_reuse = FeatureReuse(self.backbone.embed_dim, hidden, eps)
        rope: Any = getattr(self.backbone, "rope", None)
        learnt = rope is not None and any(True for _ in rope.parameters())
        fixed = (None, None) if learnt else self._make_rotations()
        for name, rotation in zip(("fine_rotation", "cell_rotation"), fixed, strict=True):
            self.register_buffer(name, rotation, persistent=False)

        self.data_config = {**backbones.data_config_of(self.backbone), "input_size": (3, *self.image_size)}
        self.class_names: list[str] | None = None
        self.class_order: Literal["natural", "torchvision"] | None = None
        self.exit = Exit()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters for optimisers to leave undecayed: positions and extra tokens."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()} | {"coarse_pos_embed"}

    def label_of(self, index: int) -> str:
        """The name of a class, or its number where the model has no names."""
        return self.class_names[index] if self.class_names else str(index)

    def require_trained(self) -> ModelConfig:
        """`trained`.

        Raises:
            CfvitError: the fine stage was not trained, so that no image may go on to it.
        """
        if self.trained is None:
            raise CfvitError(
                "the model's fine stage was never trained: leave its eta at 0, or train both stages (--method cf_vit)"
            )
        return self.trained

    def coarse(self, images: Tensor) -> CoarseState:
        """The first stage: every image at half its side (Eqs. 5 to 9).

        Args:
            images: normalised, ``[B, 3, H, W]`` with ``(H, W) = image_size``, which are halved as the paper does;
                or already of ``coarse_size``, for instance from a JPEG decoded at a part of its size.

        Raises:
            CfvitError: images of another shape.
        """
        backbone, divisor = self.backbone, getattr(self.backbone, "coarse_logit_divisor", None)
        head = backbone.forward_head if divisor is None else lambda tokens: backbone.forward_head(tokens) / divisor
        return self._coarse_state(images, head)

    def _coarse_state(
        self, images: Tensor, head: Callable[[Tensor], Tensor], sources: Tensor | None = None
    ) -> CoarseState:
        """The coarse stage, with ``head`` for what makes its logits of the sequence after the final norm."""
        check_images(images, self.image_size, self.coarse_size)
        backbone, positions = self.backbone, self.coarse_pos_embed
        small = images if images.shape[-2:] == self.coarse_size else coarse_image(images)
        embedding = timm_vit.embed_coarse(backbone, small)
        if sources is not None:
            embedding = embedding[sources, torch.arange(sources.shape[1], device=sources.device)]
        if positions is not None:
            embedding = embedding + timm_vit.patch_positions(backbone, positions)
        prefix = timm_vit.prefix_tokens(backbone, positions).expand(images.shape[0], -1, -1)
        tokens = timm_vit.enter(backbone, torch.cat([prefix, embedding], dim=1))

        depth = len(backbone.blocks)
        first = min(FIRST_ATTENTION_BLOCK, depth - 1)
        _, rotation = self._rotations()
        tokens = timm_vit.run_blocks(backbone, tokens, rotation, first)
        attention = None
        for index in range(first, depth):
            tokens, row = timm_vit.block_with_class_attention(backbone, index, tokens, rotation)
            attention = accumulate_attention(attention, row, self.config.attention_momentum)
        assert attention is not None
        tokens = backbone.norm(tokens)
        scores = score_cells(attention, self.config.selection)
        return CoarseState(head(tokens), tokens[:, backbone.num_prefix_tokens :], embedding, scores, tokens[:, 0])

    def fine(self, images: Tensor, state: CoarseState, *, informative_ratio: float | None = None) -> Tensor:
        """The second stage: informative cells split, the others as the coarse stage saw them (Eqs. 10 to 13).

        Args:
            images: ``[B, 3, H, W]``, those that ``state`` describes, in its order.
            state: from `coarse`, indexed to these images.
            informative_ratio: instead of the configured share, in [0, 1]; 1 splits all cells.

        Returns:
            Logits ``[B, classes]``, mixed with the coarse ones if ``exit.coarse_weight`` says so.

        Raises:
            CfvitError: images of another shape or number than the state's, a ratio out of range.
        """
        check_images(images, self.image_size)
        if images.shape[0] != state.logits.shape[0]:
            raise CfvitError(f"{len(images)} images with the state of {len(state.logits)}: index both alike")
        informative, others = self._choose_cells(state.class_attention, informative_ratio)
        logits = self.backbone.forward_head(self._fine_tokens(images, state, informative, others))
        return self.exit.answer(state.logits, logits)

    def _choose_cells(self, class_attention: Tensor, ratio: float | None) -> tuple[Tensor, Tensor]:
        """Informative cells ``[B, k]`` and the others ``[B, N - k]`` (Eq. 10)."""
        ratio = self.config.informative_ratio if ratio is None else ratio
        if not 0 <= ratio <= 1:
            raise CfvitError(f"informative_ratio is {ratio}: give a share between 0 and 1")
        return rank_cells(class_attention, num_informative(ratio, class_attention.shape[1]))

    def _fine_tokens(
        self, images: Tensor, state: CoarseState, informative: Tensor, others: Tensor, sources: Tensor | None = None
    ) -> Tensor:
        """The mixed sequence after the final norm, ``[B, p + 4k + N - k, D]`` (Eqs. 11 to 13)."""
        backbone, positions = self.backbone, self.backbone.pos_embed
        places = child_positions(informative, self.grid[1])
        sources = None if sources is None else sources.gather(1, informative)
        children = timm_vit.embed_children(backbone, images, informative, sources)
        if positions is not None:
            children = children + gather_tokens(timm_vit.patch_positions(backbone, positions), places)
        prefix = timm_vit.prefix_tokens(backbone, positions).expand(images.shape[0], -1, -1)
        rest = gather_tokens(state.embedding, others)
        if (reuse := self.feature_reuse) is not None:  # Eq. 12, and two variants of Table 5
            children = children + repeat_for_children(reuse(gather_tokens(state.tokens, informative)))
            if self.config.feature_reuse == "uninformative":
                rest = rest + reuse(gather_tokens(state.tokens, others))
            if self.config.feature_reuse == "class_token":
                prefix = torch.cat([prefix[:, :1] + reuse(state.class_token[:, None]), prefix[:, 1:]], dim=1)
        tokens = torch.cat([prefix, children, rest], dim=1)

        fine, cells = self._rotations()
        rotation = timm_vit.join_rotations(
            timm_vit.gather_rotation(fine, places), timm_vit.gather_rotation(cells, others)
        )
        return backbone.norm(self.run_fine(timm_vit.enter(backbone, tokens), rotation))

    def run_fine(self, tokens: Tensor, rotation: Tensor | None) -> Tensor:
        """All blocks on the mixed sequence ``[B, p + T, D]``, merging tokens if asked to; a subclass may drop some.

        Args:
            rotation: of all patches in ``tokens``, where positions are rotary.
        """
        if self.config.fine_merged:
            return timm_vit.run_merging(self.backbone, tokens, self.config.fine_merged)
        return timm_vit.run_blocks(self.backbone, tokens, rotation)

    def _rotations(self) -> tuple[Tensor | None, Tensor | None]:
        """Rotations of all fine patches and of all cells: kept, or from what the backbone has learned. None without."""
        return self._make_rotations() if self.fine_rotation is None else (self.fine_rotation, self.cell_rotation)

    def _make_rotations(self) -> tuple[Tensor | None, Tensor | None]:
        fine = timm_vit.fine_rotation(self.backbone)
        if fine is None:
            return None, None
        cells = torch.arange(self.grid[0] * self.grid[1], device=fine.device)[None]
        return fine, timm_vit.cell_rotation(self.backbone, fine, child_positions(cells, self.grid[1]), self.grid)

    def forward(self, images: Tensor, *, informative_ratio: float | None = None) -> CoarseToFineOutput:
        """Both stages for every image, as in training and in the sweep over thresholds."""
        state = self.coarse(images)
        return CoarseToFineOutput(state.logits, self.fine(images, state, informative_ratio=informative_ratio))

    def forward_tokens(
        self, images: Tensor, *, informative_ratio: float | None = None, mixed: Tensor | None = None
    ) -> TokenOutput:
        """Both stages for every image, with an answer of each token of the fine sequence, for token labels.

        Args:
            images: ``[B, 3, H, W]``.
            informative_ratio: as in `fine`.
            mixed: ``[N]``, True for the cells of image ``b`` that MixToken replaces, right after the patch
                embedding, by those of image ``B - 1 - b``; see `cfvit.modeling.tokens.cells_in_box`.

        Raises:
            CfvitError: a backbone without an auxiliary head, besides what `coarse` and `fine` raise.
        """
        backbone: Any = self.backbone
        if not hasattr(backbone, "token_logits"):
            raise CfvitError(f"{self.config.backbone} has no auxiliary head for its tokens: choose an lvvit backbone")
        if self.config.fine_merged:
            raise CfvitError("tokens that are merged have no labels of their own: train with fine_merged 0")
        sources = None if mixed is None else mirrored_sources(mixed, len(images))
        state = self._coarse_state(images, backbone.class_logits, sources)
        informative, others = self._choose_cells(state.class_attention, informative_ratio)
        fine = self._fine_tokens(images, state, informative, others, sources)
        answers = state.logits, backbone.class_logits(fine), backbone.token_logits(fine)
        return TokenOutput(*answers, informative, others)


def create_model(
    backbone: str,
    *,
    num_classes: int = 1000,
    coarse_grid: int | tuple[int, int] = 7,
    informative_ratio: float = 0.5,
    attention_momentum: float = 0.99,
    selection: Selection = "attention",
    feature_reuse: Reuse = "mlp",
    fine_merged: int = 0,
    pretrained_backbone: backbones.Pretrained = False,
    **timm_kwargs: Any,
) -> CoarseToFineViT:
    """A coarse-to-fine model on a timm ViT.

    All arguments but the last two are the fields of `ModelConfig`.

    Args:
        pretrained_backbone: True for timm's own weights; a file, folder or ``hf-hub:`` name that
            `cfvit.modeling.weights.read_weights` reads, which then also gives the class names and the
            preprocessing, where it says them; or a state dict. The position embedding is resampled for both grids.
        timm_kwargs: passed on to ``timm.create_model`` (``drop_path_rate``, ``depth``, ...).

    Raises:
        CfvitError: an unknown or unsuitable backbone, a value out of range, weights that do not fit.
    """
    config = ModelConfig(
        backbone=backbone,
        num_classes=num_classes,
        coarse_grid=coarse_grid,
        informative_ratio=informative_ratio,
        attention_momentum=attention_momentum,
        selection=selection,
        feature_reuse=feature_reuse,
        fine_merged=fine_merged,
        timm_kwargs=timm_kwargs,
    )
    if isinstance(pretrained_backbone, str | Path):
        pretrained_backbone = read_weights(pretrained_backbone)
    model = CoarseToFineViT(config, pretrained_backbone)
    if isinstance(pretrained_backbone, Weights):
        model.data_config |= pretrained_backbone.preprocessing
        names = pretrained_backbone.class_names
        model.class_names = names if names is not None and len(names) == num_classes else None
    return model


def check_description(model: Any, source: str | Path, mend: str) -> None:
    """Checks the preprocessing, class names and class order of a model.

    Args:
        model: with the attributes of a `CoarseToFineViT`.
        source: the file that they are from, or the model itself, for the error.
        mend: how to mend them, for the error.

    Raises:
        CfvitError: names what does not fit.
    """
    names, size, classes = model.class_names, model.image_size, model.config.num_classes
    words = isinstance(names, list) and all(isinstance(name, str) for name in names)
    problem = None
    try:
        Preprocessing(**model.data_config)
    except UsageError as error:
        problem = str(error)
    if names is not None and not (words and len(names) == classes):
        problem = f"class_names do not name {classes} classes"
    elif model.data_config.get("input_size") != (3, *size):
        problem = f"input_size is {model.data_config.get('input_size')}, not {(3, *size)}"
    elif model.class_order not in (None, "natural", "torchvision"):
        problem = f"class_order is {model.class_order!r}, not natural or torchvision"
    if problem:
        raise CfvitError(f"{source} cannot be used ({problem}): {mend}")
