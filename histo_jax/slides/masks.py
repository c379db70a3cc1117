"""Reads mask images: pictures of classes that cover a whole slide, at any scale."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from histo_jax.errors import DataError, UserError, one_line
from histo_jax.slides import libraries

SUFFIXES = (".png", ".tif", ".tiff")
# The mask of `NAME.svs` is `NAME_mask.png`.
_ENDING = "_mask"
# Pixels that are read at most: of a pyramid, the finest level that has no more.
_MAX_PIXELS = 64_000_000
# Largest relative difference between the proportions of a mask and of its slide.
_MAX_DISTORTION = 0.02
# A picture with more values is none of classes; its outlines could fill the memory.
_MAX_CLASSES = 64


def slide_stem(path: Path) -> str | None:
    """Returns the stem of the slide that a file is the mask of by its name; None = it is none."""
    is_mask = path.suffix.lower() in SUFFIXES and path.stem.lower().endswith(_ENDING)
    return path.stem[: -len(_ENDING)] if is_mask else None


def read(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Returns the area of each value above 0, by the value as text, in pixels of level 0.

    Args:
        path: of the mask.
        size: width and height of the slide in pixels of level 0.

    Raises:
        DataError: it cannot be read, is too large, or has not the slide's proportions.
    """
    try:
        values = _read_tiff(path) if path.suffix.lower() != ".png" else _read_picture(path)
    except (OSError, UserError) as error:
        if isinstance(error, UserError) or error.errno:
            raise
        raise _unreadable(path, error) from None
    except Exception as error:  # libraries raise anything on a corrupt file
        raise _unreadable(path, error) from None
    values = _one_channel(path, values)
    height, width = values.shape
    scale = size[0] / width, size[1] / height
    # The last pixel of a small mask may reach beyond the slide.
    slack = _MAX_DISTORTION + 1 / min(width, height)
    if not 1 - slack < scale[0] / scale[1] < 1 + slack:
        raise DataError(
            f"{path} has {width} x {height} pixels, and its slide {size[0]} x {size[1]}: give a "
            "mask of the whole slide, with its proportions"
        )
    classes = np.unique(values)
    if len(classes) > _MAX_CLASSES:
        raise DataError(
            f"{path} has {len(classes)} different values, too many for classes: save the mask "
            "without lossy compression"
        )
    return {str(value): outline(values == value, scale) for value in classes if value}


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is no mask that can be read ({one_line(error)}): save it again")


def _too_large(path: Path, width: int, height: int) -> DataError:
    return DataError(
        f"{path} has {width} x {height} pixels, too many to be held in memory: save it with fewer "
        f"than {_MAX_PIXELS // 10**6} million; it need not have the size of the slide"
    )


def _read_tiff(path: Path) -> np.ndarray:
    """Reads the finest level that is not too large."""
    with libraries.load("tifffile").TiffFile(path) as file:
        for level in file.series[0].levels:
            if math.prod(level.shape[:2]) <= _MAX_PIXELS:
                return level.asarray()
        raise _too_large(path, level.shape[1], level.shape[0])


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise _too_large(path, image.width, image.height)
        return np.asarray(image)  # of a palette, its indices


def _one_channel(path: Path, values: np.ndarray) -> np.ndarray:
    """Returns the classes of a mask with one channel, or several that say the same."""
    if values.ndim == 3:
        first, others = values[..., 0], values[..., 1:3]
        is_grey = (others == first[..., None]).all()
        values = first if is_grey or not others.any() else values
    if values.ndim != 2 or not values.size or values.dtype.kind not in "bui":
        raise DataError(
            f"{path} has pixels {values.dtype}[{', '.join(map(str, values.shape))}], and must be "
            "a grey image whose values are the classes: save it so"
        )
    return values.astype(np.uint8) if values.dtype.kind == "b" else values


def outline(mask: np.ndarray, scale: tuple[float, float]) -> Any:
    """Returns the area of a mask's pixels.

    Args:
        mask: bool[height, width].
        scale: width and height of a pixel in the area's unit.
    """
    shapely = libraries.load("shapely")
    # Of the runs of each row, which are fewer than the pixels.
    padded = np.pad(mask, [(0, 0), (1, 1)]).view(np.int8)
    change = np.diff(padded, axis=1)
    rows, first = np.nonzero(change == 1)
    last = np.nonzero(change == -1)[1]
    boxes = shapely.box(first * scale[0], rows * scale[1], last * scale[0], (rows + 1) * scale[1])
    return shapely.union_all(boxes)
