"""Reads image files of users as 8-bit RGB pixels."""

import functools
import io
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL import ImageFile as ImageFormat

from histo_jax.data.example import SIZES
from histo_jax.data.raw_files import read_content
from histo_jax.data.read_ahead import read_ahead
from histo_jax.errors import one_line

# What Pillow raises on corrupt files; anything else is a bug.
CORRUPTION = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip
# A compressed file of a few kB can state any size: 100 MB of pixels.
_LARGEST = 2**25
_LARGEST_FILE = 2**27
# Recognised by their content, whatever the name; others by their suffix.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "AVIF", "PPM", "QOI")
# EPS would be run as a program; the others are no images, or need further software.
_NOT_IMAGES = {"EPS", "PDF", "WMF", "BUFR", "FITS", "FLI", "GRIB", "HDF5", "MPEG"}
_GREY = ("1", "L", "LA")
_PALETTE = ("P", "PA")
_RGB = ("RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
_NAMES = {"F": "floating-point", "I": "32-bit", "LAB": "CIELAB"}
_TURNED, _CROPPED = "turned by their EXIF orientation", "cropped to the square in their centre"
_REDUCED, _ENLARGED = "reduced", "enlarged"
_GEOMETRY = (_TURNED, _CROPPED, _REDUCED, _ENLARGED)


class ImageFile(NamedTuple):
    """An image.

    Attributes:
        pixels: uint8[size, size, 3], RGB.
        conversions: what was done to the content of the file, see `describe_conversions`.
    """

    pixels: np.ndarray
    conversions: tuple[str, ...] = ()


@functools.cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes of image files, in lower case and with their dot."""
    formats = Image.registered_extensions()
    return frozenset(
        suffix for suffix, name in formats.items() if name in Image.OPEN and name not in _NOT_IMAGES
    )


def read_images(
    paths: Iterable[Path], image_size: int | None = None
) -> Iterator[ImageFile | str | Exception]:
    """Yields the result of `read_image` for each file, in order; threads read ahead."""
    return read_ahead(functools.partial(read_image, image_size=image_size), paths)


def read_image(path: Path, image_size: int | None = None) -> ImageFile | str | Exception:
    """Reads an image file.

    Greyscale and palette images, and images with an alpha channel that is opaque everywhere, are
    converted to RGB. The EXIF orientation is applied.

    Args:
        path: of any format that Pillow reads.
        image_size: height and width of the pixels that are returned: the square in the centre is
            cut out, and scaled; None = as they are, and they must be square and in `SIZES`.

    Returns:
        the image; or why it cannot be used, as in 'is CMYK, not 8-bit RGB'; or why the system
        cannot read the file, an `OSError` or `MemoryError`.
    """
    try:
        content = read_content(path, _LARGEST_FILE + 1)
    except OSError as error:
        return error
    if not content:
        return "is empty"
    if len(content) > _LARGEST_FILE:
        return f"is larger than {_LARGEST_FILE >> 20} MiB"
    # From memory, so that an error of the disk is not taken for one of the file.
    return decode_image(content, image_size, _formats(path))


def decode_image(
    content: bytes, image_size: int | None = None, formats: tuple[str, ...] = _FORMATS
) -> ImageFile | str | Exception:
    """Decodes the content of an image file.

    Args:
        content: of the file.
        image_size: see `read_image`.
        formats: Pillow's names of those that are accepted.

    Returns:
        See `read_image`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            return _problem(image, image_size) or _convert(image, image_size)
    except MemoryError as error:
        return error
    except CORRUPTION as error:
        return f"is not a readable image ({one_line(error).partition(' <_io.')[0]})"


def read_size(path: Path) -> tuple[int, int] | None:
    """Returns width and height as the header states them; None = it cannot be read."""
    try:
        with (
            warnings.catch_warnings(),
            path.open("rb") as file,
            Image.open(file, formats=_formats(path)) as image,
        ):
            return image.size
    except CORRUPTION:
        return None


def describe_conversions(conversions: dict[str, int], image_size: int | None) -> str:
    """Returns how many images were converted in which way, as text; '' = none.

    Args:
        conversions: number of images of each of `ImageFile.conversions`.
        image_size: see `read_image`.
    """
    rest = {name: f"{count:,} {name}" for name, count in conversions.items()}
    colours = [rest.pop(name) for name in list(rest) if name not in _GEOMETRY]
    scaled = f" to {image_size}x{image_size}"
    parts = [f"{', '.join(colours)} converted to RGB"] if colours else []
    parts += [rest[name] for name in (_TURNED, _CROPPED) if name in rest]
    parts += [rest[name] + scaled for name in (_REDUCED, _ENLARGED) if name in rest]
    return "; ".join(parts)


def _formats(path: Path) -> tuple[str, ...]:
    """Returns the formats that a file may have."""
    by_suffix = _suffix_format(path.suffix.lower())
    return (*_FORMATS, by_suffix) if by_suffix else _FORMATS


@functools.cache
def _suffix_format(suffix: str) -> str | None:
    """Returns the format of files with a suffix, None where their content tells it."""
    name = Image.registered_extensions().get(suffix)
    return name if suffix in suffixes() and name not in _FORMATS else None


def _problem(image: ImageFormat.ImageFile, image_size: int | None) -> str | None:
    """Returns why an image, whose pixels are not decoded yet, cannot be used; None = it can."""
    width, height = image.size
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        kind = "is animated" if image.format in ("GIF", "PNG", "WEBP", "AVIF") else "is multi-page"
        return f"{kind}, with {frames} images in one file"
    if _is_deep(image):
        return "has 16 bits a channel, not 8"
    if image.mode not in (*_GREY, *_PALETTE, *_RGB):
        return f"is {_NAMES.get(image.mode, image.mode)}, not 8-bit RGB"
    if width * height > _LARGEST:
        return f"is {width}x{height} pixels, more than {_LARGEST:,}"
    if image_size is None and (width != height or width not in SIZES):
        return f"is {width}x{height} pixels, not square and a multiple of 32 from 32 to 512"
    return None


def _is_deep(image: ImageFormat.ImageFile) -> bool:
    """Whether a channel has 16 bits, of which Pillow drops half silently."""
    for tile in image.tile:
        args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if any(isinstance(arg, str) and ";16" in arg for arg in args):
            return True
        if image.format == "PPM" and isinstance(args[-1], int) and args[-1] > 255:
            return True
    return image.mode.startswith("I;")


def _convert(image: Image.Image, image_size: int | None) -> ImageFile | str:
    """Returns the pixels, or why the image cannot be used."""
    conversions = []
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    image.load()
    rgb: Image.Image = image
    if image.has_transparency_data:
        rgb = image.convert("RGBA")
        if np.asarray(rgb.getchannel("A")).min() < 255:
            return "is transparent"
    if rgb.mode != "RGB":
        rgb = rgb.convert("RGB")
        conversions.append(_colour(image))
    if is_turned:  # a TIFF by Pillow itself, in `load`
        rgb = ImageOps.exif_transpose(rgb)
        conversions.append(_TURNED)
    if image_size is None:
        return ImageFile(np.asarray(rgb), tuple(conversions))
    if rgb.width != rgb.height:
        conversions.append(_CROPPED)
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        rgb = rgb.crop((left, top, left + side, top + side))
    if rgb.width != image_size:
        conversions.append(_REDUCED if rgb.width > image_size else _ENLARGED)
    return ImageFile(_scale(rgb, image_size), tuple(conversions))


def _colour(image: Image.Image) -> str:
    """Returns the kind of an image that was not RGB."""
    if image.mode in _GREY:
        return "greyscale"
    return {"P": "palette", "PA": "palette", "YCbCr": "YCbCr"}.get(image.mode, "opaque RGBA")


def _scale(image: Image.Image, size: int) -> np.ndarray:
    """Returns uint8[size, size, 3] of a square RGB image.

    A smaller size takes the mean over the area of each new pixel, in which pixels that it covers in
    part count in part; Pillow's BOX counts them as a whole or not at all. In whole numbers, so that
    the result, whose SHA-1 is the id, is the same on every machine. A larger size is interpolated.
    """
    if size >= image.width:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    area = image.width**2
    sums = _area_sums(_area_sums(np.asarray(image), size).swapaxes(0, 1), size)
    means = ((2 * sums + area) // (2 * area)).astype(np.uint8)
    return np.ascontiguousarray(means.swapaxes(0, 1))


def _area_sums(pixels: np.ndarray, size: int) -> np.ndarray:
    """Returns int64[size, ...], sums over parts of the rows, in units of 1 / size of a row."""
    rows = len(pixels)
    sums = np.zeros((rows + 1, *pixels.shape[1:]), np.int64)
    np.cumsum(pixels, axis=0, dtype=np.int64, out=sums[1:])
    # Up to the edge k * rows / size: whole rows, and a part of the next.
    whole, part = np.divmod(np.arange(size + 1) * rows, size)
    inner = part.reshape(-1, *[1] * (pixels.ndim - 1))
    edges = sums[whole] * size + pixels[np.minimum(whole, rows - 1)] * inner
    return np.diff(edges, axis=0)
