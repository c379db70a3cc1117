"""Opens slides and reads their pixels: OpenSlide's formats, and pictures that Pillow reads."""

import abc
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from histo_jax.errors import DataError, UserError, one_line
from histo_jax.slides import libraries

Pixels = UInt8[np.ndarray, "height width 3"]

WHITE = 255
# A picture is decoded as a whole; 200 megapixels are 600 MB.
_MAX_PICTURE_PIXELS = 200_000_000
# A spacing outside this range (micrometres) is a default such as 72 dots per inch, not a scale.
PLAUSIBLE = (0.02, 50.0)
# Pixels of a level that are read from one position where positions are not exact.
_SQUARE = 512
_CACHE_BYTES = 2**26
_UNITS = {"centimeter": 1e4, "inch": 25400.0}
_OME_UNITS = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4}
_COLOUR_MODES = ("RGB", "RGBA", "L", "LA", "P", "YCbCr", "1")


class Spacing(NamedTuple):
    """Width and height of a pixel of level 0 in micrometres, and where they come from."""

    x: float
    y: float
    source: str


class Slide(abc.ABC):
    """An open slide.

    Attributes:
        path: of the file.
        vendor: format, as in 'aperio'.
        levels: width and height in pixels of each level, the finest first.
        spacing: as the file states it; None = it does not.
        offset: x and y in level-0 pixels of the corner that QuPath takes as the origin; it crops
            slides to the bounds that the file states.
        series: identity of the DICOM series that the file belongs to; '' = none.
    """

    path: Path
    vendor: str
    levels: list[tuple[int, int]]
    spacing: Spacing | None
    offset: tuple[int, int] = (0, 0)
    series: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""
        return self.levels[0]

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def downsample(self, level: int) -> tuple[float, float]:
        """Returns how many pixels of level 0 one pixel of a level is wide and high.

        Levels have whole pixels, so that a ratio of 4 may read 4.0004: whole numbers are restored.
        """

        def ratio(full: int, reduced: int) -> float:
            value = full / reduced
            return float(round(value)) if abs(full - round(value) * reduced) < value else value

        (width, height), (level_width, level_height) = self.levels[0], self.levels[level]
        return ratio(width, level_width), ratio(height, level_height)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Reads a region; what is outside the slide or transparent is white. Thread-safe.

        Args:
            level: 0 = the finest.
            x: left edge in pixels of that level; may be negative.
            y: upper edge, likewise.
            width: in pixels of that level.
            height: likewise.

        Raises:
            DataError: the file is corrupt there.
        """
        level_width, level_height = self.levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, level_width), min(y + height, level_height)
        is_inside = (left, top, right, bottom) == (x, y, x + width, y + height)
        if is_inside:
            return self._read_inside(level, x, y, width, height)
        pixels = np.full((height, width, 3), WHITE, np.uint8)
        if right > left and bottom > top:
            pixels[top - y : bottom - y, left - x : right - x] = self._read_inside(
                level, left, top, right - left, bottom - top
            )
        return pixels

    def _read_inside(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        try:
            return self._read(level, x, y, width, height)
        except MemoryError:
            raise
        except Exception as error:  # libraries raise anything on a corrupt file
            raise DataError(
                f"{self.path} cannot be read at level {level}, x {x}, y {y} "
                f"({one_line(error)}): restore the file"
            ) from error

    @abc.abstractmethod
    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Reads a region inside the level."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the file."""


class _OpenSlide(Slide):
    """A slide that OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        openslide = libraries.load("openslide")
        self._slide = openslide.OpenSlide(path)
        # Strips that several threads read share tiles at their borders.
        self._slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        properties = self._slide.properties
        self.path, self.levels = path, list(self._slide.level_dimensions)
        self.vendor = properties.get("openslide.vendor", "unknown")
        self.spacing = _openslide_spacing(properties)
        self.series = properties.get("dicom.SeriesInstanceUID", "")
        bounds = [properties.get(f"openslide.bounds-{side}") for side in ("x", "y")]
        if all(bounds):
            self.offset = int(bounds[0]), int(bounds[1])

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        if self._slide.level_downsamples[level].is_integer():
            return self._region(level, x, y, width, height)
        # Read in squares of a fixed grid, so that a pixel does not depend on the region.
        pixels = np.empty((height, width, 3), np.uint8)
        right, bottom = x + width, y + height
        for top in range(y - y % _SQUARE, bottom, _SQUARE):
            for left in range(x - x % _SQUARE, right, _SQUARE):
                ends = min(left + _SQUARE, right), min(top + _SQUARE, bottom)
                square = self._region(level, left, top, ends[0] - left, ends[1] - top)
                place = slice(max(top, y) - y, ends[1] - y), slice(max(left, x) - x, ends[0] - x)
                pixels[place] = square[max(y - top, 0) :, max(x - left, 0) :]
        return pixels

    def _region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        # OpenSlide divides the position by this number and interpolates between pixels. The number
        # is the mean of both axes, and seldom whole: a level has whole pixels.
        factor = self._slide.level_downsamples[level]
        corner = round(x * factor), round(y * factor)
        return _on_white(self._slide.read_region(corner, level, (width, height)))

    def close(self) -> None:
        self._slide.close()


class Picture(Slide):
    """A picture that Pillow reads, held in memory; its pixels are taken as they are stored.

    Args:
        path: of the file.
        content: of the file, for a picture that no file holds; its `path` is only its name.

    Raises:
        DataError: it has too many pixels, or pixels of another kind.
    """

    vendor = "picture"

    def __init__(self, path: Path, content: io.BytesIO | None = None) -> None:
        self.path = path
        with Image.open(content or path) as image:
            if image.width * image.height > _MAX_PICTURE_PIXELS:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels, too many to be held in "
                    "memory: convert it to a tiled TIFF with a pyramid, as by vips tiffsave "
                    "--tile --pyramid"
                )
            if image.mode not in _COLOUR_MODES:
                raise DataError(
                    f"{path} has pixels of mode {image.mode}: convert it to RGB with 8 bits a "
                    "channel"
                )
            self.vendor = str(image.format).lower()
            self.spacing = _picture_spacing(image)
            has_alpha = image.mode in ("RGBA", "LA") or "transparency" in image.info
            mode = "RGBA" if has_alpha else "RGB"
            # Without a second copy of hundreds of MB where it is of that mode.
            rgba = image if image.mode == mode else image.convert(mode)
            self._pixels = _on_white(rgba)
        # Pillow turns a TIFF by its orientation when it decodes it.
        self.levels = [(self._pixels.shape[1], self._pixels.shape[0])]

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        """Frees the pixels."""
        self._pixels = np.zeros((0, 0, 3), np.uint8)


def open_slide(path: Path) -> Slide:
    """Opens a slide or a picture; the caller closes it.

    Raises:
        DataError: the file is missing, corrupt, or of an unknown format.
        UserError: the extra `slides` is not installed.
    """
    _check_file(path)
    reasons = []
    if vendor := detect(path):
        try:
            return _OpenSlide(path)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            reasons.append(f"{vendor}: {one_line(error)}")
    try:
        return Picture(path)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's plug-ins raise anything on a corrupt file
        reasons.append(one_line(error))
    reason = reasons[0].replace(str(path), "").strip(" :'")
    raise DataError(f"{path} is not a slide that can be read ({reason}): restore or convert it")


def _check_file(path: Path) -> None:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise DataError(f"{path} is not a file: correct the path")
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}): correct the path") from None


def detect(path: Path) -> str | None:
    """Returns OpenSlide's name of the file's format, None if it knows none."""
    openslide = libraries.load("openslide")
    try:
        return openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None


def _on_white(image: Image.Image) -> Pixels:
    """Returns the pixels of an RGB or RGBA picture; transparent ones become white."""
    if image.mode == "RGB" or image.getchannel("A").getextrema()[0] == WHITE:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    pixels = np.asarray(image)
    alpha = pixels[..., 3:].astype(np.uint16)
    mixed = pixels[..., :3] * alpha + WHITE * (WHITE - alpha)
    return ((mixed + WHITE // 2) // WHITE).astype(np.uint8)


def _openslide_spacing(properties: Mapping[str, str]) -> Spacing | None:
    def number(name: str) -> float:
        return _number(properties.get(name, "").replace(",", "."))

    known = _spacing(number("openslide.mpp-x"), number("openslide.mpp-y"), "the slide's properties")
    unit = _UNITS.get(properties.get("tiff.ResolutionUnit", ""), 0.0)
    per_unit = [number(f"tiff.{axis}Resolution") for axis in "XY"]
    return known or _from_resolution(per_unit, unit)


def _picture_spacing(image: Image.Image) -> Spacing | None:
    """Returns the scale in the tags of a TIFF; dots per inch of other pictures mean paper."""
    tags: Any = getattr(image, "tag_v2", None)
    if tags is None:
        return None
    description = str(tags.get(270, ""))
    sizes = []
    for axis in "XY":
        size = re.search(rf'PhysicalSize{axis}="([^"]+)"', description)
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', description)
        scale = _OME_UNITS.get(unit[1] if unit else "µm", 0.0)
        sizes.append(_number(size[1]) * scale if size else 0.0)
    unit_name = {2: "inch", 3: "centimeter"}.get(tags.get(296, 2), "")
    per_unit = [_number(tags.get(tag)) for tag in (282, 283)]
    return _spacing(sizes[0], sizes[1], "OME-XML") or _from_resolution(
        per_unit, _UNITS.get(unit_name, 0.0)
    )


def _number(value: Any) -> float:
    """Returns what a tag holds as a number, 0 where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0


def _from_resolution(per_unit: list[float], unit: float) -> Spacing | None:
    if not all(per_unit):
        return None
    return _spacing(unit / per_unit[0], unit / per_unit[1], "TIFF resolution tags")


def _spacing(x: float, y: float, source: str) -> Spacing | None:
    """Returns a spacing, None if it is missing or cannot be one of a slide."""
    return Spacing(x, y, source) if is_plausible(x) and is_plausible(y) else None


def is_plausible(mpp: float) -> bool:
    """Returns whether this many micrometres can be the width of a slide's pixel."""
    low, high = PLAUSIBLE
    return low <= mpp <= high
