"""Reading one image: every image, in training, evaluation and prediction alike, is read by `open_image`."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import timm.data
from PIL import Image, ImageOps, UnidentifiedImageError

from cfvit.errors import CfvitError, first_line

IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"]
)
"""What a folder is searched for; a file named outright is read whatever its name."""

MAX_PIXELS = 178_956_970
"""Larger images are refused, as by Pillow itself: decoded, they would take more than 500 MB."""


MAX_ASPECT = 200
"""Images that are longer for their width are refused: brought to a model's height, they would fill the memory."""


class ImageError(CfvitError):
    """One image cannot be read; the message says why, without the file's name."""


def open_image(source: str | Path | IO[bytes] | bytes, least: int | None = None) -> Image.Image:
    """Decodes an image to 8-bit RGB as a person would see it.

    The first frame of an animation; upright by its EXIF orientation; transparency on white;
    CMYK, palette, greyscale and 16-bit images converted.

    Args:
        least: a JPEG may be decoded at a half, a quarter or an eighth of its size if its shorter side
            keeps so many pixels; others are decoded in full.

    Raises:
        ImageError: no such file, not an image, truncated, larger than `MAX_PIXELS`, longer than `MAX_ASPECT`.
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(
                        f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}: shrink it first"
                    )
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise ImageError(f"{image.width} x {image.height} pixels, longer than {MAX_ASPECT} to 1: cut it")
                if least is not None:
                    image.draft(None, (least, least))
                image.load()
                return to_rgb(_upright(image))
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


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF, of which the pixels know nothing
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        return Image.fromarray(_to_8_bit(values, image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Deep greyscale to 8 bits: 16-bit integers by their full range, floats in [0, 1] or [0, 255]."""
    full = 65535.0 if mode != "F" else 1.0 if values.max(initial=0) <= 1 else 255.0
    return (values * (255 / full)).round().clip(0, 255).astype(np.uint8)


def eval_transform(data_config: dict[str, Any]) -> Any:
    """Timm's evaluation transform of a model: PIL image to normalised ``[3, S, S]``."""
    return timm.data.create_transform(**data_config, is_training=False)
