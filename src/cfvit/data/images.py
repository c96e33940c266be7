"""Reading one image: every image, in training, evaluation and prediction alike, is read by `open_image`."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import timm.data
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from cfvit.errors import CfvitError, first_line

IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"]
)
"""What a folder is searched for; a file named outright is read whatever its name."""

MAX_PIXELS = 178_956_970
"""Larger images are refused, as by Pillow itself: decoded, they would take more than 500 MB."""

MAX_ASPECT = 200
"""Images that are longer for their width are refused: brought to a model's height, they would fill the memory."""

PIXELS_AT_ONCE = 100_000_000
"""Threads decode no more pixels at the same time, about 1 GB in the worst case."""

warnings.filterwarnings(
    "ignore", module=r"PIL\b"
)  # an image is read or refused in one line, whatever Pillow thinks of it


class ImageError(CfvitError):
    """One image cannot be read; the message says why, without the file's name."""


def open_image(
    source: str | Path | IO[bytes] | bytes,
    least: int | None = None,
    *,
    max_pixels: int | None = None,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Decodes an image to 8-bit RGB as a person would see it.

    The first frame of an animation; upright by its EXIF orientation; in sRGB, by its colour profile where it has one;
    transparency on white; CMYK, palette, greyscale and 16-bit images converted, the latter as in `to_rgb`. Threads
    that decode at the same time wait for each other where they would hold more than `PIXELS_AT_ONCE`.

    Args:
        least: a JPEG may be decoded at a half, a quarter or an eighth of its size if its shorter side
            keeps so many pixels; others are decoded in full.
        max_pixels: larger images are refused before they are decoded; by default `MAX_PIXELS`.
        formats: names of Pillow's formats that are read; by default all.

    Raises:
        ImageError: no such file, not an image, truncated, larger than ``max_pixels``, longer than `MAX_ASPECT`, or of
            pixels that are not finite numbers.
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    try:
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width} x {image.height} pixels are more than {max_pixels:,}: shrink it first")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ImageError(f"{image.width} x {image.height} pixels, longer than {MAX_ASPECT} to 1: cut it")
            if least is not None:
                image.draft(None, (least, least))
            with _room_for(image.width * image.height):
                deep = image.mode in ("LA", "RGB", "RGBA") and any(";16" in str(tile.args) for tile in image.tile)
                highest = _stated_range(image)
                image.load()
                try:
                    upright = ImageOps.exif_transpose(image)
                except Exception:  # damaged EXIF, of which the pixels know nothing
                    upright = image
                return to_rgb(_brightened(upright, highest) if deep else upright, highest)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels: shrink it first") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or of a format that Pillow does not read") from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except IsADirectoryError as error:
        raise ImageError("a folder without images") from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise ImageError(f"damaged or truncated ({first_line(error)})") from error


_decoding = threading.Condition()
_decoded: list[int] = []
"""How many pixels each image has that a thread decodes now."""


@contextmanager
def _room_for(pixels: int) -> Iterator[None]:
    """Waits until so many pixels fit beside those that other threads decode; a larger image has its turn alone."""
    with _decoding:
        _decoding.wait_for(lambda: not _decoded or sum(_decoded) + pixels <= PIXELS_AT_ONCE)
        _decoded.append(pixels)
    try:
        yield
    finally:
        with _decoding:
            _decoded.remove(pixels)
            _decoding.notify_all()


def _stated_range(image: Any) -> int | None:
    """The highest value that a file says its samples of more than 8 bits may have; None where it does not.

    MaxSampleValue or BitsPerSample of a TIFF. The sBIT of a PNG is the number of bits that its samples had once, and
    still have where the writer has not scaled them up; Pillow does not read it.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        highest, bits = tags.get(281), tags.get(258, (16,))[0]
        return (highest[0] if isinstance(highest, tuple) else highest) or (2**bits - 1 if 8 < bits < 16 else None)
    if image.format != "PNG":
        return None
    place, bits = image.fp.tell(), 0
    image.fp.seek(8)
    while (chunk := image.fp.read(8))[4:] not in (b"IDAT", b"") and not bits:
        content = image.fp.read(int.from_bytes(chunk[:4], "big") + 4)
        bits = content[0] if chunk[4:] == b"sBIT" else 0
    image.fp.seek(place)
    return 2**bits - 1 if 8 < bits <= 16 else None


def _brightened(image: Image.Image, highest: int | None) -> Image.Image:
    """An image of 16-bit colours, of which Pillow keeps the upper half: scaled up where that holds less than 8 bits."""
    colours = len(image.getbands()) - (image.getbands()[-1] == "A")
    brightest = max(high for _, high in cast(Any, image.getextrema())[:colours])
    full = highest >> 8 if highest and brightest <= highest >> 8 else 2 ** brightest.bit_length() - 1
    scaled = [min(255, round(value * 255 / max(full, 1))) for value in range(256)]
    return image.point(scaled * colours + list(range(256)) * (len(image.getbands()) - colours))


def to_rgb(image: Image.Image, highest: int | None = None) -> Image.Image:
    """8-bit RGB in sRGB, on white. Raises `ImageError` of pixels that are not finite numbers.

    Greyscale of more than 8 bits is scaled by its range: ``highest``, as the file states it (`_stated_range`), where
    that holds the image's maximum; else integers by the smallest range of whole bits, 8 to 16, that does, so that
    12-bit values in 16 are not black; floats in [0, 1] or [0, 255].
    """
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image), highest)).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    if isinstance(profile, bytes) and (transform := _to_srgb(profile, image.mode)) is not None:
        image = transform.apply(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, highest: int | None) -> np.ndarray:
    """By rows, so that a large image is not held several times in 64 bits."""
    peak = values.max(initial=0)
    if not np.isfinite(peak) or not np.isfinite(values.min(initial=0)):
        raise ImageError("has pixels that are not finite numbers: replace them by numbers")
    if values.dtype.kind == "f":
        full = 1.0 if peak <= 1 else 255.0
    elif highest and peak <= highest:
        full = float(highest)
    else:
        full = float(min(65535, 2 ** max(8, int(peak).bit_length()) - 1))
    out = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), 256):
        part = values[row : row + 256].astype(np.float64)
        out[row : row + 256] = (part * (255 / full)).round().clip(0, 255)
    return out


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """What brings an image of a colour profile to sRGB; None where it is sRGB, of another kind of image, or damaged."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(theirs).lower():
            return None
        target = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(theirs, ImageCms.createProfile("sRGB"), mode, target)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def eval_transform(data_config: dict[str, Any]) -> Any:
    """Timm's evaluation transform of a model: PIL image to normalised ``[3, S, S]``."""
    return timm.data.create_transform(**data_config, is_training=False)
