"""Every kind of image file, data sets on disk, and the order in which training sees them."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from timm.data.imagenet_info import ImageNetInfo
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader

from cfvit.data import (
    UNREADABLE,
    DataSource,
    EvalImages,
    ImageError,
    TrainImages,
    TrainSampler,
    difference_of_classes,
    find_images,
    has_validation_split,
    open_data,
    open_image,
    progress_bar,
    readable_class_names,
    split_holdout,
)
from cfvit.data import images as data

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _plain(mode: str, colour: Any, kind: str = "PNG", **options: Any) -> bytes:
    return _encode(Image.new(mode, (16, 16), colour), kind, **options)


def _deep(values: list[Any], dtype: Any, kind: str) -> bytes:
    return _encode(Image.fromarray(np.array([values], dtype=dtype)), kind)


def _palette(index: int) -> bytes:
    image = Image.new("P", (16, 16), index)
    image.putpalette([*BLUE, *RED])
    return _encode(image, "PNG", transparency=0)


def _png_header(width: int, height: int) -> bytes:
    """What a PNG of that size begins with, up to its pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 10**6) + b"IDAT"


def _halves() -> Image.Image:
    """32 x 16, the left half red and the right half blue."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    return image


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        pytest.param(_plain("RGB", RED, "BMP"), RED, id="rgb"),
        pytest.param(_plain("CMYK", (0, 255, 255, 0), "JPEG", quality=95), RED, id="cmyk-jpeg"),
        pytest.param(_plain("L", 77), (77, 77, 77), id="grey"),
        pytest.param(_plain("1", 1), WHITE, id="one-bit"),
        pytest.param(_plain("LA", (0, 0)), WHITE, id="grey-transparent"),
        pytest.param(_plain("LA", (77, 255)), (77, 77, 77), id="grey-opaque"),
        pytest.param(_plain("RGBA", (255, 0, 0, 0)), WHITE, id="transparent"),
        pytest.param(_plain("RGBA", (0, 0, 0, 51)), (204, 204, 204), id="partly-transparent"),
        pytest.param(_palette(0), WHITE, id="palette-transparent"),
        pytest.param(_palette(1), RED, id="palette-opaque"),
        pytest.param(_plain("RGB", RED, exif=b"Exif\0\0garbage"), RED, id="damaged-exif"),
    ],
)
def test_colours_are_as_seen_on_white(content: bytes, colour: tuple[int, int, int]) -> None:
    image = open_image(content)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - colour).max() <= 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(_deep([0, 32896, 65535], np.uint16, "PNG"), [0, 128, 255], id="16-bit-png"),
        pytest.param(_deep([0, 32896, 65535, 10**6], np.int32, "TIFF"), [0, 128, 255, 255], id="I"),
        pytest.param(_deep([0, 0.2, 1], np.float32, "TIFF"), [0, 51, 255], id="F-to-1"),
        pytest.param(_deep([0, 51, 300, -3], np.float32, "TIFF"), [0, 51, 255, 0], id="F-to-255"),
    ],
)
def test_deep_images_are_scaled_to_8_bits(content: bytes, expected: list[int]) -> None:
    pixels = np.asarray(open_image(content))[0]
    assert pixels.tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_pixels_that_are_no_numbers_are_refused(value: float, kind: Any, fails: Callable[..., Any]) -> None:
    file = io.BytesIO()
    pixels = Image.fromarray(np.array([[0, value, 1]], dtype=np.float32))
    pixels.save(file, "TIFF")
    with fails("pixels that are not finite numbers", ImageError):
        open_image(file.getvalue())


def _png_of_16_bits(values: list[int], channels: int = 3, bits: int | None = None) -> bytes:
    """A PNG of one pixel for each value, as Pillow cannot write it, perhaps with an sBIT chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    opaque = [65535] * (channels in (2, 4))
    pixels = [sample for value in values for sample in [value] * (channels - len(opaque)) + opaque]
    header = struct.pack(">IIBBBBB", len(values), 1, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    stated = chunk(b"tEXt", b"a\0b") + chunk(b"sBIT", bytes([bits] * channels)) if bits else b""
    row = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(pixels)}H", *pixels)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + stated + row + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(_deep([0, 2048, 4095], np.uint16, "PNG"), [0, 128, 255], id="12-bit"),
        pytest.param(_deep([0, 2048, 3000], np.uint16, "TIFF"), [0, 128, 187], id="12-bit-not-full"),
        pytest.param(_deep([0, 100, 255], np.uint16, "PNG"), [0, 100, 255], id="8-bit"),
        pytest.param(_deep([0, 0, 0], np.uint16, "PNG"), [0, 0, 0], id="black"),
        pytest.param(_deep([0, 512, 1023], np.int32, "TIFF"), [0, 128, 255], id="10-bit-I"),
        pytest.param(_png_of_16_bits([0, 2048, 4095]), [0, 136, 255], id="12-bit-colours"),
        pytest.param(_png_of_16_bits([0, 32768, 65535]), [0, 128, 255], id="16-bit-colours"),
        pytest.param(_png_of_16_bits([0, 2048, 4095], 2), [0, 136, 255], id="12-bit-with-alpha"),
    ],
)
def test_deep_images_of_fewer_bits_are_not_black(content: bytes, expected: list[int]) -> None:
    """By the smallest range of whole bits that holds the maximum."""
    assert np.asarray(open_image(content))[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize(("tag", "value"), [(281, 1023), (281, 3000)])
def test_the_range_that_a_tiff_states_goes_first(tag: int, value: int) -> None:
    image = Image.fromarray(np.array([[0, 500, 1000]], dtype=np.uint16))
    content = _encode(image, "TIFF", tiffinfo={tag: value})
    assert np.asarray(open_image(content))[0, :, 0].tolist() == [0, round(500 * 255 / value), round(1000 * 255 / value)]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("values", "bits", "full"),
    [
        ([0, 300, 1000], 12, 4095),
        ([0, 300, 1000], 16, 65535),
        ([0, 300, 1000], None, 1023),
        ([0, 20000, 65535], 12, 65535),  # scaled up, as the PNG specification asks
    ],
)
def test_the_bits_that_a_png_states_go_first(values: list[int], bits: int | None, full: int, channels: int) -> None:
    pixels = np.asarray(open_image(_png_of_16_bits(values, channels, bits)))[0, :, 0].tolist()
    if channels > 1:  # of which Pillow keeps the upper half
        values, full = [value >> 8 for value in values], full >> 8
    assert pixels == [round(value * 255 / full) for value in values]


def _profile(name: Literal["LAB", "XYZ", "sRGB"]) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


class TestColourProfiles:
    """As littleCMS converts them, and left alone where they say sRGB, nothing, or nonsense."""

    def test_another_space_is_brought_to_srgb(self) -> None:
        lab = Image.new("LAB", (4, 4), (128, 168, 128))
        expected = ImageCms.profileToProfile(
            lab, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        seen = open_image(_encode(lab, "TIFF", icc_profile=_profile("LAB")))
        assert expected is not None
        assert np.abs(np.asarray(seen).astype(int) - np.asarray(expected)).max() <= 1

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_swapped_primaries_swap_the_colours(self, mode: str) -> None:
        """A profile with red and blue exchanged: what is stored as red is seen as blue."""
        profile = bytearray(_profile("sRGB"))
        tags = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * profile[131], 12)}
        red, blue = tags[b"rXYZ"] + 4, tags[b"bXYZ"] + 4
        profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
        place = profile.find("sRGB".encode("utf-16-be"))
        while place >= 0:
            profile[place : place + 8] = "swap".encode("utf-16-be")
            place = profile.find("sRGB".encode("utf-16-be"))
        colour = (*RED, 255)[: len(mode)]
        seen = open_image(_plain(mode, colour, icc_profile=bytes(profile)))
        assert np.abs(np.asarray(seen)[0, 0].astype(int) - BLUE).max() <= 3

    @pytest.mark.parametrize("profile", [b"", b"nonsense", _profile("sRGB"), _profile("LAB")])
    def test_srgb_nonsense_and_profiles_of_other_kinds_change_nothing(self, profile: bytes) -> None:
        gradient = Image.linear_gradient("L").convert("RGB")
        seen = open_image(_encode(gradient, "PNG", icc_profile=profile))
        assert np.array_equal(np.asarray(seen), np.asarray(gradient))


def test_threads_share_the_room_for_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one image and a half, four threads hold one at a time; a larger one has its turn alone."""
    monkeypatch.setattr(data, "PIXELS_AT_ONCE", 150)
    held: list[int] = []
    most: list[int] = []

    def watch(image: Image.Image) -> Image.Image:
        """In the place of a step of decoding."""
        held.append(image.width * image.height)
        most.append(sum(min(pixels, 150) for pixels in held))
        time.sleep(0.001)
        held.remove(image.width * image.height)
        return image

    monkeypatch.setattr(ImageOps, "exif_transpose", watch)
    files = [_encode(Image.new("RGB", (10, height)), "PNG") for height in (10, 6, 9, 100, 1, 10)] * 5
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(open_image, files))) == len(most) == 30
    assert max(most) <= 150


def test_deep_images_do_not_take_many_times_their_size() -> None:
    content = _encode(Image.fromarray(np.zeros((2000, 2000), dtype=np.uint16)), "PNG")
    tracemalloc.start()
    open_image(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2000 * 2000


def test_photos_are_upright() -> None:
    image = open_image(_encode(_halves(), "JPEG", exif=_exif(6), quality=95))
    assert image.size == (16, 32)
    assert np.abs(np.asarray(image)[4, 8].astype(int) - RED).max() < 8
    assert np.abs(np.asarray(image)[28, 8].astype(int) - BLUE).max() < 8


class TestLeast:
    """A JPEG decoded in part keeps as many pixels as were asked for."""

    @staticmethod
    def _photo(size: tuple[int, int], kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
        return _encode(Image.new(mode, size), kind, **options)

    @settings(max_examples=60, deadline=None)
    @given(width=st.integers(8, 700), height=st.integers(8, 700), least=st.integers(1, 300))
    def test_the_shorter_side_never_falls_below(self, width: int, height: int, least: int) -> None:
        size = open_image(self._photo((width, height)), least).size
        ratio = next(ratio for ratio in (1, 2, 4, 8) if size == (-(-width // ratio), -(-height // ratio)))
        assert min(size) >= min(least, width, height)
        if ratio < 8:
            assert min(width, height) < 2 * ratio * least

    @pytest.mark.parametrize(
        ("least", "size"),
        [
            (None, (1600, 1200)),
            (1201, (1600, 1200)),
            (601, (1600, 1200)),
            (600, (800, 600)),
            (301, (800, 600)),
            (300, (400, 300)),
            (150, (200, 150)),
            (20, (200, 150)),
        ],
    )
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_a_jpeg_is_decoded_at_the_smallest_size_that_will_do(
        self, mode: str, least: int | None, size: tuple[int, int]
    ) -> None:
        image = open_image(self._photo((1600, 1200), mode=mode), least)
        assert (image.mode, image.size) == ("RGB", size)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP"])
    def test_other_formats_are_decoded_in_full(self, kind: str) -> None:
        assert open_image(self._photo((640, 480), kind), 16).size == (640, 480)

    def test_an_upright_photo_keeps_as_much(self) -> None:
        assert open_image(self._photo((1600, 1200), exif=_exif(6)), 300).size == (300, 400)

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_the_colours_are_the_same(self, mode: str) -> None:
        gradient = Image.linear_gradient("L").resize((800, 800))
        content = _encode(Image.merge("RGB", [gradient, gradient.rotate(90), gradient]).convert(mode), "JPEG")
        whole, part = open_image(content), open_image(content, 100)
        assert part.size == (100, 100)
        difference = np.asarray(whole.reduce(8)).astype(int) - np.asarray(part)
        assert np.abs(difference).max() <= 6

    def test_a_truncated_photo_is_refused_all_the_same(self) -> None:
        noise = Image.effect_noise((800, 600), 80)
        content = _encode(noise, "JPEG")
        with pytest.raises(ImageError, match="truncated"):
            open_image(content[: len(content) // 2], 75)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    content = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(content).getpixel((8, 8)) == RED


@pytest.mark.parametrize("as_source", [str, Path, lambda path: path.open("rb"), Path.read_bytes])
def test_paths_open_files_and_bytes_are_read_alike(tmp_path: Path, as_source: Callable[[Path], Any]) -> None:
    path = tmp_path / "image.without-suffix"
    path.write_bytes(_encode(_halves(), "PNG"))
    assert np.array_equal(np.asarray(open_image(as_source(path))), np.asarray(_halves()))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(_encode(_halves().resize((640, 320)), "JPEG")[:3000], "truncated", id="truncated"),
        pytest.param(_encode(_halves(), "PNG")[:60], "damaged or truncated", id="truncated-png"),
        pytest.param(b"", "not an image", id="empty"),
        pytest.param(b"dear diary\nthis is text\n", "not an image", id="text"),
        pytest.param(_png_header(16_000, 12_000), "178,956,970 pixels: shrink it", id="bomb-by-our-limit"),
        pytest.param(_png_header(60_000, 60_000), "178,956,970 pixels: shrink it", id="bomb-by-any-limit"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes, reason: str, fails: Callable[..., Any]) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with fails(reason, ImageError):
        open_image(path)


def test_limit_on_pixels_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., Any]) -> None:
    content = _encode(_halves(), "PNG")
    monkeypatch.setattr(data, "MAX_PIXELS", 512)
    assert open_image(content).size == (32, 16)
    monkeypatch.setattr(data, "MAX_PIXELS", 511)
    with fails("32 x 16 pixels are more than 511", ImageError):
        open_image(content)


def test_missing_file(tmp_path: Path, fails: Callable[..., Any]) -> None:
    with fails("no such file", ImageError):
        open_image(tmp_path / "absent.png")


def test_find_images_keeps_the_order_of_arguments_and_sorts_folders(tmp_path: Path) -> None:
    for name in ("folder/b.PNG", "folder/a.jpg", "folder/sub/c.webp", "folder/notes.txt", "named.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "named.dat", str(tmp_path / "folder")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "named.dat",
        "folder/a.jpg",
        "folder/b.PNG",
        "folder/sub/c.webp",
    ]


def test_find_images_keeps_what_cannot_be_read(tmp_path: Path, fails: Callable[..., Any]) -> None:
    """A missing file and an empty folder stand for themselves, so that the others get their answers."""
    paths = [tmp_path, tmp_path / "absent"]
    assert find_images(paths) == paths
    with fails("a folder without images"):
        open_image(tmp_path)
    with fails("no such file"):
        open_image(tmp_path / "absent")


def test_open_image_refuses_a_thread(tmp_path: Path, fails: Callable[..., Any]) -> None:
    Image.new("RGB", (2001, 10)).save(tmp_path / "thread.png")
    with fails("longer than 200 to 1"):
        open_image(tmp_path / "thread.png")


def test_nested_and_stray_images_are_refused(make_colours: Callable[..., Path], fails: Callable[..., Any]) -> None:
    root = make_colours(per_class=1)
    first = next(p for p in sorted(root.iterdir()) if p.is_dir())
    (first / "inner").mkdir()
    with fails("holds the folder inner"):
        open_data(str(root))
    (first / "inner").rmdir()
    (root / ".hidden").mkdir()
    assert len(open_data(str(root)).class_names) == 3
    Image.new("RGB", (8, 8)).save(root / "stray.png")
    with fails("lies beside the class folders"):
        open_data(str(root))


def _tar(folder: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as archive:
        archive.add(folder, ".")
    return file


def _colour_of(image: Image.Image) -> str:
    """The class that an image of the colours shows, by its strongest channel."""
    return ("red", "green", "blue")[int(np.asarray(image).mean((0, 1)).argmax())]


def test_folder_and_tar_give_the_same_images(make_colours: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_colours()
    sources = [open_data(str(folder)), open_data(str(_tar(folder, tmp_path / "data.tar")))]
    for source in sources:
        assert source.class_names == ["blue", "green", "red"]
        assert len(source) == 12
        items = [source.read(i) for i in range(12)]
        assert [source.class_names[target] for _, target in items] == [_colour_of(image) for image, _ in items]
        assert Counter(target for _, target in items) == {0: 4, 1: 4, 2: 4}
        assert source.name(0).endswith("blue/0.png")


def test_every_suffix_that_is_looked_for_is_read(make_colours: Callable[..., Path]) -> None:
    folder = make_colours(per_class=2)
    Image.new("RGB", (8, 8), RED).save(folder / "red" / "picture.webp")
    shutil.copytree(folder / "red", folder / "scans", ignore=lambda *_: ["0.png", "1.png"])
    source = open_data(str(folder))
    assert source.class_names == ["blue", "green", "red", "scans"]
    assert len(source) == 8


def test_sub_folders_of_splits_are_entered(colours: Path, make_colours: Callable[..., Path]) -> None:
    assert len(open_data(str(colours), "train")) == 90
    assert len(open_data(str(colours), "validation")) == 33
    assert has_validation_split(str(colours))
    flat = make_colours()
    assert len(open_data(str(flat), "validation")) == 12
    assert not has_validation_split(str(flat))


def test_tars_of_splits_are_entered(make_colours: Callable[..., Path], tmp_path: Path) -> None:
    splits = tmp_path / "splits"
    splits.mkdir()
    _tar(make_colours("a", per_class=3), splits / "train.tar")
    _tar(make_colours("b", per_class=2), splits / "validation.tar")
    assert len(open_data(str(splits), "train")) == 9
    assert len(open_data(str(splits), "validation")) == 6


def test_data_that_cannot_be_used_is_refused(
    make_colours: Callable[..., Path], tmp_path: Path, fails: Callable[..., Any]
) -> None:
    with fails("no data at .*absent"):
        open_data(str(tmp_path / "absent"))
    folder = make_colours()
    with fails("has no sub-folders"):
        open_data(str(folder / "red"))
    (folder / "yellow").mkdir()
    with fails("class folder .*yellow has no images"):
        open_data(str(folder))
    for name in ("yellow", "red", "blue"):
        shutil.rmtree(folder / name)
    with fails("holds 1 class"):
        open_data(str(folder))
    not_a_tar = tmp_path / "data.tar"
    not_a_tar.write_text("no tar")
    with fails("damaged, compressed or no tar"):
        open_data(str(not_a_tar))


def test_imagenet_identifiers_become_words() -> None:
    assert readable_class_names(["n01440764", "n02099601"]) == ["tench", "golden retriever"]
    assert readable_class_names(["n01440764", "my class"]) == ["n01440764", "my class"]
    assert readable_class_names([]) == []


def test_words_of_imagenet_are_unique() -> None:
    names = readable_class_names(ImageNetInfo().label_names())
    assert len(set(names)) == 1000
    assert names[134] == "crane (n02012849)"
    assert names[639] == "maillot, tank suit"


def test_aligned_classes_follow_the_model(make_colours: Callable[..., Path], fails: Callable[..., Any]) -> None:
    source = open_data(str(make_colours(per_class=1)))
    aligned = source.aligned(["red", "purple", "blue", "green"])
    assert aligned.class_names == ["red", "purple", "blue", "green"]
    for i in range(3):
        image, target = aligned.read(i)
        assert aligned.class_names[target] == _colour_of(image)
    again = aligned.aligned(["green", "blue", "purple", "red"])
    assert [again.class_names[again.read(i)[1]] for i in range(3)] == [source.class_names[i] for i in range(3)]
    with fails("class 'green' of the data is not among the model's 2 classes .*: name the folders alike"):
        source.aligned(["red", "blue"])
    with fails("class 'blue' of the data is not among the model's 3 classes, which have numbers.*model.class_names"):
        source.aligned(["0", "1", "2"])
    with fails("class 'red' of the data is the name of several of the model's classes"):
        source.aligned(["red", "blue", "green", "red"])


@pytest.fixture
def source(make_colours: Callable[..., Path]) -> DataSource:
    return open_data(str(make_colours(per_class=7)))


def test_holdout_is_disjoint_complete_and_fixed_by_the_seed(source: DataSource) -> None:
    kept, held = split_holdout(source, 0.2, seed=3)
    assert len(held) == 4
    assert sorted(kept + held) == list(range(21))
    assert split_holdout(source, 0.2, seed=3) == (kept, held)
    assert split_holdout(source, 0.2, seed=4) != (kept, held)
    assert split_holdout(source, 0, seed=3) == (list(range(21)), [])


def _train_images(source: DataSource) -> TrainImages:
    transform = create_transform(
        (3, 16, 16), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, re_mode="pixel"
    )
    return TrainImages(source, range(len(source)), transform)


@pytest.mark.parametrize("repeats", [1, 3])
def test_sampler_continues_where_it_stopped(source: DataSource, repeats: int) -> None:
    images = _train_images(source)
    sampler = TrainSampler(images, repeats, seed=5, rank=1, world=2)
    sampler.set_position(2, 0)
    full = list(sampler)
    assert len(sampler) == len(full) == 11
    resumed = TrainSampler(images, repeats, seed=5, rank=1, world=2)
    resumed.set_position(2, 4)
    assert list(resumed) == full[4:]
    assert len(resumed) == 7
    sampler.set_position(3, 0)
    assert list(sampler) != full


@pytest.mark.parametrize("repeats", [1, 3])
def test_sampler_depends_on_the_seed(source: DataSource, repeats: int) -> None:
    orders = []
    for seed in (5, 6):
        sampler = TrainSampler(_train_images(source), repeats, seed=seed, rank=0, world=1)
        sampler.set_position(0, 0)
        orders.append([position for position, _ in sampler])
    assert orders[0] != orders[1]


def test_ranks_share_an_epoch(source: DataSource) -> None:
    images = _train_images(source)
    shares = []
    for rank in range(3):
        sampler = TrainSampler(images, 1, seed=5, rank=rank, world=3)
        sampler.set_position(1, 0)
        shares.append(list(sampler))
    assert sorted(position for share in shares for position, _ in share) == list(range(21))
    assert len({seed for share in shares for _, seed in share}) == 21


def test_repeated_augmentation_shows_an_image_to_all_ranks_differently(source: DataSource) -> None:
    images = _train_images(source)
    shares = []
    for rank in range(3):
        sampler = TrainSampler(images, 3, seed=5, rank=rank, world=3)
        sampler.set_position(1, 0)
        shares.append(list(sampler))
    positions = [[position for position, _ in share] for share in shares]
    assert positions[0] == positions[1] == positions[2]
    assert len({seed for share in shares for _, seed in share}) == 21


def test_training_images_depend_on_the_seed_alone(source: DataSource) -> None:
    images = _train_images(source)
    sampler = TrainSampler(images, 1, seed=5, rank=0, world=1)
    sampler.set_position(0, 0)
    torch.manual_seed(1)
    alone = list(DataLoader(images, 4, sampler=sampler))
    torch.manual_seed(2)
    with_workers = list(DataLoader(images, 4, sampler=sampler, num_workers=2))
    assert len(alone) == len(with_workers) == 6
    for (ours, our_targets), (theirs, their_targets) in zip(alone, with_workers, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(our_targets, their_targets)
    assert not torch.equal(images[0, 1][0], images[0, 2][0])


def _damage(source: DataSource, index: int, root: Path) -> None:
    (root / source.name(index)).write_bytes(b"damaged")


def test_unreadable_training_image_is_replaced_and_named(make_colours: Callable[..., Path]) -> None:
    root = make_colours(per_class=2)
    source = open_data(str(root))
    images = _train_images(source)
    expected, target = images[2, 9]
    _damage(source, 1, root)
    with pytest.warns(UserWarning, match=r"skipped blue/1\.png: not an image"):
        replaced, replaced_target = images[1, 9]
    assert torch.equal(replaced, expected)
    assert replaced_target == target


def test_deleted_training_image_is_replaced(make_colours: Callable[..., Path]) -> None:
    root = make_colours(per_class=2)
    source = open_data(str(root))
    (root / source.name(5)).unlink()
    with pytest.warns(UserWarning, match=r"skipped red/1\.png: no such file"):
        assert _train_images(source)[5, 9][1] == 0


def test_without_a_readable_image_the_target_says_so(make_colours: Callable[..., Path]) -> None:
    root = make_colours(per_class=1)
    source = open_data(str(root))
    for index in range(3):
        _damage(source, index, root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _train_images(source)[0, 1][1] == UNREADABLE


DATA_CONFIG = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}


def test_shards_of_evaluation_hold_every_image_once(source: DataSource) -> None:
    shards = [EvalImages(source, DATA_CONFIG, rank=rank, world=4) for rank in range(4)]
    indices = [shard[i][2] for shard in shards for i in range(len(shard))]
    assert sorted(indices) == list(range(21))


def test_evaluation_of_some_images(source: DataSource) -> None:
    chosen = EvalImages(source, DATA_CONFIG, [20, 3, 8])
    assert [chosen[i][1:] for i in range(3)] == [(2, 20), (0, 3), (1, 8)]


def test_unreadable_evaluation_image_is_marked(make_colours: Callable[..., Path]) -> None:
    root = make_colours(per_class=1)
    source = open_data(str(root))
    _damage(source, 1, root)
    image, target, index = EvalImages(source, DATA_CONFIG)[1]
    assert (target, index) == (-1, 1)
    assert torch.equal(image, torch.zeros(3, 16, 16))


def test_a_loader_left_open_does_not_hold_up_the_exit() -> None:
    program = """
import sys
from torch.utils.data import DataLoader
from cfvit.data import leave_signals_to_the_run
sys.kept = iter(DataLoader(range(100), num_workers=2, worker_init_fn=leave_signals_to_the_run))
next(sys.kept)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("names", "others", "same"),
    [
        (["tench, Tinca", "Crane"], ["tench", "crane (n01)"], True),
        (["A", "a"], ["a", "A"], False),
        (["mug, red", "mug, blue"], ["mug, blue", "mug, red"], False),
        (["caf\u00e9"], ["cafe\u0301"], True),
        (["a"], ["a", "b"], False),
    ],
)
def test_classes_are_compared_by_what_tells_them_apart(names: list[str], others: list[str], same: bool) -> None:
    assert (difference_of_classes(names, others) is None) == same


def test_where_no_one_watches_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar(2000, done=1000) as advance:
        advance(500)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("cfvit.data.loading.SECONDS_BETWEEN_LINES", 0)
    with progress_bar(2000, done=1000) as advance:
        advance(500)
    line = capsys.readouterr().err
    assert line.startswith("1,500 of 2,000 images, ")
    assert line.endswith(" a second\n")
