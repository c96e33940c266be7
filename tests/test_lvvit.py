"""LV-ViT against the literal reference: alone, in two stages, from the authors' files, and token by token."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Outcome
from reference import LVViTReference, Reference
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cfvit import CoarseToFineViT, count_macs, create_model, load
from cfvit.checkpoints import initialise
from cfvit.modeling.lvvit import AUXILIARY_WEIGHT, COARSE_LOGIT_DIVISOR
from cfvit.modeling.tokens import cells_in_box

Make = Callable[..., CoarseToFineViT]
Fails = Callable[..., Any]

SMALL = "lvvit_small_patch16_224"


@torch.no_grad()
def _randomise_statistics(module: nn.Module) -> None:
    """Means and variances of batch norms as far from 0 and 1 as trained ones."""
    generator = torch.Generator().manual_seed(9)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.5, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.3, 2.0, generator=generator)


@pytest.fixture
def make(make_model: Make) -> Make:
    """A tiny LV-ViT: 48 channels, 3 heads, 5 blocks, patches of 4 pixels, 7 classes."""

    def make(**overrides: Any) -> CoarseToFineViT:
        model = make_model(backbone=SMALL, **{"coarse_grid": 3, **overrides})
        _randomise_statistics(model)
        return model

    return make


def _reference(model: CoarseToFineViT, heads: int = 3, skip_lam: float = 2.0) -> LVViTReference:
    config = model.config
    assert isinstance(config.coarse_grid, int)
    return LVViTReference(
        model.state_dict(),
        heads=heads,
        grid=config.coarse_grid,
        patch=model.image_size[0] // (2 * config.coarse_grid),
        ratio=config.informative_ratio,
        momentum=config.attention_momentum,
        skip_lam=skip_lam,
    )


def _images(model: CoarseToFineViT, count: int) -> Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _expected(reference: Reference, images: Tensor) -> tuple[Tensor, Tensor]:
    state = reference.coarse(images)
    return state.logits, reference.fine(images, state)


@torch.no_grad()
def _check(model: CoarseToFineViT, reference: LVViTReference, count: int = 2) -> None:
    images = _images(model, count)
    state, expected = model.coarse(images), reference.coarse(images)
    torch.testing.assert_close(model.backbone(images), reference.plain(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.tokens, expected.tokens[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.embedding, expected.embedding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.class_attention, expected.class_attention, atol=0, rtol=1e-5)
    torch.testing.assert_close(model.fine(images, state), reference.fine(images, expected), atol=1e-5, rtol=1e-5)


# Against the literal implementation


@pytest.mark.parametrize(("ratio", "momentum"), [(0.0, 0.99), (0.3, 0.0), (0.5, 0.99), (1.0, 0.0)])
@pytest.mark.parametrize("grid", [2, 3])
def test_both_stages_and_the_plain_network(grid: int, ratio: float, momentum: float, make: Make) -> None:
    model = make(coarse_grid=grid, informative_ratio=ratio, attention_momentum=momentum)
    _check(model, _reference(model))


def test_the_papers_grid(make: Make) -> None:
    model = make(coarse_grid=7)
    _check(model, _reference(model), count=1)


def test_the_usual_patches(make: Make) -> None:
    """Of 16 pixels, 8 places of the stem."""
    model = make(coarse_grid=2, patch_size=16)
    _check(model, _reference(model))


def test_residual_branches_are_divided_by_skip_lam(make: Make) -> None:
    model = make(skip_lam=1.5)
    _check(model, _reference(model, skip_lam=1.5))


@pytest.mark.parametrize(
    ("size", "skip_lam"), [("tiny", 1.0), ("small", 2.0), ("medium", 2.0)], ids=["tiny", "small", "medium"]
)
def test_skip_lam_of_each_size(size: str, skip_lam: float, make_model: Make) -> None:
    model = make_model(backbone=f"lvvit_{size}_patch16_224", coarse_grid=2)
    _check(model, _reference(model, skip_lam=skip_lam))


@torch.no_grad()
def test_norms_add_what_pytorch_adds(make: Make) -> None:
    """1e-5, where timm's ViTs add 1e-6: with activations small enough for it to matter."""
    model = make()
    embed: Any = model.backbone.patch_embed
    for tensor in (*embed.proj.parameters(), model.backbone.cls_token, model.backbone.pos_embed):
        assert isinstance(tensor, nn.Parameter)
        tensor.mul_(0.003)
    for tensor in (model.coarse_pos_embed, *model.backbone.norm.parameters()):
        assert tensor is not None
        tensor.mul_(0.003)
    for name in ("head", "aux_head"):  # so that the answers stay as large as they were
        model.get_parameter(f"backbone.{name}.weight").div_(0.003)
    reference = _reference(model)
    _check(model, reference)

    class _Other(LVViTReference):
        epsilon = 1e-6

    other = _Other(**vars(reference))
    images = _images(model, 1)
    for changed, expected in zip(_expected(other, images), _expected(reference, images), strict=True):
        assert (changed - expected).abs().max() > 1e-3


@torch.no_grad()
def test_the_reference_sees_each_choice(make: Make) -> None:
    """Parity proves something only if these matter to the reference's answers."""
    model = make()
    images, reference = _images(model, 2), _reference(model)
    coarse, fine = _expected(reference, images)
    no_reuse = {**reference.weights, "feature_reuse.mlp.fc2.weight": torch.zeros(48, 144)}
    others: dict[str, LVViTReference] = {
        "skip_lam": replace(reference, skip_lam=1.9),
        "ratio": replace(reference, ratio=0.3),
        "momentum": replace(reference, momentum=0.0),
        "reuse": replace(reference, weights=no_reuse),
    }
    for name in ("aux_head.weight", "patch_embed.conv3.weight", "patch_embed.bn2.running_mean"):
        weights = dict(reference.weights)
        weights[f"backbone.{name}"] = 1.1 * weights[f"backbone.{name}"]
        others[name] = replace(reference, weights=weights)
    for name, other in others.items():
        changed_coarse, changed_fine = _expected(other, images)
        assert (changed_fine - fine).abs().max() > 1e-3, name
        if name not in ("ratio", "momentum", "reuse"):
            assert (changed_coarse - coarse).abs().max() > 1e-3, name


@torch.no_grad()
def test_the_authors_quirk_is_one_constant(make: Make) -> None:
    assert COARSE_LOGIT_DIVISOR == 1 + AUXILIARY_WEIGHT == 1.25
    model = make()
    images = _images(model, 2)
    divided = model(images)
    model.backbone.coarse_logit_divisor = None  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    as_they_are = model(images)
    torch.testing.assert_close(divided.coarse * 1.25, as_they_are.coarse)
    assert torch.equal(divided.fine, as_they_are.fine)


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_batch_norms_learn_in_training_and_rest_in_evaluation(stage: str, make: Make) -> None:
    model = make()
    images = _images(model, 2)
    mean = model.get_buffer("backbone.patch_embed.bn1.running_mean")
    before = mean.clone()
    state = model.coarse(images)
    model.fine(images, state)
    assert torch.equal(mean, before)
    model.train()
    model.coarse(images) if stage == "coarse" else model.fine(images, state)
    assert not torch.equal(mean, before)


# Facts

COSTS = {  # millions of parameters; GMACs alone, coarse, both stages, both in the paper's accounting
    "tiny": ("8.53", "2.87", "0.68", "2.81", "2.92"),
    "small": ("26.15", "6.55", "1.57", "5.98", "6.15"),
    "medium": ("55.83", "12.68", "3.06", "11.29", "11.53"),
}


@pytest.mark.parametrize("size", COSTS)
def test_size_and_cost(size: str) -> None:
    """LV-ViT's paper: 8.5, 26 and 56 million parameters, 2.9 and 6.6 GMACs for T and S; CF-ViT's: 6.1 for S."""
    with torch.device("meta"):
        model = create_model(f"lvvit_{size}_patch16_224")
    macs = count_macs(model)
    parameters = sum(p.numel() for p in model.backbone.parameters())
    found = (parameters / 1e6, *(m / 1e9 for m in (macs.backbone, macs.coarse, macs.both, macs.both_in_paper)))
    assert tuple(f"{value:.2f}" for value in found) == COSTS[size]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_cost_equals_the_count_on_real_tensors(ratio: float, make: Make) -> None:
    def counted(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() // 2

    model = make(informative_ratio=ratio)
    image = _images(model, 1)
    state = model.coarse(image)
    macs = count_macs(model)
    assert macs.coarse == counted(lambda: model.coarse(image))
    assert macs.fine == counted(lambda: model.fine(image, state))
    assert macs.backbone == counted(lambda: model.backbone(image))


# The authors' files


def _authors_weights(width: int, depth: int, grid: int, classes: int, patch: int, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint's tensors by the authors' names, in the shapes of their code."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed_list.0": (1, 1 + grid**2, width),
        "pos_embed_list.1": (1, 1 + 4 * grid**2, width),
        "patch_embed.conv1.weight": (64, 3, 7, 7),
        "patch_embed.conv2.weight": (64, 64, 3, 3),
        "patch_embed.conv3.weight": (64, 64, 3, 3),
        "patch_embed.proj.weight": (width, 64, patch // 2, patch // 2),
        "patch_embed.proj.bias": (width,),
        "reuse_block.1.fc1.weight": (3 * width, width),
        "reuse_block.1.fc1.bias": (3 * width,),
        "reuse_block.1.fc2.weight": (width, 3 * width),
        "reuse_block.1.fc2.bias": (width,),
    }
    norms = [(f"patch_embed.bn{i}", 64) for i in (1, 2, 3)] + [("norm", width), ("reuse_block.0", width)]
    for i in range(depth):
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * width, width)
        for name, out, into in (("attn.proj", 1, 1), ("mlp.fc1", 3, 1), ("mlp.fc2", 1, 3)):
            shapes[f"blocks.{i}.{name}.weight"] = (out * width, into * width)
            shapes[f"blocks.{i}.{name}.bias"] = (out * width,)
        norms += [(f"blocks.{i}.norm1", width), (f"blocks.{i}.norm2", width)]
    for head in ("head", "aux_head"):
        shapes[f"{head}.weight"], shapes[f"{head}.bias"] = (classes, width), (classes,)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {}
    for name, shape in shapes.items():
        plain = shape[0] == 1 or len(shape) == 1
        weights[name] = noise(*shape) * (0.3 if plain else math.prod(shape[1:]) ** -0.5)
    for name, channels in norms:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + 0.2 * noise(channels), 0.2 * noise(channels)
    for i in (1, 2, 3):
        weights[f"patch_embed.bn{i}.running_mean"] = 0.3 * noise(64)
        weights[f"patch_embed.bn{i}.running_var"] = 0.5 + noise(64) ** 2
        weights[f"patch_embed.bn{i}.num_batches_tracked"] = torch.tensor(375300)
    return weights


def _by_reference_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "pos_embed_list.0": "coarse_pos_embed",
        "pos_embed_list.1": "backbone.pos_embed",
        "reuse_block.0": "feature_reuse.norm",
        "reuse_block.1": "feature_reuse.mlp",
    }
    renamed = {}
    for name, tensor in weights.items():
        theirs = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names[theirs] + name.removeprefix(theirs) if theirs else f"backbone.{name}"] = tensor
    return renamed


def _write(path: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"model": weights, "flop": [1.57, 6.1], "epoch": 299}, path)
    return path


@pytest.fixture(scope="module")
def authors_weights() -> dict[str, Tensor]:
    """Of a tiny one, two heads of 64 channels and 3 x 3 cells. Only to be read."""
    return _authors_weights(width=128, depth=5, grid=3, classes=5, patch=4)


@pytest.mark.parametrize(
    ("width", "depth", "grid", "classes", "patch"),
    [
        pytest.param(128, 5, 7, 5, 4, id="tiny-7"),
        pytest.param(128, 5, 9, 5, 4, id="tiny-9"),
        pytest.param(384, 16, 7, 1000, 16, id="small-7"),
    ],
)
def test_authors_checkpoint_gives_their_logits(
    width: int,
    depth: int,
    grid: int,
    classes: int,
    patch: int,
    tmp_path: Path,
    cfvit_main: Callable[..., Outcome],
) -> None:
    weights = _authors_weights(width, depth, grid, classes, patch)
    path = _write(tmp_path / "cf-lv-vit.pth", weights)
    before = hashlib.sha256(path.read_bytes()).hexdigest()

    loaded = load(path)

    assert loaded.config.backbone == SMALL
    assert (loaded.grid, loaded.image_size) == ((grid, grid), (2 * grid * patch, 2 * grid * patch))
    assert (loaded.class_names is not None) == (classes == 1000)
    images = _images(loaded, 1)
    heads = width // 64
    reference = LVViTReference(_by_reference_names(weights), heads, grid, patch, 0.5, 0.99, skip_lam=2.0)
    expected = torch.stack(_expected(reference, images))
    with torch.no_grad():
        logits = torch.stack(list(loaded(images)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    if depth == 5:
        assert cfvit_main("convert", path, tmp_path / "converted").status == 0
        with torch.no_grad():
            assert torch.equal(torch.stack(list(load(tmp_path / "converted")(images))), logits)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


@pytest.mark.parametrize(("width", "size"), [(240, "tiny"), (384, "small"), (512, "medium")])
def test_authors_width_tells_the_size(width: int, size: str, tmp_path: Path) -> None:
    """The number of heads and ``skip_lam`` are those of the published model of that width."""
    weights = _authors_weights(width, depth=1, grid=1, classes=2, patch=16)
    loaded = load(_write(tmp_path / "a.pth", weights))
    assert loaded.config.backbone == f"lvvit_{size}_patch16_224"
    assert dict(loaded.config.timm_kwargs) == {"depth": 1}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"patch_embed.bn2.running_var": None}, r"missing patch_embed\.bn2\.running_var", id="statistics"),
        pytest.param({"patch_embed.conv3.weight": None}, r"missing patch_embed\.conv3\.weight", id="convolution"),
        pytest.param({"aux_head.bias": None}, r"missing aux_head\.bias", id="auxiliary-head"),
        pytest.param({"reuse_block.1.fc2.bias": None}, r"missing reuse_block\.1\.fc2\.bias", id="reuse"),
        pytest.param({"pos_embed_list.0": None}, r"CF-LV-ViT: missing pos_embed_list\.0", id="positions"),
        pytest.param(
            {"blocks.3.attn.qkv.bias": torch.zeros(384)}, r"unknown blocks\.3\.attn\.qkv\.bias", id="unknown-bias"
        ),
        pytest.param({"patch_embed.conv4.weight": torch.zeros(1)}, r"unknown patch_embed\.conv4\.weight", id="unknown"),
        pytest.param(
            {"patch_embed.conv2.weight": torch.zeros(64, 32, 3, 3)},
            r"patch_embed\.conv2\.weight is \[64, 32, 3, 3\] where \[64, 64, 3, 3\]",
            id="misshapen-stem",
        ),
        pytest.param(
            {"aux_head.weight": torch.zeros(6, 128)}, r"aux_head\.weight is \[6, 128\] where \[5, 128\]", id="classes"
        ),
        pytest.param(
            {"pos_embed_list.1": torch.zeros(1, 36, 128)}, r"pos_embed_list\.1 is \[1, 36, 128\]", id="fine-grid"
        ),
        pytest.param({"patch_embed.proj.weight": torch.zeros(5)}, r"CF-LV-ViT: patch_embed\.proj", id="projection"),
        pytest.param({"cls_token": torch.zeros(1, 1, 100)}, "100 channels: CF-LV-ViT has a multiple of 64", id="width"),
    ],
)
def test_weights_are_named_as_the_authors_do(
    change: dict[str, Any], named: str, authors_weights: dict[str, Tensor], tmp_path: Path, fails: Fails
) -> None:
    weights = {name: tensor for name, tensor in {**authors_weights, **change}.items() if tensor is not None}
    with fails(named):
        load(_write(tmp_path / "a.pth", weights))


@torch.no_grad()
def test_statistics_of_batch_norms_are_the_files(authors_weights: dict[str, Tensor], tmp_path: Path) -> None:
    loaded = load(_write(tmp_path / "a.pth", authors_weights))
    images = _images(loaded, 1)
    for name in ("patch_embed.bn1.running_mean", "patch_embed.bn3.running_var"):
        changed = {**authors_weights, name: authors_weights[name] + 0.5}
        other = load(_write(tmp_path / "b.pth", changed))
        for stage, answer in zip(other(images), loaded(images), strict=True):
            assert (stage - answer).abs().max() > 1e-3, name
    assert loaded.state_dict()["backbone.patch_embed.bn1.num_batches_tracked"] == 375300


@pytest.mark.parametrize("classes", [5, 3])
def test_training_can_start_from_the_authors(
    classes: int, authors_weights: dict[str, Tensor], tmp_path: Path, make: Make
) -> None:
    """Both heads are kept or, for other classes, both left as they were."""
    sizes = {"embed_dim": 128, "num_heads": 2, "num_classes": classes}
    model = make(coarse_grid=2, **sizes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialise(model, str(_write(tmp_path / "a.pth", authors_weights)))
    after = model.state_dict()
    for name, tensor in _by_reference_names(authors_weights).items():
        if name.endswith("pos_embed"):
            assert after[name].shape == before[name].shape
            assert not torch.equal(after[name], before[name])
        elif name.split(".")[1] in ("head", "aux_head") and classes != 5:
            assert torch.equal(after[name], before[name]), name
        else:
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("classes", [7, 3])
@torch.no_grad()
def test_weights_of_the_plain_network_fill_the_backbone(classes: int, make: Make, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "depth": 5, "patch_size": 4}
    plain = timm.create_model(SMALL, img_size=24, num_classes=7, **sizes)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    model = create_model(
        SMALL, num_classes=classes, coarse_grid=3, pretrained_backbone=tmp_path / "plain.pth", **sizes
    ).backbone.state_dict()
    for name, tensor in plain.state_dict().items():
        is_head = name.split(".")[0] in ("head", "aux_head")
        assert (model[name].shape == tensor.shape and torch.equal(model[name], tensor)) == (
            classes == 7 or not is_head
        ), name


# Answers of tokens


@dataclass(frozen=True)
class MixTokenReference(LVViTReference):
    """Embeds all patches of all images, at either size, and exchanges those in the box with the mirror image's."""

    box: tuple[int, int, int, int]

    def _embed_patches(self, images: Tensor) -> Tensor:
        patches = super()._embed_patches(images)
        side = math.isqrt(patches.shape[1])
        top, left, bottom, right = (edge * side // self.grid for edge in self.box)
        mixed = patches.clone()
        for image in range(len(patches)):
            for row in range(top, bottom):
                for column in range(left, right):
                    place = row * side + column
                    mixed[image, place] = patches[len(patches) - 1 - image, place]
        return mixed


@torch.no_grad()
def _check_tokens(model: CoarseToFineViT, reference: LVViTReference, images: Tensor, mixed: Tensor | None) -> None:
    """Answers of the class tokens and, cell by cell, of the tokens."""
    output = model.forward_tokens(images, mixed=mixed)
    state = reference.coarse(images)
    cells = reference.grid**2
    for i, sequence in enumerate(reference.fine_sequences(images, state)):
        informative = reference.informative(state.class_attention[i])
        assert output.informative[i].tolist() == informative
        assert sorted(informative + output.others[i].tolist()) == list(range(cells))
        torch.testing.assert_close(output.coarse[i], reference.class_answer(state.tokens[i]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.fine[i], reference.class_answer(sequence), atol=1e-5, rtol=1e-5)
        answers = iter(reference.token_answers(sequence))
        by_cell = {cell: [next(answers) for _ in range(4 if cell in informative else 1)] for cell in range(cells)}
        order = [*informative, *output.others[i].tolist()]
        expected = torch.stack([answer for cell in order for answer in by_cell[cell]])
        torch.testing.assert_close(output.tokens[i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_tokens_answer_as_in_the_reference(ratio: float, make: Make) -> None:
    model = make(informative_ratio=ratio)
    _check_tokens(model, _reference(model), _images(model, 2), None)


@torch.no_grad()
def test_tokens_and_class_together_are_the_logits(make: Make) -> None:
    model = make()
    images = _images(model, 3)
    output, both = model.forward_tokens(images), model(images)
    together = output.fine + 0.25 * output.tokens.amax(dim=1)
    torch.testing.assert_close(together, both.fine)
    backbone: Any = model.backbone
    coarse = output.coarse + 0.25 * backbone.aux_head(model.coarse(images).tokens).amax(dim=1)
    torch.testing.assert_close(coarse / 1.25, both.coarse)
    whole = model.forward_tokens(images, informative_ratio=1.0)
    assert whole.tokens.shape == (3, 36, 7)
    assert whole.others.shape == (3, 0)


@pytest.mark.parametrize("box", [(0, 1, 2, 3), (1, 1, 2, 2), (0, 0, 3, 1)])
@pytest.mark.parametrize("count", [2, 3])
def test_mixed_tokens_are_exchanged_right_after_the_embedding(
    count: int, box: tuple[int, int, int, int], make: Make
) -> None:
    """The middle image of three is mixed with itself. The stem sees whole images, across the edges of the box."""
    model = make()
    reference = MixTokenReference(**vars(_reference(model)), box=box)
    _check_tokens(model, reference, _images(model, count), cells_in_box(box, (3, 3)))


@torch.no_grad()
def test_all_cells_mixed_is_the_flipped_batch_and_none_the_batch(make: Make) -> None:
    model = make()
    images = _images(model, 4)
    plain = model.forward_tokens(images)
    for mixed, expected in (
        (torch.zeros(9, dtype=torch.bool), plain),
        (torch.ones(9, dtype=torch.bool), model.forward_tokens(images.flip(0))),
    ):
        output = model.forward_tokens(images, mixed=mixed)
        for field in ("coarse", "fine", "tokens"):
            torch.testing.assert_close(getattr(output, field), getattr(expected, field), atol=1e-5, rtol=1e-5)
        assert torch.equal(output.informative, expected.informative)
    some = model.forward_tokens(images, mixed=cells_in_box((0, 0, 1, 1), (3, 3)))
    assert (some.fine - plain.fine).abs().max() > 1e-3


def test_tokens_of_a_wide_grid_can_be_mixed(make: Make) -> None:
    model = make(coarse_grid=(2, 3))
    images = _images(model, 2)
    with torch.no_grad():
        mixed = model.forward_tokens(images, mixed=cells_in_box((0, 0, 2, 3), (2, 3)))
        torch.testing.assert_close(mixed.tokens, model.forward_tokens(images.flip(0)).tokens, atol=1e-5, rtol=1e-5)


def test_gradients_of_token_answers_reach_every_parameter(make: Make) -> None:
    model = make().train()
    output = model.forward_tokens(_images(model, 2), mixed=cells_in_box((0, 0, 2, 2), (3, 3)))
    (output.coarse.square().sum() + output.fine.square().sum() + output.tokens.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_backbone_without_an_auxiliary_head_is_refused(make_model: Make, fails: Fails) -> None:
    model = make_model()
    with fails("^deit_tiny_patch16_224 has no auxiliary head for its tokens: choose an lvvit backbone$"):
        model.forward_tokens(_images(model, 1))
