"""A plain ViT on some of its patches: against timm's own blocks, one image and one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from cfvit import CoarseToFineViT
from cfvit.modeling.timm_vit import patch_side
from cfvit.paper.figures import (
    answer_from_patches,
    answers_by_attention,
    attention_pictures,
    class_attention_of_blocks,
)
from cfvit.plots.explain import explain

Fails = Callable[..., Any]
CPU = torch.device("cpu")
NAMES = [
    "deit_tiny_patch16_224",
    "deit_small_distilled_patch16_224",  # two prefix tokens
    "vit_small_patch14_reg4_dinov2",  # registers, none of which has a position
    "eva02_tiny_patch14_224",  # rotary besides absolute positions
    "vit_small_patch16_dinov3",  # rotary positions and registers, patches that come as rows and columns
    "vit_base_patch16_rope_mixed_224",  # rotations of their own in every block
    "vit_tiny_r_s16_p8_224",  # a convolutional stem
    "lvvit_small_patch16_224",  # all patches take part in the answer
]


def _make(name: str, grid: tuple[int, int] = (3, 4)) -> Any:
    sizes: dict[str, Any] = {"embed_dim": 48, "num_heads": 4, "depth": 3}
    skeleton: Any = timm.create_model(name, **sizes)
    patch = patch_side(skeleton)
    size = (grid[0] * patch[0], grid[1] * patch[1])
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, num_classes=5, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=NAMES)
def plain(request: pytest.FixtureRequest) -> Any:
    """One of timm's models, of 3 x 4 patches. Only to be read."""
    return _make(request.param)


def _images(model: Any, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(seed))


def _entered(model: Any, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """All tokens of one image with their positions ``[T, D]``, and the rotations of its patches."""
    entered = model._pos_embed(model.patch_embed(image[None]))
    tokens, rotation = entered if isinstance(entered, tuple) else (entered, None)
    return tokens[0], rotation


def _without(model: Any, image: Tensor, kept: list[int]) -> Tensor:
    """Logits ``[classes]`` of timm's blocks after all tokens but the prefix and the kept patches are taken out."""
    tokens, rotation = _entered(model, image)
    prefix = model.num_prefix_tokens
    sequence = [tokens[i] for i in range(prefix)] + [tokens[prefix + i] for i in range(12) if i in kept]
    x = model.norm_pre(torch.stack(sequence)[None])
    for index, block in enumerate(model.blocks):
        if rotation is None:
            x = block(x)
            continue
        own = rotation[index] if rotation.ndim == 4 else rotation
        x = block(x, rope=torch.stack([own[..., i, :] for i in range(12) if i in kept], dim=-2))
    return model.forward_head(model.norm(x))[0]


def _rows(model: Any, images: Tensor) -> Tensor:
    """The class token's rows ``[depth, B, N]`` of timm's own attention maps, without fused attention."""
    rows: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        block.attn.fused_attn = False
        hook = block.attn.attn_drop.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][:, :, 0]))
        hooks.append(hook)
    model(images)
    for hook, block in zip(hooks, model.blocks, strict=True):
        hook.remove()
        block.attn.fused_attn = True
    return torch.stack(rows)[..., model.num_prefix_tokens :].mean(dim=2)


@torch.no_grad()
def test_class_attention_is_the_row_of_timms_own_maps(plain: Any) -> None:
    images = _images(plain, 2)
    expected = _rows(plain, images)
    assert expected.shape == (3, 2, 12)
    assert expected.std(dim=-1).min() > 1e-4
    torch.testing.assert_close(class_attention_of_blocks(plain, images), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_answer_from_some_patches_is_that_of_timms_blocks_without_the_others(plain: Any) -> None:
    images = _images(plain, 2)
    kept = torch.tensor([[7, 2, 11, 0, 5], [1, 3, 10, 8, 4]])
    expected = torch.stack([_without(plain, image, own.tolist()) for image, own in zip(images, kept, strict=True)])
    torch.testing.assert_close(answer_from_patches(plain, images, kept), expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain(images)).abs().max() > 1e-2, "the other patches do not matter to this model"


@torch.no_grad()
def test_all_patches_in_any_order_give_timms_own_answer(plain: Any) -> None:
    images = _images(plain, 2)
    orders = torch.stack([torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(1))])
    torch.testing.assert_close(answer_from_patches(plain, images, orders), plain(images), atol=1e-4, rtol=1e-4)


# Figure 1 (a)


@torch.no_grad()
def _literal_answers(model: Any, image: Tensor, kept: int) -> list[int]:
    answers = [int(model(image[None]).argmax())]
    for row in _rows(model, image[None])[:, 0]:
        for sign in (1, -1):
            best = sorted(range(12), key=lambda i, row=row, sign=sign: -sign * float(row[i]))[:kept]
            answers.append(int(_without(model, image, best).argmax()))
    return answers


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_answers_by_attention_are_those_of_a_plain_loop(name: str) -> None:
    model = _make(name)
    images = _images(model, 12)
    answers = answers_by_attention(model, images, 3)
    assert answers.tolist() == [_literal_answers(model, image, 3) for image in images]
    assert len(set(answers.double().mean(dim=0).tolist())) > 2, "all alike: nothing was told apart"


def test_with_all_patches_kept_nothing_is_lost() -> None:
    model = _make("deit_tiny_patch16_224")
    answers = answers_by_attention(model, _images(model, 6), 12)
    assert (answers == answers[:, :1]).all()


# Figure 1 (b)


@torch.no_grad()
def test_pictures_hold_the_last_blocks_attention_of_both_models(
    make_model: Callable[..., CoarseToFineViT],
    make_timm_model: Callable[..., nn.Module],
    make_images: Callable[..., Tensor],
) -> None:
    grid = (2, 3)
    model = make_model(coarse_grid=grid, selection="negative")
    config = model.config
    images = make_images(model, 2)
    fine: Any = make_timm_model(img_size=(16, 24), seed=1)
    small: Any = make_timm_model(img_size=(8, 12))
    small.load_state_dict({**model.backbone.state_dict(), "pos_embed": model.coarse_pos_embed})
    halves = nn.functional.interpolate(images, size=(8, 12), mode="bilinear", align_corners=True)
    expected = zip(_rows(small, halves)[-1], _rows(fine, images)[-1], explain(model, images, 0.5), strict=True)
    pictures = attention_pictures(model, fine.train(), images)
    for picture, (coarse_row, fine_row, explanation) in zip(pictures, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(picture.coarse), coarse_row.reshape(2, 3), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.from_numpy(picture.fine), fine_row.reshape(4, 6), atol=1e-5, rtol=1e-4)
        assert (picture.image == explanation.image).all()
        assert picture.image.shape == (16, 24, 3)
    assert model.config is config
    assert not fine.training
