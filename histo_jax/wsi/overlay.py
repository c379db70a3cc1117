"""Pictures of a map: the thumbnail, the map in colours, and both with a colour bar and a scale."""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont

from histo_jax.slides.grid import Grid
from histo_jax.slides.reader import Pixels
from histo_jax.slides.tissue import Mask

# Points of the colour map cividis (Nuñez et al., 2018), which reads the same with and without
# red-green blindness; between them it is linear.
_COLOURS = np.array(
    [(0, 34, 78), (67, 78, 108), (125, 124, 120), (188, 174, 108), (254, 232, 56)], np.float64
)
_TISSUE, _POSITIVE = (0, 0, 0), (213, 94, 0)
# In the middle of the stains of H&E.
_UNCOMPUTED = (214, 160, 200)
# Pixels at the smallest size: margins, the panel at the right, and what it needs.
_MARGIN, _PANEL, _MIN_HEIGHT = 24, 150, 400
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
    values = _resample(probabilities, canvas, grid)
    blended = _blend(canvas.image, values)
    blended[_outline(mask, 1)] = _TISSUE
    blended[_outline(values >= np.float32(threshold), 3)] = _POSITIVE
    enlargement = max(1, round(600 / max(canvas.image.shape[:2])))
    picture = Image.fromarray(blended)
    size = picture.width * enlargement, picture.height * enlargement
    picture = picture.resize(size, Image.Resampling.NEAREST)
    # So that the text can be read where the whole picture is fitted to a screen.
    unit = max(1, round(max(size) / 1000))
    margin, height = _MARGIN * unit, max(picture.height, _MIN_HEIGHT * unit)
    sheet = Image.new(
        "RGB", (size[0] + _PANEL * unit + 2 * margin, height + 3 * margin + 36 * unit), "white"
    )
    sheet.paste(picture, (margin, margin + 12 * unit))
    pen = ImageDraw.Draw(sheet)
    _write_line(pen, (margin, 8 * unit), title, 18 * unit, sheet.width - 2 * margin)
    corner = size[0] + 2 * margin, margin
    bottom = _draw_colour_bar(sheet, corner, height, threshold, positive, unit)
    _draw_legend(pen, (corner[0], bottom), unit)
    _draw_scale_bar(pen, size, canvas.mpp / enlargement, unit)
    caption = _caption(probabilities, threshold)
    place = margin, size[1] + 3 * margin + 6 * unit
    _write_line(pen, place, caption, 14 * unit, sheet.width - 2 * margin)
    return sheet


def _caption(probabilities: np.ndarray, threshold: float) -> str:
    known = probabilities[~np.isnan(probabilities)]
    if not len(known):
        return "no tissue found"
    share = (known >= np.float32(threshold)).mean()
    return (
        f"{len(known):,} cells, highest {known.max():.3f}, {share:.1%} at or above the threshold. "
        "Computed by a network; not a diagnosis."
    )


def _write_line(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, width: int
) -> None:
    """Writes as much of a text as the width has room for."""
    font = _font(size)
    if font.getlength(text) > width:
        while text and font.getlength(f"{text}...") > width:
            text = text[:-1]
        text += "..."
    pen.text(place, text, fill="black", font=font)


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
    corner: tuple[int, int],
    height: int,
    threshold: float,
    positive: str,
    unit: int,
) -> int:
    """Draws the colours and the threshold below a corner; returns where they end."""
    left, top, width = corner[0], corner[1] + 60 * unit, 28 * unit
    length, pen, font = (
        min(320 * unit, height - 200 * unit),
        ImageDraw.Draw(sheet),
        _font(14 * unit),
    )
    ramp = colour(np.linspace(1, 0, length)[:, None]).repeat(width, axis=1)
    sheet.paste(Image.fromarray(ramp), (left, top))
    pen.rectangle((left - 1, top - 1, left + width, top + length), outline="black")
    text = f"Probability\nof {_shortened(positive)}"
    pen.text((left, top - 44 * unit), text, fill="black", font=font)
    right = left + width
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = top + (1 - value) * (length - 1)
        pen.line((right, y, right + 5 * unit, y), fill="black", width=unit)
        pen.text((right + 8 * unit, y), f"{value:g}", fill="black", font=font, anchor="lm")
    y = top + (1 - threshold) * (length - 1)
    pen.line((left - 8 * unit, y, right, y), fill=_POSITIVE, width=3 * unit)
    pen.text(
        (left, top + length + 8 * unit), f"threshold {threshold:.2g}", fill=_POSITIVE, font=font
    )
    return top + length + 36 * unit


def _draw_legend(pen: ImageDraw.ImageDraw, corner: tuple[int, int], unit: int) -> None:
    """Draws what the outlines mean."""
    left, top = corner
    for text, line, width in (
        ("at or above\nthe threshold", _POSITIVE, 3),
        ("tissue", _TISSUE, 1),
        ("stain colours:\nnot computed", None, 1),
    ):
        box = left, top, left + 20 * unit, top + 14 * unit
        pen.rectangle(box, fill=None if line else _UNCOMPUTED, outline=line, width=width * unit)
        pen.text((left + 28 * unit, top - 2 * unit), text, fill="black", font=_font(13 * unit))
        top += 40 * unit if "\n" in text else 24 * unit


def _shortened(name: str) -> str:
    """Returns as much of a name as the panel has room for."""
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."


def _draw_scale_bar(pen: ImageDraw.ImageDraw, size: tuple[int, int], mpp: float, unit: int) -> None:
    fitting = [length for length in _SCALE_BARS if length / mpp <= size[0] / 4]
    length = fitting[-1] if fitting else _SCALE_BARS[0]
    text = f"{length:g} µm" if length < 1000 else f"{length / 1000:g} mm"
    left, top = _MARGIN * unit, size[1] + (_MARGIN + 22) * unit
    right = left + math.floor(length / mpp)
    pen.rectangle((left, top, right, top + 6 * unit), fill="black")
    place = right + 10 * unit, top + 3 * unit
    pen.text(place, text, fill="black", font=_font(14 * unit), anchor="lm")


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Returns Matplotlib's own font: Pillow's has neither a micro sign nor other alphabets."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
