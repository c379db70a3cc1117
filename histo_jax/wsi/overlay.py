"""Pictures of a map: the thumbnail, the map in colours, and both with a colour bar and a scale."""

import math
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont

from histo_jax.wsi.grid import Grid
from histo_jax.wsi.reader import Pixels
from histo_jax.wsi.tissue import Mask

# Points of the colour map cividis (Nuñez et al., 2018), which reads the same with and without
# red-green blindness; between them it is linear.
_COLOURS = np.array(
    [(0, 34, 78), (67, 78, 108), (125, 124, 120), (188, 174, 108), (254, 232, 56)], np.float64
)
_TISSUE, _POSITIVE = (0, 0, 0), (213, 94, 0)
_MARGIN, _PANEL = 24, 150
_LONGEST = 14  # characters of a class name beside the colour bar
# Lengths of a scale bar in micrometres: the longest that fits a quarter of the picture.
_SCALE_BARS = [factor * 10**power for power in range(1, 6) for factor in (1, 2, 5)]


class Canvas(NamedTuple):
    """A thumbnail and its scale.

    Attributes:
        image: the thumbnail.
        step: width of its pixels in pixels of level 0.
        mpp: width of its pixels in micrometres.
    """

    image: Pixels
    step: float
    mpp: float


def colour(probabilities: np.ndarray) -> UInt8[np.ndarray, "... 3"]:
    """Returns the colour of probabilities, in 256 steps."""
    points = np.linspace(0, 255, len(_COLOURS))
    channels = [np.interp(np.arange(256), points, channel) for channel in _COLOURS.T]
    table = np.stack(channels, axis=1).round().astype(np.uint8)
    return table[(np.nan_to_num(probabilities) * 255).round().astype(np.uint8)]


def map_picture(probabilities: Float32[np.ndarray, "rows columns"]) -> Image.Image:
    """Returns the map as RGBA, one pixel a cell, transparent where nothing was computed."""
    alpha = np.where(np.isnan(probabilities), 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([colour(probabilities), alpha]))


def draw(
    canvas: Canvas,
    mask: Mask,
    probabilities: Float32[np.ndarray, "rows columns"],
    grid: Grid,
    threshold: float,
    title: str,
    positive: str,
) -> Image.Image:
    """Returns the map over the thumbnail, with tissue outline, colour bar and scale bar.

    Args:
        canvas: the thumbnail.
        mask: tissue on it.
        probabilities: of the cells.
        grid: the cells.
        threshold: marked at the colour bar.
        title: name of the slide.
        positive: name of the positive class.
    """
    enlargement = max(1, round(600 / max(canvas.image.shape[:2])))
    values = _resample(probabilities, canvas, grid)
    blended = _blend(canvas.image, values)
    blended[_outline(mask, 1)] = _TISSUE
    blended[_outline(values >= np.float32(threshold), 3)] = _POSITIVE
    picture = Image.fromarray(blended)
    size = picture.width * enlargement, picture.height * enlargement
    picture = picture.resize(size, Image.Resampling.NEAREST)
    height = max(picture.height, 260)
    sheet = Image.new(
        "RGB", (picture.width + _PANEL + 2 * _MARGIN, height + 3 * _MARGIN + 36), "white"
    )
    sheet.paste(picture, (_MARGIN, _MARGIN + 12))
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 8), title, fill="black", font=_font(18))
    _draw_colour_bar(sheet, pen, picture.width + 2 * _MARGIN, height, threshold, positive)
    _draw_scale_bar(pen, picture.size, canvas.mpp / enlargement)
    return sheet


def _resample(probabilities: np.ndarray, canvas: Canvas, grid: Grid) -> np.ndarray:
    """Returns the probability of each pixel of the thumbnail."""
    rows, columns = (
        np.minimum(
            ((np.arange(side) + 0.5) * canvas.step / (grid.stride * full)).astype(int), count - 1
        )
        for side, full, count in zip(
            canvas.image.shape[:2], reversed(grid.full), grid.shape, strict=True
        )
    )
    return probabilities[np.ix_(rows, columns)]


def _blend(image: Pixels, values: np.ndarray) -> Pixels:
    """Returns the thumbnail in grey, mixed with the map in equal parts; in colour elsewhere."""
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    mixed = ((colour(values).astype(np.uint16) + grey) // 2).astype(np.uint8)
    return np.where(np.isnan(values)[..., None], image, mixed)


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Returns the pixels of a mask at its border."""
    return mask & ~scipy.ndimage.binary_erosion(mask, iterations=width, border_value=1)


def _draw_colour_bar(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    left: int,
    height: int,
    threshold: float,
    positive: str,
) -> None:
    top, length, width = _MARGIN + 60, min(320, height - 60), 28
    ramp = colour(np.linspace(1, 0, length)[:, None]).repeat(width, axis=1)
    sheet.paste(Image.fromarray(ramp), (left, top))
    pen.rectangle((left - 1, top - 1, left + width, top + length), outline="black")
    pen.text(
        (left, top - 44), f"Probability\nof {_shortened(positive)}", fill="black", font=_font(14)
    )
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = top + (1 - value) * (length - 1)
        pen.line((left + width, y, left + width + 5, y), fill="black")
        pen.text((left + width + 8, y), f"{value:g}", fill="black", font=_font(14), anchor="lm")
    y = top + (1 - threshold) * (length - 1)
    pen.line((left - 8, y, left + width, y), fill=_POSITIVE, width=3)
    text = f"threshold {threshold:.2g}"
    pen.text((left, top + length + 8), text, fill=_POSITIVE, font=_font(14))


def _shortened(name: str) -> str:
    """Returns as much of a name as the panel has room for."""
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."


def _draw_scale_bar(pen: ImageDraw.ImageDraw, size: tuple[int, int], mpp: float) -> None:
    fitting = [length for length in _SCALE_BARS if length / mpp <= size[0] / 4]
    length = fitting[-1] if fitting else _SCALE_BARS[0]
    text = f"{length / 1000:g} mm"  # Pillow's font has no micro sign
    top, right = size[1] + _MARGIN + 22, _MARGIN + math.floor(length / mpp)
    pen.rectangle((_MARGIN, top, right, top + 6), fill="black")
    pen.text((right + 10, top + 3), text, fill="black", font=_font(14), anchor="lm")


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
