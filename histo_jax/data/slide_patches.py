"""Cells of a slide as patches: reads them by threads, each with its position on the slide."""

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from histo_jax.data.example import Example
from histo_jax.data.read_ahead import read_ahead
from histo_jax.data.slide_tables import AnnotatedSlide
from histo_jax.slides import reader, resolution
from histo_jax.slides.grid import Grid
from histo_jax.slides.scaling import read_scaled

# Before the place of a patch in its path.
_PLACE = "#xywh="


class Cells(NamedTuple):
    """Cells of a slide that become patches.

    Attributes:
        listed: the slide.
        scale: how target pixels are read.
        grid: all cells of the slide.
        rows: int[n], of these cells.
        columns: likewise.
        labels: int[n], 0 or 1.
    """

    listed: AnnotatedSlide
    scale: resolution.Scale
    grid: Grid
    rows: np.ndarray
    columns: np.ndarray
    labels: np.ndarray


def read(cells: Cells, path: str) -> Iterator[Example]:
    """Yields the patches of a slide, block by block; holds a few blocks in memory.

    Args:
        cells: of the slide.
        path: of the slide, as the examples name it. Behind it stands the place of the patch in
            pixels of level 0, as the W3C writes fragments of pictures: `a.svs#xywh=96,128,384,384`.

    Raises:
        DataError: the slide is corrupt.
    """
    with reader.open_slide(cells.listed.path) as slide:
        read_one = functools.partial(_read_group, slide, cells)
        for group, patches in read_ahead(read_one, _groups(cells), size=1):
            for index, patch in zip(group.tolist(), patches, strict=True):
                yield Example(
                    id=hashlib.sha1(patch.data).hexdigest(),
                    image=patch,
                    label=int(cells.labels[index]),
                    slide=cells.listed.name,
                    patient=cells.listed.patient,
                    path=f"{path}{_PLACE}{_place(cells, index)}",
                )


def slide_paths(paths: pd.Series) -> pd.Series:
    """Returns the path of the slide of each patch, from the path of the patch."""
    return paths.str.rpartition(_PLACE)[0]


def _groups(cells: Cells) -> Iterator[np.ndarray]:
    """Yields the cells that are read together: those of a block where they fill most of it."""
    grid = cells.grid
    blocks = cells.rows // grid.block * cells.grid.shape[1] + cells.columns // grid.block
    order = np.argsort(blocks, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1):
        height, width = (
            np.ptp(index[group]) * grid.stride + grid.window
            for index in (cells.rows, cells.columns)
        )
        if len(group) * grid.window**2 >= height * width:
            yield group
        else:
            yield from group[:, None]


def _read_group(
    slide: reader.Slide, cells: Cells, group: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the cells and their patches, which are parts of one region."""
    grid = cells.grid
    y, x = (index[group] * grid.stride - grid.margin for index in (cells.rows, cells.columns))
    top, left = int(y.min()), int(x.min())
    height, width = int(y.max()) - top + grid.window, int(x.max()) - left + grid.window
    pixels = read_scaled(slide, cells.scale, left, top, width, height)
    corners = zip((y - top).tolist(), (x - left).tolist(), strict=True)
    return group, [
        np.ascontiguousarray(pixels[row : row + grid.window, column : column + grid.window])
        for row, column in corners
    ]


def _place(cells: Cells, index: int) -> str:
    """Returns where a patch is; one at the slide's edge may begin outside of it."""
    grid = cells.grid
    x, y = (
        (int(place[index]) * grid.stride - grid.margin) * full
        for place, full in zip((cells.columns, cells.rows), grid.full, strict=True)
    )
    width, height = (grid.window * full for full in grid.full)
    return f"{x:.0f},{y:.0f},{width:.0f},{height:.0f}"
