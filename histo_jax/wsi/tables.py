"""Cells and regions as text: CSV, and GeoJSON as QuPath reads it.

QuPath takes pixels of level 0 from the upper left corner of the bounds that the file states, closed
rings, ids that are UUIDs, and `objectType`, `classification` and `measurements` in `properties`.
"""

import json
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from histo_jax.slides import libraries
from histo_jax.slides.grid import Grid, Rectangles
from histo_jax.wsi.regions import Region

# From the palette of Okabe & Ito, which is safe for colour blindness.
_POSITIVE_COLOUR, _NEGATIVE_COLOUR = [213, 94, 0], [0, 114, 178]
_CHUNK = 4096


class Labels(NamedTuple):
    """How QuPath names cells.

    Attributes:
        threshold: at or above it a cell is positive.
        positive: name of that class.
        negative: name of the other.
    """

    threshold: float
    positive: str
    negative: str = "Other"


def write_cells(
    folder: Path,
    probabilities: Float32[np.ndarray, "rows columns"],
    grid: Grid,
    labels: Labels,
    slide: str,
    offset: tuple[int, int],
) -> None:
    """Writes `cells.csv` and `cells.geojson`, a few cells at a time.

    Args:
        folder: where to.
        probabilities: NaN where there is no cell.
        grid: the cells.
        labels: classes.
        slide: name of the slide, from which the ids are made.
        offset: of QuPath's origin in pixels of level 0.
    """
    rows, columns = np.nonzero(~np.isnan(probabilities))
    values = probabilities[rows, columns]
    rectangles = grid.rectangles(rows, columns)
    with (folder / "cells.csv").open("w", encoding="utf-8", newline="\n") as file:
        file.write("x,y,width,height,probability\n")
        for x, y, width, height, value in _chunks(rectangles, values):
            file.write(f"{x},{y},{width},{height},{value:.8g}\n")
    features = (
        _feature(
            f"{slide} cell {x} {y}",
            "tile",
            _ring(x - offset[0], y - offset[1], width, height),
            labels,
            value,
            {"Probability": _rounded(value)},
        )
        for x, y, width, height, value in _chunks(rectangles, values)
    )
    _write_collection(folder / "cells.geojson", features)


def write_regions(
    path: Path, regions: Iterable[Region], labels: Labels, slide: str, offset: tuple[int, int]
) -> None:
    """Writes the regions as annotations; for arguments see `write_cells`."""
    features = (
        _feature(
            f"{slide} region {region.shape.bounds}",
            "annotation",
            _outline(region.shape, offset),
            labels,
            1.0,
            {
                "Area mm^2": _rounded(region.area),
                "Mean probability": _rounded(region.mean),
                "Highest probability": _rounded(region.highest),
                "Cells": region.cells,
            },
        )
        for region in regions
    )
    _write_collection(path, features)


def _outline(shape: Any, offset: tuple[int, int]) -> dict[str, Any]:
    """Returns a polygon as GeoJSON: the outer ring is counter-clockwise, holes are clockwise."""
    shapely, affinity = libraries.load("shapely"), libraries.load("shapely.affinity")
    moved = affinity.translate(shape, -offset[0], -offset[1])
    return json.loads(shapely.to_geojson(shapely.orient_polygons(moved)))


def _chunks(
    rectangles: Rectangles, values: np.ndarray
) -> Iterator[tuple[int, int, int, int, float]]:
    """Yields the cells as plain numbers."""
    for start in range(0, len(values), _CHUNK):
        part = slice(start, start + _CHUNK)
        columns = [side[part].tolist() for side in (*rectangles, values)]
        yield from zip(*columns, strict=True)


def _ring(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    right, bottom = x + width, y + height
    ring = [[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]
    return {"type": "Polygon", "coordinates": [ring]}


def _feature(
    key: str,
    kind: str,
    geometry: dict[str, Any],
    labels: Labels,
    probability: float,
    measurements: dict[str, float],
) -> dict[str, Any]:
    is_positive = probability >= labels.threshold
    name, colour = (
        (labels.positive, _POSITIVE_COLOUR) if is_positive else (labels.negative, _NEGATIVE_COLOUR)
    )
    return {
        "type": "Feature",
        # The same cell has the same id in every run.
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, key)),
        "geometry": geometry,
        "properties": {
            "objectType": kind,
            "classification": {"name": name, "color": colour},
            "measurements": measurements,
        },
    }


def _rounded(value: float) -> float:
    """Returns a number with the digits of float32."""
    return float(f"{value:.8g}")


def _write_collection(path: Path, features: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type":"FeatureCollection","features":[')
        separator = "\n"
        for feature in features:
            file.write(separator + json.dumps(feature, separators=(",", ":"), allow_nan=False))
            separator = ",\n"
        file.write("\n]}\n")
