"""Token labels: files of label maps, crops whose labels follow, pooling, teachers and the maps they give."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import random
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import COLOURS, Outcome
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.models._hub import save_config_for_hf
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import roi_align

import cfvit
from cfvit.data import DataSource, StoredImages, TrainImages, next_batch, open_data
from cfvit.data.trees import StoredImage
from cfvit.errors import CfvitError
from cfvit.training.teacher import Teacher, load_teacher
from cfvit.training.tokens import (
    LabelledImages,
    LabelledTransform,
    label_path_of,
    make_token_labels,
    pool_labels,
    read_label_map,
    to_label_maps,
)

Fails = Callable[..., Any]
Cli = Callable[..., Outcome]

WHOLE = [0.0, 0.0, 1.0, 1.0, 0.0]
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def _map(classes: int = 7, k: int = 3, height: int = 4, width: int = 6, seed: int = 0) -> Tensor:
    """A random label map ``[2, k, h, w]`` of distinct classes at each place."""
    generator = torch.Generator().manual_seed(seed)
    scores, order = torch.randn(classes, height, width, generator=generator).sort(dim=0, descending=True)
    return torch.stack([5 * scores[:k], order[:k].float()]).half()


# files


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Also in the published layout: written places first and then permuted, as the project does."""
    published = _map(1000, 5, 18, 18).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not published.is_contiguous()
    for label_map in (_map(), published):
        torch.save(label_map, tmp_path / "a.pt")
        read = read_label_map(tmp_path / "a.pt", 1000)
        assert torch.equal(read, label_map)
        assert read.dtype is torch.float16


class _Executed:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def _with(place: tuple[int, ...], value: float) -> Tensor:
    changed = _map()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("content", "got"),
    [
        pytest.param(_map()[0], r"\[3, 4, 6\] in torch.float16", id="three-dims"),
        pytest.param(torch.cat([_map(), _map()]), r"\[4, 3, 4, 6\]", id="four-planes"),
        pytest.param(_map()[:, :0], r"\[2, 0, 4, 6\]", id="no-scores"),
        pytest.param(_map().float(), r"\[2, 3, 4, 6\] in torch.float32", id="float32"),
        pytest.param({"map": _map()}, "a dict", id="dict"),
        *(
            pytest.param(_with((0, 1, 2, 3), score), r"\[2, 3, 4, 6\]", id=f"{score}-score")
            for score in (math.nan, math.inf)
        ),
        *(
            pytest.param(_with((1, 1, 2, 3), label), r"\[2, 3, 4, 6\]", id=f"class-{label}")
            for label in (7, -1, 0.5, math.nan, math.inf)
        ),
    ],
)
def test_what_is_no_map_is_refused(tmp_path: Path, content: Any, got: str, fails: Fails) -> None:
    torch.save(content, tmp_path / "a.pt")
    with fails(f"a.pt is {got}.*, not .* of finite scores and classes below 7: remove it and run cfvit token-labels"):
        read_label_map(tmp_path / "a.pt", 7)


def test_missing_and_damaged_maps_are_refused(tmp_path: Path, fails: Fails) -> None:
    with fails("no label map at .*a.pt: make the missing ones with cfvit token-labels"):
        read_label_map(tmp_path / "a.pt", 7)
    torch.save(_map(), tmp_path / "whole.pt")
    for content in ((tmp_path / "whole.pt").read_bytes()[:300], b""):
        (tmp_path / "a.pt").write_bytes(content)
        with fails("a.pt is damaged"):
            read_label_map(tmp_path / "a.pt", 7)


def test_nothing_in_a_file_is_executed(tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(_Executed(), tmp_path / "a.pt")
    with fails("it is more than a tensor"):
        read_label_map(tmp_path / "a.pt", 7)
    assert capsys.readouterr().out == ""


def _source_of(name: str) -> DataSource:
    return DataSource(StoredImages([name], [StoredImage("a.png")], [0]), ["a", "b"])


def test_paths_of_maps(fails: Fails) -> None:
    for name, expected in (
        ("n01440764/n01440764_10026.JPEG", "labels/n01440764/n01440764_10026.pt"),
        ("red/sunset.v2.png", "labels/red/sunset.v2.pt"),
    ):
        assert label_path_of(Path("labels"), _source_of(name), 0) == Path(expected)
    for name in ("a.png", "../a.png"):
        with fails("has no class folder"):
            label_path_of(Path("labels"), _source_of(name), 0)


def _tar(file: Path, folder: Path) -> Path:
    with tarfile.open(file, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return file


def test_paths_follow_the_classes_of_folders_and_tars(make_colours: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_colours("n02099601", per_class=2)
    tars = tmp_path / "tars"
    tars.mkdir()
    for colour in COLOURS:
        _tar(tars / f"{colour}.tar", folder / colour)
    tar_of_tars = _tar(tmp_path / "tars.tar", tars)
    expected = [Path("labels") / colour / f"{i}.pt" for colour in COLOURS for i in range(2)]
    for data in (folder, _tar(tmp_path / "data.tar", folder), tar_of_tars):
        source = open_data(str(data))
        found = [label_path_of(Path("labels"), source, i) for i in range(len(source))]
        assert sorted(found) == expected
        for index, path in enumerate(found):
            assert path.parent.name == source.class_names[source.read(index)[1]]


def test_paths_keep_imagenets_identifiers(tmp_path: Path) -> None:
    for wnid in ("n01440764", "n02099601"):
        (tmp_path / wnid).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / wnid / "a.png")
    source = open_data(str(tmp_path))
    assert source.class_names == ["tench", "golden retriever"]
    assert label_path_of(Path("labels"), source, 0) == Path("labels/n01440764/a.pt")


# crops


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _photo(width: int = 50, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"}, id="deit"),
        pytest.param({"interpolation": "random", "color_jitter": 0.3}, id="random-interpolation"),
        pytest.param({"hflip": 0.0, "color_jitter": None}, id="no-flip"),
        pytest.param({"hflip": 1.0, "scale": (0.5, 1.0), "interpolation": "bicubic"}, id="always-flipped"),
    ],
)
def test_images_are_timms_own(options: dict[str, Any]) -> None:
    ours = LabelledTransform((3, 16, 16), **options)
    timms: Any = create_transform((3, 16, 16), is_training=True, **options)
    photo, windows = _photo(), set()
    for seed in range(10):
        _seed(seed)
        expected = timms(photo)
        _seed(seed)
        image, window = ours(photo)
        assert torch.equal(image, expected)
        windows.add(tuple(window.tolist()))
    assert len(windows) == 10


def _coordinates(width: int, height: int) -> Image.Image:
    """Red is the place from left to right, green that from top to bottom, of 255."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.stack([255 * x, 255 * y, 0 * x], -1).round().astype(np.uint8))


def test_the_window_is_what_the_image_shows() -> None:
    transform = LabelledTransform((3, 20, 30), color_jitter=None, hflip=0.5, scale=(0.1, 0.6), **PLAIN)
    flips = 0
    for seed in range(12):
        _seed(seed)
        image, (top, left, height, width, flipped) = transform(_coordinates(300, 200))
        across = left + width * (torch.arange(30) + 0.5) / 30
        down = top + height * (torch.arange(20) + 0.5) / 20
        across = across.flip(0) if flipped else across
        inner = (slice(2, -2), slice(2, -2))  # resizing does not look beyond the crop
        assert (image[0] - across[None, :])[inner].abs().max() < 0.01
        assert (image[1] - down[:, None])[inner].abs().max() < 0.01
        flips += int(flipped)
    assert 0 < flips < 12


@pytest.mark.parametrize("options", [{"vflip": 0.5}, {"vflip": 0.5, "hflip": 0.0}, {"train_crop_mode": "rkrc"}])
def test_other_geometry_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="token labels cannot follow"):
        LabelledTransform((3, 16, 16), **options)


def test_windows_depend_on_the_images_seed_alone(make_colours: Callable[..., Path]) -> None:
    images = TrainImages(open_data(str(make_colours())), range(12), LabelledTransform((3, 8, 8)))
    keys: Any = [(position, 10 + position) for position in range(12)]
    items: list[Any] = [images[key] for key in keys]
    alone = [window for (_, window), _ in items]
    ((_, windows), _), *_ = DataLoader(images, 12, sampler=keys, num_workers=1)
    assert torch.equal(windows, torch.stack(alone))
    assert len(windows.unique(dim=0)) == 12


# pooling


def _quadrants() -> Tensor:
    """``[1, 2, 1, 8, 8]``: class 1, 2, 3, 4 with score 9 in the quadrants, in reading order."""
    classes = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return torch.stack([torch.full((1, 8, 8), 9.0), classes[None]])[None].half()


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 7), (3, 5)])
@pytest.mark.parametrize("quadrant", [0, 1, 2, 3])
def test_a_crop_within_a_quadrant_has_its_class_everywhere(quadrant: int, grid: tuple[int, int]) -> None:
    row, column = divmod(quadrant, 2)
    window = torch.tensor([[row / 2 + 0.0625, column / 2 + 0.0625, 0.375, 0.375, 0.0]])
    labels = pool_labels(_quadrants(), window, grid, 6)
    expected = F.one_hot(torch.tensor(1 + quadrant), 6) * 9.0
    assert torch.allclose(labels, expected.softmax(-1).expand(1, grid[0] * grid[1], 6), atol=1e-6)


def test_the_whole_window_shows_the_quadrants_where_they_are() -> None:
    labels = pool_labels(_quadrants().expand(2, -1, -1, -1, -1), torch.tensor([WHOLE, [*WHOLE[:4], 1.0]]), (2, 2), 5)
    assert labels.argmax(-1).tolist() == [[1, 2, 3, 4], [2, 1, 4, 3]]


def test_a_flip_mirrors_the_columns() -> None:
    maps = torch.stack([_map()] * 2)
    window = [0.1, 0.3, 0.7, 0.5]
    straight, flipped = pool_labels(maps, torch.tensor([[*window, 0.0], [*window, 1.0]]), (3, 5), 7)
    assert torch.equal(flipped.view(3, 5, 7), straight.view(3, 5, 7).flip(1))
    assert not torch.allclose(flipped, straight)


def _sample(plane: Tensor, y: float, x: float) -> float:
    """Bilinear between the middles of places, the outermost going on to the border."""
    height, width = plane.shape
    y, x = min(max(y - 0.5, 0), height - 1), min(max(x - 0.5, 0), width - 1)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    total = 0.0
    for i in (top, top + 1):
        for j in (left, left + 1):
            total += (1 - abs(y - i)) * (1 - abs(x - j)) * plane[i, j].item()
    return total


def _slow_pool(label_map: Tensor, window: list[float], grid: tuple[int, int], classes: int) -> Tensor:
    """One image's labels, a cell, a class and a sample at a time."""
    _, k, height, width = label_map.shape
    scores = torch.zeros(classes, height, width)
    for rank in range(k):
        for i in range(height):
            for j in range(width):
                scores[int(label_map[1, rank, i, j]), i, j] = label_map[0, rank, i, j]
    top, left, tall, wide = window[0] * height, window[1] * width, window[2] * height, window[3] * width
    down, across = math.ceil(tall / grid[0]), math.ceil(wide / grid[1])
    labels = torch.zeros(*grid, classes)
    for row in range(grid[0]):
        for column in range(grid[1]):
            shown = grid[1] - 1 - column if window[4] else column
            for name in range(classes):
                samples = [
                    _sample(
                        scores[name],
                        top + (row + (a + 0.5) / down) * tall / grid[0],
                        left + (column + (b + 0.5) / across) * wide / grid[1],
                    )
                    for a in range(down)
                    for b in range(across)
                ]
                labels[row, shown, name] = sum(samples) / len(samples)
    return labels.flatten(0, 1).softmax(-1)


@pytest.mark.parametrize("grid", [(2, 2), (1, 1), (4, 3)])
def test_labels_are_the_mean_of_bilinear_samples(grid: tuple[int, int]) -> None:
    windows = [WHOLE, [0.13, 0.21, 0.55, 0.47, 0.0], [0.0, 0.52, 0.9, 0.41, 1.0]]
    maps = [_map(seed=seed) for seed in range(3)]
    labels = pool_labels(torch.stack(maps), torch.tensor(windows), grid, 7)
    for i in range(3):
        assert torch.allclose(labels[i], _slow_pool(maps[i], windows[i], grid, 7), atol=1e-5)


def test_labels_are_those_of_the_published_models() -> None:
    """LV-ViT's project shifts the box by half a place and leaves torchvision's older alignment."""
    label_map = _map(20, 5, 18, 18)
    scores = torch.zeros(1, 20, 18, 18).scatter_(1, label_map[None, 1].long(), label_map[None, 0].float())
    top, left, height, width = 0.1, 0.25, 0.6, 0.7
    box = 18 * torch.tensor([left, top, left + width, top + height]) - 0.5
    theirs = roi_align(scores, torch.cat([torch.zeros(1), box])[None], (14, 14)).flatten(2).transpose(1, 2)
    ours = pool_labels(label_map[None], torch.tensor([[top, left, height, width, 0.0]]), (14, 14), 20)
    assert torch.allclose(ours, theirs.softmax(-1), atol=1e-5)


def test_labels_are_float32_probabilities_whatever_the_precision_around() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        labels = pool_labels(_map(1000, 5, 18, 18)[None], torch.tensor([WHOLE]), (14, 14), 1000)
    assert labels.shape == (1, 196, 1000)
    assert labels.dtype is torch.float32
    assert torch.allclose(labels.sum(-1), torch.ones(1, 196))


def test_labels_follow_the_crop_of_the_image() -> None:
    """An image painted like its label map: after any crop and flip each cell's label is its colour."""
    palette = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    maps = _quadrants()
    painted = palette[maps[0, 1, 0].long()].repeat_interleave(15, 0).repeat_interleave(20, 1)
    transform = LabelledTransform((3, 32, 32), color_jitter=None, scale=(0.2, 1.0), **PLAIN)
    clear = 0
    for seed in range(15):
        _seed(seed)
        image, window = transform(Image.fromarray(painted.numpy()))
        labels = pool_labels(maps, window[None], (8, 8), 5)[0]
        cells = F.avg_pool2d(image, 4).flatten(1).T  # [64, 3]
        distances = torch.cdist(cells, palette.float() / 255)
        sure = (distances.min(-1).values < 0.05) & (labels.max(-1).values > 0.99)  # not on a border
        assert torch.equal(labels.argmax(-1)[sure], distances.argmin(-1)[sure])
        clear += int(sure.sum())
    assert clear > 15 * 64 / 2


# teachers


def _save_weights(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture
def make_teacher(tmp_path: Path) -> Callable[..., Teacher]:
    """A teacher of random weights, read from a file."""

    def make(name: str, num_classes: int = 7, **options: Any) -> Teacher:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=num_classes)
        return load_teacher(name, num_classes, _save_weights(model, tmp_path / "weights.safetensors"), **options)

    return make


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet10t", 6),
        ("test_efficientnet", 5),
        ("test_convnext", 5),
        ("test_nfnet", 5),
        ("test_byobnet", 5),
        ("test_mambaout", 5),  # channels last
        ("mobilenetv3_small_050", 7),  # convolution after the pooling
        ("test_vit", 10),  # class token
        ("test_vit2", 10),  # average of the patches, class token besides
        ("test_vit3", 10),  # attention pooling
    ],
)
def test_teachers_give_a_map_of_logits(make_teacher: Callable[..., Teacher], name: str, side: int) -> None:
    teacher = make_teacher(name)
    images = torch.randn(2, *teacher.data_config["input_size"])
    logits = teacher.dense(images)
    assert logits.shape == (2, 7, side, side)
    assert torch.equal(teacher.places(images), logits)  # a student that normalises alike
    assert torch.allclose(teacher.dense(images[1:]), logits[1:], atol=1e-5)
    assert logits.flatten(2).std(-1).min() > 0


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "test_resnet"])
def test_places_of_a_plain_network_average_to_its_answer(make_teacher: Callable[..., Teacher], name: str) -> None:
    teacher = make_teacher(name)
    images = torch.randn(2, *teacher.data_config["input_size"])
    with torch.no_grad():
        expected = teacher.model(images)
    assert torch.allclose(teacher.dense(images).mean((2, 3)), expected, atol=1e-5)


def test_places_are_where_they_are_in_the_image(make_teacher: Callable[..., Teacher]) -> None:
    """A change in the lower left moves the logits there most, for maps of either layout and for tokens."""
    for name in ("test_efficientnet", "test_mambaout", "test_vit"):
        teacher = make_teacher(name)
        images = torch.zeros(1, 3, 160, 160)
        changed = images.clone()
        changed[:, :, 112:, :48] = torch.randn(3, 48, 48)
        moved = (teacher.dense(changed) - teacher.dense(images)).abs().sum((0, 1))
        row, column = divmod(int(moved.argmax()), moved.shape[1])
        assert row > 0.6 * moved.shape[0], name
        assert column < 0.3 * moved.shape[1], name


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_a_vits_patches_get_its_classifier(make_teacher: Callable[..., Teacher], name: str) -> None:
    teacher = make_teacher(name)
    images = torch.randn(2, 3, 160, 160)
    tokens = teacher.model.forward_features(images)[:, 1:]
    logits = teacher.dense(images)
    for row, column in ((0, 0), (3, 7), (9, 9)):
        expected = teacher.model.head(teacher.model.fc_norm(tokens[:, 10 * row + column]))
        assert torch.allclose(logits[:, :, row, column], expected, atol=1e-5)


def _teacher_of(model: nn.Module, config: dict[str, Any] = PLAIN, student: dict[str, Any] = PLAIN) -> Teacher:
    return Teacher("tiny", model.eval(), {"input_size": (3, 64, 64), "interpolation": "bilinear", **config}, student)


@torch.no_grad()
def test_distilled_teachers_answer_with_both_heads() -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 24, "num_heads": 2, "depth": 2, "img_size": (64, 96), "num_classes": 7}
    model: Any = timm.create_model("deit_tiny_distilled_patch16_224", **small).eval()
    images = torch.randn(2, 3, 64, 96)
    logits = _teacher_of(model).dense(images)
    assert logits.shape == (2, 7, 4, 6)
    token = model.forward_features(images)[:, 2 + 6 * 1 + 4]
    assert torch.allclose(logits[:, :, 1, 4], (model.head(token) + model.head_dist(token)) / 2, atol=1e-5)


@torch.no_grad()
def test_a_head_for_tokens_is_used_where_there_is_one() -> None:
    torch.manual_seed(0)
    model: Any = VOLO([1] * 4, img_size=64, embed_dims=[24] * 4, num_heads=[2] * 4, num_classes=7).eval()
    images = torch.randn(1, 3, 64, 64)
    tokens = model.forward_features(images)[:, 1:]
    logits = _teacher_of(model).dense(images)
    assert logits.shape == (1, 7, 4, 4)
    assert torch.allclose(logits.flatten(2).transpose(1, 2), model.aux_head(tokens), atol=1e-5)


@torch.no_grad()
def test_a_swin_teacher_reads_its_channels_last() -> None:
    small: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "img_size": 64}
    model: Any = timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, **small).eval()
    images = torch.randn(2, 3, 64, 64)
    logits = _teacher_of(model).dense(images)
    assert logits.shape == (2, 7, 8, 8)
    assert torch.allclose(logits.mean((2, 3)), model(images), atol=1e-5)


def test_images_of_the_student_are_normalised_and_resized_for_the_teacher() -> None:
    own = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    student = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}

    def normalised(pixels: Tensor, config: dict[str, Any]) -> Tensor:
        mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (pixels - mean) / std

    teacher = _teacher_of(_Colours(), own, student)
    pixels = torch.rand(2, 3, 64, 64)
    seen = teacher.places(normalised(pixels, student))
    assert torch.allclose(seen, teacher.dense(normalised(pixels, own)), atol=1e-5)
    coarse = F.interpolate(pixels, (128, 96), mode="nearest")
    assert teacher.places(normalised(coarse, student)).shape == seen.shape
    small = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    large = F.interpolate(small, (64, 64), mode="bilinear")
    assert torch.allclose(teacher.places(normalised(small, student)), teacher.dense(normalised(large, own)), atol=1e-5)


def test_a_teachers_answers_can_be_learnt_from(make_teacher: Callable[..., Teacher]) -> None:
    teacher = make_teacher("test_efficientnet")
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    targets = teacher.places(images)
    assert not teacher.dense(images).requires_grad
    assert not targets.requires_grad
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    student = torch.zeros_like(targets, requires_grad=True)
    F.cross_entropy(student, targets.softmax(1)).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_a_local_folder_is_a_teacher(tmp_path: Path, fails: Fails) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_efficientnet", num_classes=3)
    _save_weights(model, tmp_path / "model.safetensors")
    save_config_for_hf(model, str(tmp_path / "config.json"), model_config={"label_names": list(COLOURS)})
    teacher = load_teacher(f"local-dir:{tmp_path}", 3)
    assert teacher.class_names == list(COLOURS)
    assert torch.equal(teacher.model.classifier.weight, model.classifier.weight)
    with fails(f"teacher local-dir:{tmp_path} has 3 classes, the data 4: give a teacher trained on"):
        load_teacher(f"local-dir:{tmp_path}", 4).require_classes([*COLOURS, "yellow"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])  # timm's VisionTransformer and Eva
def test_a_vits_positions_are_resampled_to_its_usual_size(name: str, tmp_path: Path, fails: Fails) -> None:
    torch.manual_seed(0)
    small: Any = timm.create_model(name, img_size=112, num_classes=7)
    weights = _save_weights(small, tmp_path / "small.safetensors")
    teacher = load_teacher(name, 7, weights)
    source = {"file": str(weights), "num_classes": 7}
    expected: Any = timm.create_model(name, num_classes=7, pretrained=True, pretrained_cfg_overlay=source)
    assert teacher.data_config["input_size"][-1] > 112
    assert teacher.model.pos_embed.shape != small.pos_embed.shape
    assert teacher.weights_sha256() == dataclasses.replace(teacher, model=expected).weights_sha256()
    with fails(r"small.safetensors does not fit the teacher .*: head.bias is \[7\] where \[6\]"):
        load_teacher(name, 6, weights)


def test_folders_that_are_no_teachers_are_refused(
    colour_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    with fails(f"teacher local-dir:{colour_model} is no plain timm model by its config.json: give"):
        load_teacher(f"local-dir:{colour_model}", 3)
    with fails(f"teacher local-dir:{colour_model} is no plain timm model"):
        load_teacher(str(colour_model), 3)
    monkeypatch.chdir(colour_model.parent)
    with fails("teacher local-dir:model is no plain timm model"):
        load_teacher("model", 3)
    (tmp_path / "config.json").write_text("{")
    with fails(f"teacher local-dir:{tmp_path} cannot be had"):
        load_teacher(f"local-dir:{tmp_path}", 3)


def test_the_digest_is_of_weights_and_their_names(make_teacher: Callable[..., Teacher]) -> None:
    teacher = make_teacher("test_efficientnet")
    digest = teacher.weights_sha256()
    assert make_teacher("test_efficientnet").weights_sha256() == digest
    assert make_teacher("test_resnet").weights_sha256() != digest
    teacher.model.classifier.bias[3] += 1e-6
    assert teacher.weights_sha256() != digest


def test_teachers_that_cannot_be_had_are_refused(tmp_path: Path, fails: Fails) -> None:
    for name in ("nosuch", "resnet10t.nosuch", f"local-dir:{tmp_path}", "test_vit"):  # the last is not on this disk
        with fails(f"teacher {name} cannot be had.*give a timm model"):
            load_teacher(name, 7)
    with fails("no weights at .*absent"):
        load_teacher("test_vit", 7, tmp_path / "absent.pth")
    weights = _save_weights(timm.create_model("test_efficientnet", num_classes=7), tmp_path / "a.safetensors")
    with fails(r"does not fit the teacher test_efficientnet: classifier.bias is \[7\] where \[6\]"):
        load_teacher("test_efficientnet", 6, weights)
    with fails("does not fit the teacher test_resnet: missing conv1"):
        load_teacher("test_resnet", 7, weights)
    odd = {**timm.create_model("test_vit", num_classes=7).state_dict(), "pos_embed": torch.zeros(1, 8, 64)}
    save_file(odd, tmp_path / "odd.safetensors")
    with fails("odd.safetensors has 8 positions, which are not 1 of class token"):
        load_teacher("test_vit", 7, tmp_path / "odd.safetensors")


def test_models_without_places_are_refused(
    make_teacher: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    made = timm.create_model

    def pooled(*arguments: Any, **options: Any) -> Any:
        model: Any = made(*arguments, **options)
        model.forward_features = lambda images: images.mean((2, 3))
        return model

    monkeypatch.setattr(timm, "create_model", pooled)
    with fails("teacher test_vit cannot be asked at each place .*neither a map nor tokens"):
        make_teacher("test_vit").require_dense()


def test_tokens_that_tile_no_grid_are_refused(fails: Fails) -> None:
    class Odd(nn.Module):
        def forward_features(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), 12, 8)

    with fails("12 tokens do not tile an image of 64 x 64"):
        _teacher_of(Odd()).dense(torch.zeros(1, 3, 64, 64))


# making maps


class _Colours(nn.Module):
    """Knows the colours of `COLOURS`, in patches of 8 x 8: a class's logit is 10 times its channel."""

    num_classes, num_features = 3, 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward_features(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 8).flip(1) * self.scale  # blue, green, red

    def forward_head(self, places: Tensor) -> Tensor:
        return places.flatten(1)


@pytest.fixture
def colours_teacher() -> Teacher:
    return _teacher_of(_Colours())


def _read_all(folder: Path) -> dict[str, Tensor]:
    return {path.relative_to(folder).as_posix(): read_label_map(path, 3) for path in sorted(folder.rglob("*.pt"))}


def test_maps_show_where_the_teacher_sees_what(tmp_path: Path, colours_teacher: Teacher) -> None:
    """A wide photo, red on the left and blue on the right, as a whole; its crops then have labels that fit."""
    photo = Image.new("RGB", (120, 40), (255, 0, 0))
    photo.paste((0, 0, 255), (60, 0, 120, 40))
    for name in ("blue", "green", "red"):
        (tmp_path / "data" / name).mkdir(parents=True)
        photo.save(tmp_path / "data" / name / "a.png")
    counts = make_token_labels(open_data(str(tmp_path / "data")), colours_teacher, tmp_path / "maps", workers=0)
    assert (counts.made, counts.kept, counts.unreadable) == (3, 0, [])
    label_map = read_label_map(tmp_path / "maps" / "green" / "a.pt", 3)
    assert label_map.shape == (2, 3, 18, 18)
    assert (label_map[1, 0, :, :8] == 2).all()
    assert (label_map[1, 0, :, 10:] == 0).all()
    assert (label_map[0, :-1] >= label_map[0, 1:]).all()
    assert label_map[0, 0, 0, 0] == 0
    assert label_map[0, -1, 0, 0] == -10
    labels = pool_labels(label_map[None], torch.tensor([[0.2, 0.0, 0.5, 0.4, 0.0]]), (2, 2), 3)
    assert (labels.argmax(-1) == 2).all()


KINDS = {"around zero": (2, 0), "sigmoids": (2, -8), "far": (2, 1000), "flat": (0, 5), "peaked": (20, -8)}


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 1000])
@pytest.mark.parametrize(("scale", "shift"), KINDS.values(), ids=KINDS)
def test_a_map_gives_back_what_the_teacher_said(classes: int, scale: float, shift: float) -> None:
    """At each place the stored classes have the teacher's probabilities, the others share the rest."""
    logits = shift + scale * torch.randn(2, classes, 4, 4, generator=torch.Generator().manual_seed(classes))
    maps = to_label_maps(logits, 4)
    assert (maps.shape, maps.dtype) == ((2, 2, min(5, classes), 4, 4), torch.float16)
    labels = pool_labels(maps, torch.tensor([WHOLE] * 2), (4, 4), classes)
    labels = labels.transpose(1, 2).view(2, classes, 4, 4)
    expected, stored = logits.softmax(1), maps[:, 1].long()
    assert torch.allclose(labels.gather(1, stored), expected.gather(1, stored), atol=0.01)
    others = torch.ones_like(labels, dtype=torch.bool).scatter(1, stored, False)
    assert torch.allclose((labels * others).sum(1), (expected * others).sum(1), atol=0.01)


@pytest.mark.parametrize("classes", [3, 1000])
def test_scores_beyond_half_precision_keep_their_order(classes: int) -> None:
    logits = torch.zeros(1, classes, 1, 1)
    logits[:, :3, 0, 0] = torch.tensor([1e9, 1e9 - 6400, -1e9])
    maps = to_label_maps(logits, 1)
    assert maps.isfinite().all()
    assert maps[0, 1, :2, 0, 0].tolist() == [0, 1]
    assert float(maps[0, 0, 0] - maps[0, 0, 1]) == pytest.approx(6400, rel=0.01)
    assert pool_labels(maps, torch.tensor([WHOLE]), (1, 1), classes)[0, 0].tolist() == [1] + [0] * (classes - 1)


def test_maps_are_the_teachers_highest_scores(make_teacher: Callable[..., Teacher], tmp_path: Path) -> None:
    """Seven classes, of which five are kept, over the mean of the others; the same for any batch size."""
    for i in range(7):
        (tmp_path / "data" / f"class {i}").mkdir(parents=True)
        _photo(40 + i, 30).save(tmp_path / "data" / f"class {i}" / "a.png")
    source, teacher = open_data(str(tmp_path / "data")), make_teacher("test_efficientnet")
    make_token_labels(source, teacher, tmp_path / "maps", size=6, batch_size=3, workers=0)
    squash = {**teacher.data_config, "crop_pct": 1.0, "crop_mode": "squash"}
    transform: Any = create_transform(**squash, is_training=False)
    for index in range(7):
        logits = teacher.dense(transform(source.read(index)[0])[None])
        scores, classes = F.interpolate(logits, (6, 6), mode="bilinear")[0].sort(dim=0, descending=True)
        scores, classes = scores[:5] - scores[5:].exp().mean(0).log(), classes[:5]
        label_map = read_label_map(label_path_of(tmp_path / "maps", source, index), 7)
        assert label_map.shape == (2, 5, 6, 6)
        assert torch.allclose(label_map[0].float(), scores, atol=2e-3, rtol=2e-3)
        assert (label_map[1] == classes).float().mean() > 0.95  # equal scores may change places


def test_folder_and_tar_give_the_same_maps(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path
) -> None:
    folder = make_colours()
    tar = _tar(tmp_path / "data.tar", folder)
    for data, out, workers in ((folder, "a", 0), (tar, "b", 1)):
        assert make_token_labels(open_data(str(data)), colours_teacher, tmp_path / out, workers=workers).made == 12
    first, second = _read_all(tmp_path / "a"), _read_all(tmp_path / "b")
    assert list(first) == list(second) == [f"{colour}/{i}.pt" for colour in sorted(COLOURS) for i in range(4)]
    assert all(torch.equal(first[name], second[name]) for name in first)
    sizes = {path.stat().st_size for path in (tmp_path / "a").rglob("*.pt")}
    assert max(sizes) < 2 * 3 * 18 * 18 * 2 + 2000  # of its own map alone, not of the batch


def test_maps_that_are_there_are_kept(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path
) -> None:
    source, out = open_data(str(make_colours(per_class=2))), tmp_path / "maps"
    make_token_labels(source, colours_teacher, out, workers=0)
    before = _read_all(out)
    (out / "red" / "0.pt").unlink()
    (out / "blue" / "1.pt").write_bytes(b"damaged")
    torch.save(before["blue/0.pt"][:, :, :9, :9].clone(), out / "blue" / "0.pt")  # of another shape
    kept = torch.zeros(2, 3, 18, 18).half()
    torch.save(kept, out / "green" / "0.pt")
    counts = make_token_labels(source, colours_teacher, out, workers=0)
    assert (counts.made, counts.kept, counts.unreadable) == (3, 3, [])
    after = _read_all(out)
    assert torch.equal(after.pop("green/0.pt"), kept)
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert make_token_labels(source, colours_teacher, out, workers=0).kept == 6
    assert [path.name for path in out.rglob(".*")] == []


def test_the_folder_says_what_its_maps_are_of(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path
) -> None:
    make_token_labels(open_data(str(make_colours(per_class=1))), colours_teacher, tmp_path / "maps", size=4, workers=0)
    assert json.loads((tmp_path / "maps" / "labels.json").read_text()) == {
        "teacher": "tiny",
        "weights_sha256": colours_teacher.weights_sha256(),
        "class_names": list(COLOURS),
        "size": 4,
        "cfvit": cfvit.__version__,
    }


def test_maps_of_another_origin_are_not_mixed(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path, fails: Fails
) -> None:
    folder, out = make_colours(per_class=1), tmp_path / "maps"
    source = open_data(str(folder))
    make_token_labels(source, colours_teacher, out, workers=0)
    before = _read_all(out)

    def make(source: Any = source, teacher: Teacher = colours_teacher) -> int:
        return make_token_labels(source, teacher, out, workers=0).kept

    assert make(teacher=dataclasses.replace(colours_teacher, name="moved")) == 3  # the weights are what counts
    with fails("maps are of 18 x 18 places, not 9: give another --out, or remove the folder"):
        make_token_labels(source, colours_teacher, out, size=9, workers=0)
    (folder / "red").rename(folder / "rosy")
    with fails("maps are of other classes .class 2 is 'rosy' here, 'red' there.: give another --out, or remove the"):
        make(open_data(str(folder)))
    colours_teacher.model.scale.data.fill_(9)
    with fails("maps are by teacher tiny, with other weights: give another --out, or remove the folder"):
        make()
    with fails("maps are by teacher tiny, not other: give another --out, or remove the folder"):
        make(teacher=dataclasses.replace(colours_teacher, name="other"))
    (out / "labels.json").write_text('{"teacher": "tiny"}')
    with fails(r"labels.json is damaged \(.*weights_sha256 is missing\): remove .*maps and make the maps again"):
        make()
    (out / "labels.json").unlink()
    with fails("maps holds label maps of unknown origin, without labels.json: give another --out"):
        make()
    assert all(torch.equal(label_map, before[name]) for name, label_map in _read_all(out).items())


def test_unreadable_images_are_named_and_the_others_made(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path
) -> None:
    folder = make_colours(per_class=2)
    (folder / "green" / "1.png").write_bytes(b"damaged")
    source = open_data(str(folder))
    for there in (0, 5):
        counts = make_token_labels(source, colours_teacher, tmp_path / "maps", batch_size=2, workers=0)
        assert (counts.made, counts.kept) == (5 - there, there)
        ((name, reason),) = counts.unreadable
        assert name == "green/1.png"
        assert reason.startswith("not an image")
    assert len(_read_all(tmp_path / "maps")) == 5


def test_images_that_would_share_a_map_are_refused(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path, fails: Fails
) -> None:
    folder = make_colours(per_class=2)
    Image.new("RGB", (8, 8)).save(folder / "red" / "1.webp")
    with fails("red/1.(png|webp) and red/1.(png|webp) would share a label map: rename one"):
        make_token_labels(open_data(str(folder)), colours_teacher, tmp_path / "maps", workers=0)
    assert not (tmp_path / "maps").exists()


def test_maps_within_the_data_are_refused(
    make_colours: Callable[..., Path], colours_teacher: Teacher, fails: Fails
) -> None:
    folder = make_colours(per_class=1)
    with fails("lies within the data"):
        make_token_labels(open_data(str(folder)), colours_teacher, folder / "maps", workers=0)
    assert not (folder / "maps").exists()


def test_a_teacher_of_other_classes_is_refused(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path, fails: Fails
) -> None:
    folder = make_colours(per_class=1)
    source = open_data(str(folder))
    named = dataclasses.replace(colours_teacher, class_names=["blue", "red", "green"])
    with fails("teacher tiny has other classes, class 1 is 'green' here, 'red' there: give one trained"):
        make_token_labels(source, named, tmp_path / "maps", workers=0)
    shutil.copytree(folder / "red", folder / "yellow")
    with fails("teacher tiny has 3 classes, the data 4"):
        make_token_labels(open_data(str(folder)), colours_teacher, tmp_path / "maps", workers=0)


def test_more_classes_than_half_precision_counts_are_refused(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path, monkeypatch: Any, fails: Fails
) -> None:
    assert torch.equal(torch.arange(2049).half().long(), torch.arange(2049))
    assert int(torch.tensor(2049).half()) != 2049
    monkeypatch.setattr("cfvit.training.tokens.MAX_CLASSES", 2)
    with fails("3 classes are more than label maps can hold, 2"):
        make_token_labels(open_data(str(make_colours(per_class=1))), colours_teacher, tmp_path / "maps", workers=0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(
    scale: float,
    make_colours: Callable[..., Path],
    colours_teacher: Teacher,
    tmp_path: Path,
    fails: Fails,
) -> None:
    colours_teacher.model.scale.data.fill_(scale)
    with fails("scores that are not finite"):
        make_token_labels(open_data(str(make_colours(per_class=1))), colours_teacher, tmp_path / "maps", workers=0)


def test_a_full_disk_is_said_in_one_line(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path, monkeypatch: Any, fails: Fails
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with fails(r"cannot write .*maps/blue/0.pt \(No space left on device\): make room"):
        make_token_labels(open_data(str(make_colours(per_class=1))), colours_teacher, tmp_path / "maps", workers=0)
    assert [path.name for path in (tmp_path / "maps").rglob("*") if path.is_file()] == ["labels.json"]


# training with maps


def _labelled(data: Path, maps: Path, indices: Sequence[int] | None = None) -> LabelledImages:
    source = open_data(str(data))
    return LabelledImages(source, range(len(source)) if indices is None else indices, TRANSFORM, maps)


TRANSFORM = LabelledTransform((3, 8, 8))


@pytest.fixture
def labelled_colours(
    make_colours: Callable[..., Path], colours_teacher: Teacher, tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """Two images of each colour, of which one is damaged if so wished, and their maps."""

    def make(damaged: str | None = None) -> tuple[Path, Path]:
        folder = make_colours(per_class=2)
        if damaged:
            (folder / damaged).write_bytes(b"damaged")
        make_token_labels(open_data(str(folder)), colours_teacher, tmp_path / "maps", workers=0)
        return folder, tmp_path / "maps"

    return make


def test_an_image_comes_with_its_map(labelled_colours: Callable[..., tuple[Path, Path]]) -> None:
    folder, maps = labelled_colours()
    images = _labelled(folder, maps, [4, 1])
    tensor, target, label_map, window = images[1, 7]
    assert (tensor.shape, target, window.shape) == ((3, 8, 8), 0, (5,))
    assert torch.equal(label_map, read_label_map(maps / "blue" / "1.pt", 3))


def test_an_unreadable_image_needs_no_map(labelled_colours: Callable[..., tuple[Path, Path]], fails: Fails) -> None:
    folder, maps = labelled_colours("green/1.png")
    with pytest.warns(UserWarning, match=r"skipped green/1\.png: not an image"):
        images = _labelled(folder, maps)
    assert [images.source.name(index) for index in images.indices] == [
        f"{name}.png" for name in ("blue/0", "blue/1", "green/0", "red/0", "red/1")
    ]
    assert [images[position, 0][1] for position in range(5)] == [0, 0, 1, 2, 2]
    (maps / "red" / "0.pt").unlink()
    with (
        pytest.warns(UserWarning, match="skipped green"),
        fails(
            "2 of 6 training images have no label map, the first is .*maps/red/0.pt: make them with cfvit token-labels"
        ),
    ):
        _labelled(folder, maps)


def test_without_a_readable_image_nothing_is_left(make_colours: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_colours(per_class=1)
    for name in COLOURS:
        (folder / name / "0.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="skipped"):
        assert len(_labelled(folder, tmp_path / "maps")) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_maps_of_two_shapes_are_refused_in_one_line(
    labelled_colours: Callable[..., tuple[Path, Path]], workers: int, fails: Fails
) -> None:
    folder, maps = labelled_colours()
    torch.save(torch.zeros(2, 3, 9, 9).half(), maps / "green" / "0.pt")
    keys: Any = [(position, 0) for position in range(6)]
    batches = iter(DataLoader(_labelled(folder, maps), 2, sampler=keys, num_workers=workers))
    assert next_batch(batches)[2].shape == (2, 2, 3, 18, 18)
    refusal = (
        r"label map .*green.0\.pt is \[2, 3, 9, 9\], the first one \[2, 3, 18, 18\]: remove it and run cfvit token"
    )
    with fails(refusal):
        next_batch(batches)


def test_any_error_of_a_loading_process_is_one_line(fails: Fails) -> None:
    uneven: Any = [torch.zeros(2), torch.zeros(3)]
    for workers in (0, 1):
        batches = iter(DataLoader(uneven, 2, num_workers=workers))
        with fails(r"^images cannot be loaded \(.*stack expects each tensor to be equal size.*\): check the data"):
            next_batch(batches)
    with pytest.raises(CfvitError) as caught:
        next_batch(iter(DataLoader(uneven, 2, num_workers=1)))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(StopIteration):
        next_batch(iter([]))


def test_maps_of_other_classes_are_refused(labelled_colours: Callable[..., tuple[Path, Path]], fails: Fails) -> None:
    folder, maps = labelled_colours()
    for parent in (folder, maps):
        (parent / "red").rename(parent / "rosy")
    with fails(
        "label maps in .*maps are of other classes .class 2 is 'rosy' here, 'red' there.: make maps of this data"
    ):
        _labelled(folder, maps)
    shutil.copytree(folder / "rosy", folder / "yellow")
    with fails("label maps in .*maps are of other classes .4 classes here, 3 there.: make maps of this data"):
        _labelled(folder, maps)
    shutil.rmtree(folder / "yellow")
    (maps / "labels.json").write_text("{")
    with fails("labels.json is damaged"):
        _labelled(folder, maps)
    (maps / "labels.json").unlink()  # as published maps come
    assert len(_labelled(folder, maps)) == 6


def test_images_that_share_a_map_are_refused_in_training(
    labelled_colours: Callable[..., tuple[Path, Path]], fails: Fails
) -> None:
    folder, maps = labelled_colours()
    Image.new("RGB", (8, 8)).save(folder / "red" / "1.webp")
    with fails("red/1.(png|webp) and red/1.(png|webp) would share a label map: rename one"):
        _labelled(folder, maps, [0])


# the command


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return _save_weights(timm.create_model("test_efficientnet", num_classes=3), tmp_path / "teacher.safetensors")


def test_the_command_makes_maps_and_says_what_to_do_next(
    cfvit_main: Cli, make_colours: Callable[..., Path], teacher_file: Path, tmp_path: Path
) -> None:
    folder, out = make_colours(per_class=2), tmp_path / "maps"
    words = ["token-labels", "--data", folder, "--teacher", "test_efficientnet", "--weights", teacher_file]
    words += ["--out", out, "--workers", 0, "--size", 4]
    first = cfvit_main(*words)
    assert (first.status, first.out) == (0, [])
    hint = f"cfvit train --recipe lvvit --token-labels {out} ... learns from them"
    assert first.err == [f"6 label maps made, 0 were there: {hint}"]
    assert {tuple(label_map.shape) for label_map in _read_all(out).values()} == {(2, 3, 4, 4)}

    (out / "red" / "0.pt").unlink()
    (folder / "green" / "1.png").write_bytes(b"damaged")
    (out / "green" / "1.pt").unlink()
    second = cfvit_main(*words, "--json")
    reason = "not an image, or of a format that Pillow does not read"
    assert second.status == 1
    assert [json.loads(line) for line in second.out] == [
        {"path": "green/1.png", "error": reason},
        {"made": 1, "there": 4, "unreadable": 1, "out": str(out)},
    ]
    assert second.err == [
        f"cfvit: green/1.png has no label map: {reason}",
        f"1 label map made, 4 were there: {hint}",
    ]


def test_the_command_refuses_in_one_line(cfvit_main: Cli, make_colours: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_colours(per_class=1)
    outcome = cfvit_main("token-labels", "--data", folder, "--teacher", "nosuch", "--out", tmp_path / "maps")
    assert outcome.status == 1
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith("cfvit: teacher nosuch cannot be had (Unknown model (nosuch))")
    assert not (tmp_path / "maps").exists()
    outcome = cfvit_main("token-labels", "--data", folder, "--teacher", "test_vit", "--out", tmp_path, "--size", 0)
    assert outcome.status == 2
