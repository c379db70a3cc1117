"""The map of one slide, from the file to its results."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from histo_jax.config import TISSUE_WORDS
from histo_jax.data.example import PatchSpec
from histo_jax.distributed import runtime
from histo_jax.errors import DataError
from histo_jax.predictor import Predictor
from histo_jax.run import files, folders
from histo_jax.slides import libraries, reader, resolution, tissue
from histo_jax.slides.grid import Grid
from histo_jax.slides.scaling import thumbnail
from histo_jax.slides.search import SlideFile
from histo_jax.wsi import overlay, probabilities, pyramid, regions, results, tables

# Pixels of the longer side of the thumbnail, on which tissue is found and the map is shown.
_THUMBNAIL = 2048
# Classes that QuPath knows, in its spelling.
QUPATH_CLASSES = {"tumour": "Tumor"}
_VALUES = "heatmap.ome.tif"


class Settings(NamedTuple):
    """How maps are made.

    Attributes:
        patch: size, labelled region and spacing of the network's patches.
        stride: distance of two cells in target pixels.
        threshold: at or above it a cell is positive.
        threshold_source: where it comes from.
        tissue: how tissue is found.
        positive: name of the positive class.
    """

    patch: PatchSpec
    stride: int
    threshold: float
    threshold_source: str
    tissue: tissue.Options
    positive: str

    def inputs(self, predictor: Predictor, slide: SlideFile, name: str) -> dict[str, Any]:
        """Returns everything that the results of a slide depend on, as JSON has it.

        Raises:
            DataError: the slide or its mask cannot be read.
        """
        mask = ""
        try:
            stat = slide.path.stat()
            if self.tissue.tissue not in TISSUE_WORDS:
                file = tissue.mask_file(self.tissue.tissue, slide.path, name)
                mask = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be read ({error.strerror}): restore the file"
            ) from None
        return {
            "slide": [str(slide.path.resolve()), stat.st_size, stat.st_mtime_ns],
            "mpp": slide.mpp,
            "networks": [trained.digest() for trained in predictor.trained],
            "tta": predictor.tta,
            "prior": predictor.prior,
            "patch": list(self.patch),
            "stride": self.stride,
            "threshold": self.threshold,
            "tissue": [*self.tissue, mask],
            "positive": self.positive,
        }


def make(
    predictor: Predictor,
    slide_file: SlideFile,
    settings: Settings,
    folder: Path,
    open_bar: Callable[[int], Any],
) -> dict[str, Any]:
    """Makes the map of one slide and writes its results; they appear when all are complete.

    Args:
        predictor: the networks.
        slide_file: the slide.
        settings: how the map is made.
        folder: of the results; its name is that of the slide.
        open_bar: returns the progress bar of this many cells, a context manager.

    Returns:
        What `slide.json` holds.

    Raises:
        DataError: the slide cannot be read, or lacks micrometres a pixel.
        OSError: a file cannot be written.
        Preempted: a signal has asked this process to stop.
    """
    seconds: dict[str, float] = {}
    name = folder.name
    with reader.open_slide(slide_file.path) as slide:
        inputs = settings.inputs(predictor, slide_file, name)
        with _timing(seconds, "tissue"):
            view = make_view(slide, slide_file, settings, name)
            is_tissue = view.grid.meeting(view.mask, view.canvas.step)
        with _timing(seconds, "cells"), open_bar(int(is_tissue.sum())) as bar:
            values = probabilities.compute(
                predictor, slide, view.scale, view.grid, is_tissue, bar.update
            )
        found = regions.find(values, settings.threshold, view.grid, view.spacing)
        with folders.replacing(folder) as part:
            with _timing(seconds, "outputs"), files.naming(folder):
                _write(part, view, values, found, settings, name)
            summary = {
                "format": results.FORMAT,
                "slide": str(slide_file.path.resolve()),
                **describe(view, settings),
                **summarise(values, found, settings.threshold),
                "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
                **_networks(predictor),
                "inputs": inputs,
            }
            files.write_json(part / results.SUMMARY, summary)
    return summary


class SlideMap(NamedTuple):
    """A finished map.

    Attributes:
        probabilities: float32[rows, columns], NaN where there is no cell.
        grid: the cells.
        spacing: of level 0.
        threshold: at or above it a cell is positive.
    """

    probabilities: np.ndarray
    grid: Grid
    spacing: reader.Spacing
    threshold: float


def read(folder: Path) -> SlideMap:
    """Returns the map that `make` has written."""
    summary = results.read_summary(folder)
    assert summary
    window, cell, stride = (summary[name] for name in ("window", "cell", "stride"))
    size = summary["width"], summary["height"]
    return SlideMap(
        libraries.load("tifffile").imread(folder / _VALUES),
        Grid(window, cell, stride, tuple(summary["pixel"]), size),
        reader.Spacing(summary["mpp_x"], summary["mpp_y"], summary["mpp_source"]),
        summary["threshold"],
    )


class View(NamedTuple):
    """What is known of a slide before its cells are computed.

    Attributes:
        slide: open.
        spacing: of level 0.
        scale: of target pixels.
        grid: the cells.
        canvas: the thumbnail.
        mask: tissue on it.
    """

    slide: reader.Slide
    spacing: reader.Spacing
    scale: resolution.Scale
    grid: Grid
    canvas: overlay.Canvas
    mask: tissue.Mask


def make_view(slide: reader.Slide, slide_file: SlideFile, settings: Settings, name: str) -> View:
    """Reads the thumbnail of a slide, finds its tissue, and lays the grid of cells.

    Args:
        slide: open.
        slide_file: where it is; its `mpp` is used where it is given.
        settings: how the map is made; the spacing of its patches is known.
        name: of the slide's results.

    Raises:
        DataError: the slide cannot be read, is too coarse, or lacks micrometres a pixel.
        Preempted: a signal has asked this process to stop.
    """
    spacing = resolution.slide_spacing(slide, slide_file.mpp)
    assert settings.patch.mpp is not None
    scale = resolution.choose_scale(slide, spacing, settings.patch.mpp)
    patch = settings.patch
    grid = Grid(patch.size, patch.cell, settings.stride, scale.full, slide.size)
    step = max(1.0, max(slide.size) / _THUMBNAIL)
    image = thumbnail(slide, step)
    mask = tissue.find(slide, image, step, spacing, settings.tissue, name)
    canvas = overlay.Canvas(image, step, step * spacing.x)
    return View(slide, spacing, scale, grid, canvas, mask)


def _write(
    part: Path,
    view: View,
    values: np.ndarray,
    found: list[regions.Region],
    settings: Settings,
    name: str,
) -> None:
    """Writes everything but `slide.json`."""
    grid, slide = view.grid, view.slide
    qupath_class = QUPATH_CLASSES.get(settings.positive, settings.positive)
    labels = tables.Labels(settings.threshold, qupath_class)
    tables.write_cells(part, values, grid, labels, name, slide.offset)
    tables.write_regions(part / "regions.geojson", found, labels, name, slide.offset)
    pyramid.write(part / _VALUES, values, grid, view.spacing, name)
    title = slide.path.name
    picture = overlay.draw(
        view.canvas, view.mask, values, grid, settings.threshold, title, settings.positive
    )
    picture.save(part / "overlay.png")
    Image.fromarray(view.canvas.image).save(part / "thumbnail.jpg", quality=85)
    overlay.map_picture(values).save(part / "map.png")


def describe(view: View, settings: Settings) -> dict[str, Any]:
    """Returns what is known of a slide and its grid, as `slide.json` has it."""
    slide, spacing, scale, grid = view.slide, view.spacing, view.scale, view.grid
    tissue_pixels = float(view.mask.sum()) * view.canvas.step**2
    return {
        "width": slide.size[0],
        "height": slide.size[1],
        "vendor": slide.vendor,
        "mpp_x": spacing.x,
        "mpp_y": spacing.y,
        "mpp_source": spacing.source,
        "qupath_offset": list(slide.offset),
        "target_mpp": settings.patch.mpp,
        "level": scale.level,
        "factor": list(scale.factor),
        "pixel": list(scale.full),
        "thumbnail_step": view.canvas.step,
        "tissue_mm2": tissue_pixels * spacing.x * spacing.y / 1e6,
        "rows": grid.shape[0],
        "columns": grid.shape[1],
        "window": grid.window,
        "cell": grid.cell,
        "stride": grid.stride,
        "threshold": settings.threshold,
        "threshold_source": settings.threshold_source,
    }


def summarise(values: np.ndarray, found: list[regions.Region], threshold: float) -> dict[str, Any]:
    """Returns the numbers of a map, None where it has no cells.

    Args:
        values: probabilities, NaN where there is no cell.
        found: its regions.
        threshold: at or above it a cell is positive.
    """
    known = np.sort(values[~np.isnan(values)].astype(np.float64))[::-1]
    top = known[: max(1, round(0.01 * len(known)))]
    return {
        "cells": len(known),
        "highest": float(known[0]) if len(known) else None,
        "mean_top_percent": float(top.mean()) if len(known) else None,
        "share_above": float((known >= np.float32(threshold)).mean()) if len(known) else None,
        "regions": len(found),
        "regions_mm2": sum(region.area for region in found),
    }


def _networks(predictor: Predictor) -> dict[str, Any]:
    return {
        "networks": [
            {"run": trained.run, "step": trained.step, "weights_sha256": trained.digest()}
            for trained in predictor.trained
        ],
        "versions": {
            **runtime.versions(),
            "openslide": libraries.load("openslide").__library_version__,
            "tifffile": libraries.load("tifffile").__version__,
        },
    }


@contextlib.contextmanager
def _timing(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - began
