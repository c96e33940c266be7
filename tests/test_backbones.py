"""Timm's models in two stages: each against timm's own blocks, the refused ones, and one of one's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from timm.models import register_model
from timm.models.eva import EvaAttention, EvaBlockPostNorm
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from cfvit import CoarseToFineViT, Predictor, count_macs, create_model, load, save
from cfvit.modeling import timm_vit
from cfvit.modeling.tokens import child_positions
from cfvit.plots.explain import draw_explanation, explain

SMALL: dict[str, Any] = {"embed_dim": 48, "num_heads": 4, "depth": 5}
CLASSES = 5
MOMENTUM = 0.5
"""beta, lower than usual so that every block's row counts."""

Fails = Callable[..., Any]


@torch.no_grad()
def _randomise(module: nn.Module, seed: int) -> None:
    """Weights of which every piece matters: tokens, positions, layer scales, biases, auxiliary heads."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim <= 1 or name.startswith("rope."):
            parameter.add_(0.2 * noise)
        elif parameter.shape[0] == 1:  # tokens and positions
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


# What timm computes, one image at a time


def _captured(network: Any, images: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Timm's unfused answer, each block's input and (last) output, and each block's class attention row.

    The row is read from the softmaxed maps ``[B, H, T, T]`` on their way into timm's dropout.
    """
    tokens: list[Tensor] = []
    maps: list[list[Tensor]] = [[] for _ in network.blocks]
    hooks = []
    for index, block in enumerate(network.blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0])))
        for name, module in block.named_modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
            if name.split(".")[-1] == "attn_drop":
                own = maps[index]
                hooks.append(module.register_forward_pre_hook(lambda _, inputs, own=own: own.append(inputs[0])))
    hooks.append(network.blocks[-1].register_forward_hook(lambda *call: tokens.append(call[2])))
    logits = network(images)
    for hook in hooks:
        hook.remove()
    prefix = network.num_prefix_tokens
    rows = [torch.stack([m[:, :, 0, prefix:].mean(dim=1) for m in own]).mean(dim=0) for own in maps]
    return logits, tokens, rows


def _rotation_at(backbone: Any, places: list[tuple[float, float]]) -> Tensor:
    """Sines and cosines at (row, column) of the fine grid, counted in fine patches: ``[..., n, R]``."""
    rope = backbone.rope
    y, x = torch.tensor(places, dtype=torch.float32).unbind(dim=1)
    rows, columns = backbone.patch_embed.grid_size
    if isinstance(rope, RotaryEmbeddingMixed):
        first, second = (x, y) if rope.grid_indexing == "xy" else (y, x)
        angles = first[:, None] * rope.freqs[0][:, :, None] + second[:, None] * rope.freqs[1][:, :, None]
        half = False
    elif isinstance(rope, RotaryEmbeddingMRope):
        half, channels = True, rope.dim // 2
        angles = torch.zeros(len(places), channels)
        for channel in range(channels):
            place = {1: y, 2: x}.get(channel % 3)
            if place is not None and channel < 3 * rope.mrope_section[channel % 3]:
                angles[:, channel] = place / rope.temperature ** (channel / channels)
    else:
        bands = [i / (rope.dim // 4) for i in range(rope.dim // 4)]
        half = rope.rotate_half
        if isinstance(rope, RotaryEmbeddingDinoV3):
            assert rope.temperature is not None
            y, x = 2 * (y + 0.5) / rows - 1, 2 * (x + 0.5) / columns - 1
            frequencies = torch.tensor([2 * math.pi / rope.temperature**band for band in bands])
        else:
            assert isinstance(rope, RotaryEmbeddingCat)
            y, x = y + rope.grid_offset, x + rope.grid_offset
            if rope.ref_feat_shape is not None:
                y, x = y / rows * rope.ref_feat_shape[0], x / columns * rope.ref_feat_shape[1]
            frequencies = torch.tensor([1 / rope.temperature**band for band in bands])
        first, second = (x, y) if rope.grid_indexing == "xy" else (y, x)
        angles = torch.cat([first[:, None] * frequencies, second[:, None] * frequencies], dim=1)
    parts = [angles.sin(), angles.cos()]
    return torch.cat([p.tile(2) if half else p.repeat_interleave(2, dim=-1) for p in parts], dim=-1)


def _centres(grid: tuple[int, int]) -> list[tuple[float, float]]:
    return [(2 * row + 0.5, 2 * column + 0.5) for row in range(grid[0]) for column in range(grid[1])]


def _literal_coarse(model: CoarseToFineViT, name: str, kwargs: dict[str, Any], images: Tensor) -> tuple[Tensor, ...]:
    """Timm's model of half the image size: logits, embedding and global class attention (Eq. 9)."""
    backbone: Any = model.backbone
    half = (model.image_size[0] // 2, model.image_size[1] // 2)
    small: Any = timm.create_model(name, img_size=half, num_classes=CLASSES, **kwargs)
    positions = {} if model.coarse_pos_embed is None else {"pos_embed": model.coarse_pos_embed}
    small.load_state_dict({**backbone.state_dict(), **positions})
    if getattr(backbone, "rope", None) is not None:
        small.rope.get_embed = lambda shape=None: _rotation_at(backbone, _centres(model.grid))
    small_images = F.interpolate(images, size=half, mode="bilinear", align_corners=True)
    small.eval()
    logits, _, rows = _captured(small, small_images)
    entered = small._pos_embed(small.patch_embed(small_images))
    embedding = (entered[0] if isinstance(entered, tuple) else entered)[:, small.num_prefix_tokens :]
    average = torch.zeros_like(rows[0])
    for row in rows[3:]:
        average = MOMENTUM * average + (1 - MOMENTUM) * row
    return logits, embedding, average


def _literal_fine(model: CoarseToFineViT, image: Tensor, state: Any, ratio: float) -> Tensor:
    """The fine stage of one image through timm's blocks, cell by cell in the order of the grid."""
    backbone: Any = model.backbone
    entered = backbone._pos_embed(backbone.patch_embed(image))
    fine = (entered[0] if isinstance(entered, tuple) else entered)[0]
    prefix, (rows, columns) = backbone.num_prefix_tokens, model.grid
    chosen = state.class_attention[0].topk(math.ceil(ratio * rows * columns)).indices.tolist()
    assert model.feature_reuse is not None
    reused = model.feature_reuse(state.tokens[0])
    sequence, places = list(fine[:prefix]), []
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        if cell in chosen:
            for y, x in [(2 * row + down, 2 * column + right) for down in (0, 1) for right in (0, 1)]:
                sequence.append(fine[prefix + y * 2 * columns + x] + reused[cell])
                places.append((float(y), float(x)))
        else:
            sequence.append(state.embedding[0, cell])
            places.append((2 * row + 0.5, 2 * column + 0.5))
    tokens = backbone.norm_pre(torch.stack(sequence)[None])
    rotation = None if getattr(backbone, "rope", None) is None else _rotation_at(backbone, places)
    for index, block in enumerate(backbone.blocks):
        own = rotation[index] if rotation is not None and rotation.ndim == 4 else rotation
        tokens = block(tokens) if own is None else block(tokens, rope=own)
    return backbone.forward_head(backbone.norm(tokens))


# Every family of timm's, in two stages

NON_SQUARE = (2, 3)
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("deit_tiny_patch16_224", {}),
    ("deit_small_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {}),
    ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
    ("vit_small_patch8_224", {}),
    ("vit_small_patch32_224", {}),
    ("vit_large_patch14_224", {}),
    ("vit_base_patch16_384", {}),
    ("vit_base_patch16_clip_224", {}),
    ("vit_small_patch14_dinov2", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_base_patch16_xp_224", {}),
    ("vit_base_patch16_18x2_224", {}),
    ("vit_base_patch16_rpn_224", {"class_token": True, "global_pool": "token"}),
    ("beit3_base_patch16_224", {}),
    ("vit_tiny_r_s16_p8_224", {}),
    ("eva_giant_patch14_224", {}),
    ("eva02_tiny_patch14_224", {}),
    ("eva02_base_patch16_clip_224", {}),
    ("eva02_enormous_patch14_clip_224", {}),
    ("vit_small_patch16_dinov3", {"rope_rescale_coords": 2.0}),
    ("vit_small_plus_patch16_dinov3", {}),
    ("vit_base_patch16_rope_224", {}),
    ("vit_base_patch16_rope_mixed_224", {}),
    ("vit_base_patch16_rope_mixed_ape_224", {}),
    ("vit_base_patch16_rope_224", {"rope_type": "mrope", "rope_grid_indexing": "ij"}),
    ("vit_pe_core_tiny_patch16_384", {}),
    ("vit_pe_lang_large_patch14_448", {}),
    ("vit_base_patch16_lingbot", {}),
    ("vit_5b_patch16_sapiens2", {"num_kv_heads": 2}),
    ("lvvit_small_patch16_224", {}),
]
WITH_NON_SQUARE = {
    "deit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384",
    "lvvit_small_patch16_224",
}


@dataclass(frozen=True)
class Family:
    """One of timm's models, with random weights, and the same in two stages, filled from its file."""

    name: str
    kwargs: dict[str, Any]
    grid: int | tuple[int, int]
    plain: nn.Module
    model: CoarseToFineViT
    images: Tensor


def _build(name: str, kwargs: dict[str, Any], grid: int | tuple[int, int], file: Path) -> Family:
    rows, columns = grid if isinstance(grid, tuple) else (grid, grid)
    kwargs = {**SMALL, **kwargs}
    patch = timm_vit.patch_side(timm.create_model(name, **kwargs))  # pyright: ignore[reportArgumentType]
    size = (2 * rows * patch[0], 2 * columns * patch[1])
    plain = timm.create_model(name, img_size=size, num_classes=CLASSES, **kwargs).eval()
    _randomise(plain, 0)
    torch.save(plain.state_dict(), file)
    model = create_model(
        name,
        num_classes=CLASSES,
        coarse_grid=grid,
        attention_momentum=MOMENTUM,
        pretrained_backbone=file,
        **kwargs,
    ).eval()
    assert model.feature_reuse is not None
    _randomise(model.feature_reuse, 1)
    if model.coarse_pos_embed is not None:
        model.coarse_pos_embed.data.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    return Family(name, kwargs, grid, plain, model, images)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, kwargs, grid), id="-".join([name, *map(str, kwargs), "x".join(map(str, grid))]))
        for name, kwargs in FAMILIES
        for grid in ([(3, 3), NON_SQUARE] if name in WITH_NON_SQUARE else [(3, 3)])
    ],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Only to be read."""
    name, kwargs, grid = request.param
    file = tmp_path_factory.mktemp("weights") / "timm.pth"
    return _build(name, kwargs, grid[0] if grid[0] == grid[1] else grid, file)


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(actual / scale, expected / scale, atol=tolerance, rtol=0)


@torch.no_grad()
def test_weights_are_timms_key_for_key(family: Family) -> None:
    plain, backbone = family.plain.state_dict(), family.model.backbone.state_dict()
    assert backbone.keys() == plain.keys()
    assert all(torch.equal(backbone[name], plain[name]) for name in plain)
    assert torch.equal(family.model.backbone(family.images), family.plain(family.images))


@torch.no_grad()
def test_coarse_stage_is_timms_model_of_half_the_size(family: Family) -> None:
    state = family.model.coarse(family.images)
    logits, embedding, attention = _literal_coarse(family.model, family.name, family.kwargs, family.images)
    divisor = 1.25 if family.name.startswith("lvvit") else 1.0
    _assert_close(state.logits, logits / divisor)
    _assert_close(state.embedding, embedding)
    _assert_close(state.class_attention, attention)
    assert state.class_attention.std() > 1e-3, "flat attention would choose cells by chance"


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@torch.no_grad()
def test_fine_stage_is_timms_blocks_on_the_mixed_sequence(ratio: float, family: Family) -> None:
    model = family.model
    state = model.coarse(family.images)
    fine = model.fine(family.images, state, informative_ratio=ratio)
    one_by_one = [_literal_fine(model, family.images[i : i + 1], state[i : i + 1], ratio) for i in range(2)]
    _assert_close(fine, torch.cat(one_by_one))


@torch.no_grad()
def test_splitting_all_without_reuse_is_timms_own_answer(family: Family) -> None:
    fc2 = family.model.get_submodule("feature_reuse.mlp.fc2")
    kept = [p.clone() for p in fc2.parameters()]
    try:
        for parameter in fc2.parameters():
            nn.init.zeros_(parameter)
        fine = family.model(family.images, informative_ratio=1.0).fine
    finally:
        for parameter, values in zip(fc2.parameters(), kept, strict=True):
            parameter.copy_(values)
    _assert_close(fine, family.plain(family.images))


def test_every_parameter_is_trained(family: Family) -> None:
    """In training mode, where timm moves rotary positions at random if it is asked to."""
    model = family.model.train()
    try:
        output = model(family.images)
        assert output.coarse.shape == output.fine.shape == (2, CLASSES)
        targets = torch.tensor([1, 3])
        (F.cross_entropy(output.coarse, targets) + F.cross_entropy(output.fine, targets)).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    zero = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
    assert zero == []


@torch.no_grad()
def test_a_saved_model_gives_the_same_logits(family: Family, tmp_path: Path) -> None:
    save(family.model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == family.model.config
    assert loaded.config.coarse_grid == family.grid
    assert all(map(torch.equal, loaded(family.images), family.model(family.images)))


# Class attention of each kind of block


def _gate_and_norm(network: Any) -> None:
    for block in network.blocks:
        width = block.attn.proj.in_features
        block.attn.gate = nn.Linear(network.embed_dim, width)
        block.attn.norm = nn.LayerNorm(width)


KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Any], object]]] = {
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}, lambda n: n.blocks[0].attn.q_norm.weight),
    "gate": ("vit_tiny_patch16_224", {}, _gate_and_norm),
    "layer-scale-and-registers": (
        "vit_small_patch14_reg4_dinov2",
        {},
        lambda n: (n.reg_token.shape[1] == 4, n.blocks[0].ls1.gamma),
    ),
    "two-prefix-tokens": ("deit_small_distilled_patch16_224", {}, lambda n: n.dist_token.shape),
    "post-norm": (
        "vit_base_patch16_rpn_224",
        {"class_token": True, "global_pool": "token"},
        lambda n: n.blocks[0] if isinstance(n.blocks[0], ResPostBlock) else None,
    ),
    "parallel-scaling": (
        "vit_base_patch16_xp_224",
        {},
        lambda n: isinstance(n.blocks[0], ParallelScalingBlock) and n.blocks[0].in_proj.bias is None,
    ),
    "parallel-scaling-with-bias": (
        "vit_base_patch16_xp_224",
        {"qkv_bias": True, "qk_norm": False, "init_values": 0.5},
        lambda n: n.blocks[0].in_proj.bias is not None,
    ),
    "parallel-things": (
        "vit_base_patch16_18x2_224",
        {},
        lambda n: isinstance(n.blocks[0], ParallelThingsBlock) and len(n.blocks[0].attns) == 2,
    ),
    "eva-q-bias": (
        "eva_giant_patch14_224",
        {},
        lambda n: isinstance(n.blocks[0].attn, EvaAttention) and n.blocks[0].attn.q_bias is not None,
    ),
    "eva-separate-projections": (
        "eva02_tiny_patch14_224",
        {"qkv_fused": False, "scale_attn_inner": True},
        lambda n: isinstance(n.blocks[0].attn, EvaAttention) and n.blocks[0].attn.qkv is None,
    ),
    "eva-qk-norm": ("eva02_tiny_patch14_224", {"qk_norm": True}, lambda n: n.blocks[0].attn.q_norm.weight),
    "eva-gate": ("eva02_tiny_patch14_224", {}, _gate_and_norm),
    "eva-post-norm": (
        "eva02_enormous_patch14_clip_224",
        {},
        lambda n: isinstance(n.blocks[0], EvaBlockPostNorm),
    ),
    "rope-half": ("vit_small_patch16_dinov3", {}, lambda n: n.blocks[0].attn.rotate_half),
    "rope-interleaved": (
        "vit_base_patch16_rope_224",
        {},
        lambda n: isinstance(n.blocks[0].attn, AttentionRope) and not n.blocks[0].attn.rotate_half,
    ),
    "rope-mixed": ("vit_base_patch16_rope_mixed_224", {}, lambda n: n.rope_mixed),
    "grouped-queries": (
        "vit_5b_patch16_sapiens2",
        {"num_kv_heads": 2},
        lambda n: n.blocks[0].attn.num_kv_groups == 2,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_class_attention_is_the_row_of_timms_own_map(kind: str) -> None:
    name, kwargs, is_that_kind = KINDS[kind]
    kwargs = {**SMALL, **kwargs}
    patch = timm_vit.patch_side(timm.create_model(name, **kwargs))[0]  # pyright: ignore[reportArgumentType]
    network: Any = timm.create_model(name, img_size=(4 * patch, 6 * patch), num_classes=CLASSES, **kwargs).eval()
    assert is_that_kind(network) is not False
    _randomise(network, 0)
    images = torch.randn(2, 3, 4 * patch, 6 * patch, generator=torch.Generator().manual_seed(1))

    _, tokens, rows = _captured(network, images)

    assert len(rows) == 5
    rotation = timm_vit.fine_rotation(network)
    for index in range(5):
        output, row = timm_vit.block_with_class_attention(network, index, tokens[index], rotation)
        _assert_close(output, tokens[index + 1])
        _assert_close(row, rows[index])
        assert row.dtype == torch.float32


@torch.no_grad()
def test_gates_and_norms_matter_to_the_oracle() -> None:
    """Else the kinds above would prove nothing of them."""
    network: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL).eval()
    _gate_and_norm(network)
    _randomise(network, 0)
    tokens = torch.randn(1, 5, 48)
    block = network.blocks[0]
    outputs = [block(tokens)]
    block.attn.norm = nn.Identity()
    outputs.append(block(tokens))
    block.attn.gate = None
    outputs.append(block(tokens))
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
    assert (outputs[1] - outputs[2]).abs().max() > 0.01


# Rotary positions

ROTARY: list[tuple[str, dict[str, Any]]] = [
    ("vit_base_patch16_rope_224", {}),
    ("vit_base_patch16_rope_mixed_224", {}),
    ("vit_small_patch16_dinov3", {}),
    ("eva02_tiny_patch14_224", {}),
    ("vit_pe_core_tiny_patch16_384", {}),
    ("vit_base_patch16_rope_224", {"rope_type": "mrope", "rope_grid_indexing": "ij"}),
    ("vit_base_patch16_rope_224", {"rope_grid_indexing": "ij", "rope_grid_offset": 0.25, "rope_rotate_half": True}),
]


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 7)], ids=str)
@pytest.mark.parametrize(("name", "kwargs"), ROTARY, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain")
@torch.no_grad()
def test_cells_are_rotated_by_the_position_of_their_centre(
    name: str, kwargs: dict[str, Any], grid: tuple[int, int]
) -> None:
    backbone: Any = create_model(name, coarse_grid=grid, **{**SMALL, **kwargs}).backbone
    fine = timm_vit.fine_rotation(backbone)
    assert fine is not None
    patches = [(float(row), float(column)) for row in range(2 * grid[0]) for column in range(2 * grid[1])]
    torch.testing.assert_close(fine, _rotation_at(backbone, patches), atol=1e-5, rtol=0)

    children = child_positions(torch.arange(grid[0] * grid[1])[None], grid[1])
    cells = timm_vit.cell_rotation(backbone, fine, children, grid)

    assert cells is not None
    torch.testing.assert_close(cells, _rotation_at(backbone, _centres(grid)), atol=1e-5, rtol=0)
    sine, cosine = cells.chunk(2, dim=-1)
    torch.testing.assert_close(sine**2 + cosine**2, torch.ones_like(sine), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rotations_are_gathered_for_each_image() -> None:
    positions = torch.tensor([[2, 0], [1, 1]])
    shared, per_head = torch.randn(3, 8), torch.randn(5, 4, 3, 8)
    gathered = timm_vit.gather_rotation(shared, positions)
    assert gathered is not None
    assert gathered.shape == (2, 1, 2, 8)
    assert torch.equal(gathered[0, 0], shared[[2, 0]])
    gathered = timm_vit.gather_rotation(per_head, positions)
    assert gathered is not None
    assert gathered.shape == (5, 2, 4, 2, 8)
    assert torch.equal(gathered[3, 1, 2], per_head[3, 2, [1, 1]])


@torch.no_grad()
def test_rotation_sees_the_place_of_a_cell() -> None:
    """Without absolute positions the answer depends on places by rotation alone: the oracle is not blind to it."""
    model = create_model("vit_base_patch16_rope_224", num_classes=CLASSES, coarse_grid=2, **SMALL).eval()
    _randomise(model, 0)
    assert model.coarse_pos_embed is None
    images = torch.randn(1, 3, *model.image_size)
    state = model.coarse(images)
    whole = model.fine(images, state, informative_ratio=0.0)
    assert model.cell_rotation is not None
    model.cell_rotation.copy_(model.cell_rotation.flip(0))
    assert (model.fine(images, state, informative_ratio=0.0) - whole).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kwargs"), ROTARY, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain")
@torch.no_grad()
def test_rotations_are_made_once_and_move_with_the_model(
    name: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model(name, num_classes=CLASSES, coarse_grid=2, **{**SMALL, **kwargs}).eval()
    _randomise(model, 0)
    images = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    learned = "mixed" in name
    answers = model(images)
    if not learned:
        monkeypatch.setattr(timm_vit, "fine_rotation", lambda *_: pytest.fail("made again"))
    assert not any("rotation" in name for name in model.state_dict())
    for ours, expected in zip(copy.deepcopy(model).double()(images.double()), answers, strict=True):
        torch.testing.assert_close(ours.float(), expected, atol=1e-4, rtol=1e-4)
    halved = copy.deepcopy(model).bfloat16()
    assert halved(images.bfloat16()).fine.isfinite().all()
    if not learned:
        for ours, expected in (
            (halved.fine_rotation, model.fine_rotation),
            (halved.cell_rotation, model.cell_rotation),
        ):
            assert expected is not None
            assert torch.equal(cast(Tensor, ours), expected.bfloat16())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_rope_mixed_224"])
@torch.no_grad()
def test_rotary_positions_stand_still_in_training(name: str) -> None:
    """Timm would move them at random at each call, and so the cells away from their children."""
    random = {"rope_rescale_coords": 2.0, "rope_jitter_coords": 1.5, "rope_shift_coords": 0.5}
    model = create_model(name, num_classes=CLASSES, coarse_grid=2, **random, **SMALL).eval()
    _randomise(model, 0)
    images = torch.randn(2, 3, *model.image_size)
    resting = model(images)
    assert all(map(torch.equal, model.train()(images), resting))


# What is refused

NO_CLASS_TOKEN = "has no class token, whose attention chooses"
PER_PAIR = "adds to its attention a bias for each pair of patches"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_siglip_224", NO_CLASS_TOKEN),
        ("vit_medium_patch16_gap_240", NO_CLASS_TOKEN),
        ("vit_medium_patch16_rope_reg1_gap_256", NO_CLASS_TOKEN),
        ("swin_tiny_patch4_window7_224", "within windows of one grid"),
        ("swinv2_tiny_window8_256", "within windows of one grid"),
        ("samvit_base_patch16", "within windows of one grid"),
        ("convnext_atto", "is a hierarchy of convolutions"),
        ("resnet18", "is a hierarchy of convolutions"),
        ("beit_base_patch16_224", PER_PAIR),
        ("beitv2_base_patch16_224", PER_PAIR),
        ("vit_relpos_base_patch16_cls_224", PER_PAIR),
        ("xcit_tiny_12_p8_224", "attends across channels, not patches"),
        ("cait_s24_224", "in its last blocks only"),
        ("naflexvit_base_patch16_gap", "timm's plain ViTs hold the same weights"),
        ("mixer_s32_224", "is a MlpMixer, not one of timm's plain vision transformers"),
    ],
)
def test_unsuitable_models_are_refused_with_a_reason(name: str, reason: str, fails: Fails) -> None:
    with fails(rf"^{name} .*{reason}.*: choose a ViT with a class token, such as deit_small_patch16_224"):
        create_model(name)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"global_pool": ""}, "has its pooling switched off"),
        ({"patch_drop_rate": 0.5}, "drops patches at random in training"),
        ({"class_token": False, "global_pool": "avg"}, NO_CLASS_TOKEN),
        ({"attn_layer": "diff"}, "is built of DiffAttention, whose class attention is not read here"),
    ],
)
def test_unsuitable_arguments_are_refused_with_a_reason(kwargs: dict[str, Any], reason: str, fails: Fails) -> None:
    with fails(rf"^vit_tiny_patch16_224 with {next(iter(kwargs))}=.* {reason}.*: leave out or change these arguments$"):
        create_model("vit_tiny_patch16_224", **kwargs)


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("deit_smal_patch16_224", "did you mean deit_small_patch16_224"),
        ("nonsense", "choose .*deit_small_patch16_224"),
        ("", "choose .*patch"),
        ("hf-hub:timm/vit_tiny_patch16_224", "give timm's own name"),
    ],
)
def test_unknown_names_are_refused_with_what_would_do(name: str, suggested: str, fails: Fails) -> None:
    with fails(rf"^timm has no model '{name}': {suggested}"):
        create_model(name)


@pytest.mark.parametrize("kwargs", [{"embed_dim": 50, "num_heads": 4}, {"dept": 3}, {"depth": "deep"}])
def test_arguments_that_timm_does_not_take_are_refused(kwargs: dict[str, Any], fails: Fails) -> None:
    with fails(rf"^timm cannot build deit_tiny_patch16_224 with .*{next(iter(kwargs))}.*: change the arguments$"):
        create_model("deit_tiny_patch16_224", **kwargs)


@pytest.mark.parametrize("rate", [2, -0.5, float("nan"), True, "0.1", 1.0])
@pytest.mark.parametrize("name", ["drop_path_rate", "proj_drop_rate"])
def test_rates_that_would_fail_in_training_are_refused(name: str, rate: Any, fails: Fails) -> None:
    with fails(f"^{name} is {rate!r}: give at least 0 and less than 1$"):
        create_model("deit_tiny_patch16_224", **{name: rate})


@pytest.mark.parametrize("reserved", [{"img_size": 224}, {"in_chans": 1}, {"pretrained": True}])
def test_arguments_that_follow_from_ours_are_refused(reserved: dict[str, Any], fails: Fails) -> None:
    with fails(rf"^{next(iter(reserved))} cannot be given to timm"):
        create_model("deit_tiny_patch16_224", **reserved)


# Grids that are not square


@pytest.fixture(scope="module")
def wide() -> CoarseToFineViT:
    """A model of 2 x 3 cells, with random weights. Only to be read."""
    model = create_model(
        "deit_tiny_patch16_224", num_classes=CLASSES, coarse_grid=NON_SQUARE, patch_size=(4, 4), **SMALL
    )
    _randomise(model, 0)
    return model.eval()


@torch.no_grad()
def test_predictor_answers_from_both_stages_of_a_wide_grid(wide: CoarseToFineViT) -> None:
    assert wide.image_size == (16, 24)
    assert wide.data_config["input_size"] == (3, 16, 24)
    images = torch.randn(6, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    confidence = wide.coarse(images).confidence.sort().values
    prediction = Predictor(wide, float(confidence[2:4].mean()))(images)
    output = wide(images)
    assert prediction.stage.sum() == 3
    expected = torch.where(prediction.stage[:, None] == 1, output.fine, output.coarse)
    torch.testing.assert_close(prediction.logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cost_of_a_wide_grid_is_that_of_its_tokens(wide: CoarseToFineViT) -> None:
    def cost(tokens: int, patches: int) -> int:
        """Of five blocks of 48 channels, an embedding of ``patches`` of 4 x 4 pixels, and the head."""
        block = tokens * 48 * (4 * 48 + 2 * 4 * 48) + 2 * tokens**2 * 48
        return 5 * block + patches * 48 * 48 + 48 * CLASSES

    macs = count_macs(wide)
    rows = 2 * 48 * 7  # blocks 4 and 5 give the class token's row over 7 tokens
    reuse = 3 * 2 * 48 * 192
    assert macs.backbone == cost(25, 24)
    assert macs.coarse == cost(7, 6) + rows
    assert macs.fine == cost(1 + 12 + 3, 12) + reuse


def test_explanation_of_a_wide_grid(wide: CoarseToFineViT, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    explanations = explain(wide, images, 0.5)
    with torch.no_grad():
        state = wide.coarse(images)
    for i, explanation in enumerate(explanations):
        assert explanation.image.shape == (16, 24, 3)
        chosen = state.class_attention[i].topk(3).indices.tolist()
        assert [cell for cell in range(6) if explanation.split.reshape(-1)[cell]] == sorted(chosen)
        assert explanation.attention.shape == explanation.split.shape == NON_SQUARE
        torch.testing.assert_close(torch.from_numpy(explanation.attention).flatten(), state.class_attention[i])
    pytest.importorskip("matplotlib")
    draw_explanation(explanations[0], tmp_path / "wide.png")
    assert (tmp_path / "wide.png").stat().st_size > 1000


def test_a_wide_grid_is_saved_and_comes_back_as_a_tuple(wide: CoarseToFineViT, tmp_path: Path) -> None:
    save(wide, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.coarse_grid == NON_SQUARE
    assert isinstance(loaded.config.coarse_grid, tuple)
    assert loaded.image_size == (16, 24)
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("grid", [(0, 3), (2,), (2, 3, 4), (), (2, -1), (2.0, 3), 0, -3, 2.5, "7x", "²", True, None])
def test_grids_that_are_none_are_refused(grid: Any, fails: Fails) -> None:
    with fails("^coarse_grid is .*: give a whole number of at least 1, or ROWSxCOLUMNS such as 5x8$"):
        create_model("deit_tiny_patch16_224", coarse_grid=grid)


@pytest.mark.parametrize("shape", [(1, 3, 24, 16), (1, 3, 16, 16), (1, 3, 24, 24)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...], wide: CoarseToFineViT, fails: Fails) -> None:
    with fails(r"give normalised \[B, 3, 16, 24\]"):
        wide.coarse(torch.zeros(shape))


# A model of one's own, in one file


class _BlurredStem(PatchEmbed):
    """A convolution in front of the patches, which `features` names."""

    def __init__(self, img_size: Any, patch_size: int, in_chans: int, embed_dim: int, **options: Any) -> None:
        super().__init__(img_size, patch_size, 8, embed_dim, **options)
        self.blur = nn.Conv2d(in_chans, 8, 3, padding=1)

    def features(self, images: Tensor) -> Tensor:
        return self.blur(images).relu()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.features(x))


class _Own(VisionTransformer):
    """Another stem, and a head of cosines to a prototype of each class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(embed_layer=_BlurredStem, **options)
        self.head = nn.Linear(self.embed_dim, self.num_classes, bias=False)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return 10 * F.linear(F.normalize(x[:, 0], dim=-1), F.normalize(self.head.weight, dim=-1))


class _OwnFeatures(VisionTransformer):
    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward_features(x)


class _OwnForward(VisionTransformer):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x)


class _OwnPositions(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(x).flip(1)


class _HiddenStem(PatchEmbed):
    """Changes the image, without `features` to say so."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x + 1)


def _register(name: str, kind: type[VisionTransformer], **sizes: Any) -> None:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(key, None)
        return kind(**{**SMALL, **sizes, **options})

    create.__name__ = name
    register_model(create)


_register("cfvit_test_own", _Own, patch_size=8)
_register("cfvit_test_features", _OwnFeatures)
_register("cfvit_test_forward", _OwnForward)
_register("cfvit_test_positions", _OwnPositions)
_register("cfvit_test_stem", VisionTransformer, embed_layer=_HiddenStem)


def test_a_model_of_ones_own_works_in_two_stages(tmp_path: Path) -> None:
    family = _build("cfvit_test_own", {}, 3, tmp_path / "own.pth")
    assert isinstance(family.model.backbone, _Own)
    test_weights_are_timms_key_for_key(family)
    test_coarse_stage_is_timms_model_of_half_the_size(family)
    for ratio in (0.0, 0.5):
        test_fine_stage_is_timms_blocks_on_the_mixed_sequence(ratio, family)
    test_splitting_all_without_reuse_is_timms_own_answer(family)
    test_every_parameter_is_trained(family)
    test_a_saved_model_gives_the_same_logits(family, tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cfvit_test_features", "is a _OwnFeatures, not one of timm's plain vision transformers"),
        ("cfvit_test_forward", "is a _OwnForward, not one of timm's plain vision transformers"),
        ("cfvit_test_positions", "is a _OwnPositions, not one of timm's plain vision transformers"),
        ("cfvit_test_stem", "embeds its patches by a _HiddenStem without features"),
    ],
)
def test_a_model_that_computes_another_way_is_refused(name: str, reason: str, fails: Fails) -> None:
    """Read as a plain one it would answer otherwise than it does by itself."""
    with fails(f"^{name} {reason}"):
        create_model(name)
