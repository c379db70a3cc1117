"""Where tissue is: from the colours of a thumbnail, a mask image, or annotations of QuPath."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Bool
from PIL import Image, ImageDraw

from histo_jax.errors import DataError, one_line
from histo_jax.run import files
from histo_jax.slides import libraries
from histo_jax.slides.reader import Pixels, Slide, Spacing

Mask = Bool[np.ndarray, "height width"]

# PatchCamelyon's own rule takes a patch with a saturation of at least 0.07 anywhere in it.
SATURATION = 0.07
# The saturation is averaged over this many micrometres: noise of glass is finer, nuclei are not.
_SMOOTHING = 8.0
# Darker than this is a border, a fold of black ink or a missing part, not stained tissue.
_MIN_BRIGHTNESS = 0.15
# Ink of pens: saturated, and green to blue, where haematoxylin and eosin are violet to red.
_INK_HUES, _INK_SATURATION = (60.0, 225.0), 0.25
# Ratio up to which the aspects of a slide and of its mask are taken for one.
_SAME_SHAPE = 1.02
_SUFFIXES = (".geojson", ".json", ".png", ".tif", ".tiff")


class Options(NamedTuple):
    """How tissue is found.

    Attributes:
        tissue: 'auto', 'all', or the path of a mask image, a GeoJSON or a folder of such files.
        min_area: smallest piece of tissue in square micrometres.
        max_hole: largest hole that is filled, likewise.
    """

    tissue: str
    min_area: float
    max_hole: float


def find(
    slide: Slide, image: Pixels, step: float, spacing: Spacing, options: Options, name: str
) -> Mask:
    """Returns where tissue is on a thumbnail.

    Args:
        slide: open.
        image: its thumbnail.
        step: width of the thumbnail's pixels in pixels of level 0.
        spacing: micrometres of a pixel of level 0.
        options: how to find it.
        name: of the slide's results; in a folder of masks, the stem of the mask's file.

    Raises:
        DataError: the mask is missing or cannot be read.
    """
    if options.tissue == "all":
        return np.ones(image.shape[:2], bool)
    if options.tissue == "auto":
        area = spacing.x * spacing.y * step**2
        width = max(1, round(_SMOOTHING / (max(spacing.x, spacing.y) * step)))
        return detect(image, width, options.min_area / area, options.max_hole / area)
    path = mask_file(options.tissue, slide.path, name)
    if path.suffix.lower() in (".geojson", ".json"):
        mask = _draw(_read_polygons(path), image.shape[:2], step, slide.offset)
        if not mask.any():
            raise DataError(f"{path} has no polygon on {slide.path}: give that slide's own file")
        return mask
    return _read_mask(path, image.shape[:2])


def detect(image: Pixels, smoothing: int, min_pixels: float, max_hole_pixels: float) -> Mask:
    """Returns where a thumbnail shows stained tissue.

    Args:
        image: the thumbnail.
        smoothing: width in pixels over which colours are averaged.
        min_pixels: smaller pieces are left out.
        max_hole_pixels: smaller holes are filled.
    """
    colours = image.astype(np.float32) / 255
    if smoothing > 1:
        colours = scipy.ndimage.uniform_filter(colours, (smoothing, smoothing, 1), mode="nearest")
    red, green, blue = np.moveaxis(colours, 2, 0)
    brightest = np.maximum(np.maximum(red, green), blue)
    darkest = np.minimum(np.minimum(red, green), blue)
    saturation = (brightest - darkest) / np.maximum(brightest, 1e-6)
    mask = (saturation >= SATURATION) & (brightest >= _MIN_BRIGHTNESS)
    mask &= ~_is_ink(red, green, blue, saturation)
    mask = ~_without_small(~mask, max_hole_pixels)
    return _without_small(mask, min_pixels)


def _is_ink(red: np.ndarray, green: np.ndarray, blue: np.ndarray, saturation: np.ndarray) -> Mask:
    brightest = np.maximum(green, blue)
    span = np.maximum(brightest - np.minimum(np.minimum(red, green), blue), 1e-6)
    # Hue in degrees where green or blue is the brightest; where red is, it is no ink's.
    hue = np.where(
        brightest == green, 120 + 60 * (blue - red) / span, 240 + 60 * (red - green) / span
    )
    low, high = _INK_HUES
    return (brightest > red) & (hue >= low) & (hue <= high) & (saturation >= _INK_SATURATION)


def _without_small(mask: Mask, min_pixels: float) -> Mask:
    """Returns a mask without its connected parts of fewer pixels."""
    labels, count = scipy.ndimage.label(mask)
    if not count:
        return mask
    is_large = np.bincount(labels.ravel()) >= min_pixels
    is_large[0] = False
    return is_large[labels]


def mask_file(tissue: str, slide: Path, name: str) -> Path:
    """Returns the file that `tissue` means for a slide.

    Raises:
        DataError: there is none.
    """
    path = files.expand(tissue, "--config.heatmap.tissue")
    if path.is_dir():
        stems = dict.fromkeys((slide.stem, name))
        found = [path / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES]
        found = [file for file in found if file.is_file()]
        if not found:
            raise DataError(
                f"config.heatmap.tissue: {path} has no mask of this slide: add {slide.stem}.png or "
                f"{slide.stem}.geojson"
            )
        return found[0]
    if not path.is_file():
        raise DataError(
            f"config.heatmap.tissue = {tissue} does not exist: give auto, all, a mask image, a "
            "GeoJSON, or a folder of such files"
        )
    return path


def _read_mask(path: Path, shape: tuple[int, int]) -> Mask:
    """Reads a mask image of any size that covers the whole slide; what is not 0 is tissue."""
    try:
        with Image.open(path) as image:
            is_tissue = np.asarray(image.convert("L")) > 0
    except Exception as error:  # Pillow's plug-ins raise anything on a corrupt file
        raise DataError(f"{path} is not an image that can be read ({one_line(error)})") from None
    if not _have_one_shape(is_tissue.shape, shape):
        raise DataError(
            f"{path} has {is_tissue.shape[1]} x {is_tissue.shape[0]} pixels, another shape than "
            f"the slide's {shape[1]} x {shape[0]} pixels on the thumbnail: give a mask of the "
            "whole slide"
        )
    # A pixel of the thumbnail is tissue where any pixel of a finer mask is.
    for axis, length in enumerate(shape):
        first = np.arange(length) * is_tissue.shape[axis] // length
        is_tissue = np.logical_or.reduceat(is_tissue, first, axis)
    return is_tissue


def _have_one_shape(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Returns whether two images can show one area, with sides rounded to whole pixels."""

    def bounds(height: int, width: int) -> tuple[float, float]:
        return (height - 1) / (width + 1), (height + 1) / max(width - 1, 0.01)

    (low, high), (other_low, other_high) = bounds(*first), bounds(*second)
    return low <= _SAME_SHAPE * other_high and other_low <= _SAME_SHAPE * high


def _read_polygons(path: Path) -> list[Any]:
    """Reads the polygons of a GeoJSON file, as shapely geometries."""
    shapely = libraries.load("shapely")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        features = content if isinstance(content, list) else content.get("features", [content])
        geometries = [feature.get("geometry", feature) for feature in features]
        shapes = [
            shapely.make_valid(shapely.from_geojson(json.dumps(geometry)))
            for geometry in geometries
            if geometry and geometry.get("type") in ("Polygon", "MultiPolygon")
        ]
    except Exception as error:  # of JSON, of shapely, or of content that is not GeoJSON
        raise DataError(f"{path} is not a GeoJSON that can be read ({one_line(error)})") from None
    if not shapes:
        raise DataError(f"{path} has no polygon: draw the tissue in QuPath and export it again")
    parts = shapely.get_parts(shapely.union_all(shapes))
    return [part for part in parts if part.geom_type == "Polygon"]


def _draw(
    polygons: list[Any], shape: tuple[int, int], step: float, offset: tuple[int, int]
) -> Mask:
    """Returns a mask of polygons in QuPath's pixels of level 0."""
    shapely = libraries.load("shapely")
    canvas = Image.new("1", (shape[1], shape[0]))
    pen = ImageDraw.Draw(canvas)
    # Pillow draws wrongly far outside of its canvas.
    height, width = (side * step for side in shape)
    x, y = offset
    frame = shapely.box(-x - step, -y - step, width - x + step, height - y + step)
    clipped = shapely.get_parts(shapely.intersection(polygons, frame))
    inside = [part for part in clipped if part.geom_type == "Polygon" and not part.is_empty]
    # A polygon may be inside the hole of a larger one.
    for polygon in sorted(inside, key=lambda shape: -shape.area):
        for ring, value in [(polygon.exterior, 1), *((hole, 0) for hole in polygon.interiors)]:
            points = (np.asarray(ring.coords)[:, :2] + offset) / step
            pen.polygon([tuple(point) for point in points.tolist()], fill=value, outline=value)
    return np.asarray(canvas)
