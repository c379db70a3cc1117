"""The heat map of one picture or slide, made in memory by the functions of `wsi`."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from histo_jax.config import HeatmapConfig
from histo_jax.errors import UserError, one_line
from histo_jax.serve.decoding import data_url, open_picture
from histo_jax.serve.limits import Limits, Refused
from histo_jax.serve.receiving import File
from histo_jax.serve.service import Service
from histo_jax.slides import reader, resolution, tissue
from histo_jax.slides.search import SlideFile
from histo_jax.wsi import overlay, probabilities, slide_map


class Cancelled(Exception):  # noqa: N818 - no error
    """Nobody waits for the map any more."""


class Options(NamedTuple):
    """How a map is made.

    Attributes:
        mpp: micrometres a pixel; None = as the file states them, or else those of the networks.
        tissue: 'auto' or 'all'.
        stride: distance of two cells in target pixels; None = that of neighbours.
        with_probabilities: whether the answer has the number of each cell.
    """

    mpp: float | None = None
    tissue: str = "auto"
    stride: int | None = None
    with_probabilities: bool = False


class RegionMap:
    """Makes one map; its steps run in the threads that suit them, one after the other.

    Args:
        service: the networks and limits.
        source: a file of the request, or a slide of the folder.
        name: of it, for the client.
        options: how the map is made.
        on_cells: called with the cells that are done, and their number in all.
    """

    def __init__(
        self,
        service: Service,
        source: File | SlideFile,
        name: str,
        options: Options,
        on_cells: Callable[[int, int], object],
    ) -> None:
        self._service, self._source, self.name = service, source, name
        self._options, self._on_cells = options, on_cells
        self._is_cancelled = threading.Event()
        self._slide: reader.Slide | None = None

    def cancel(self) -> None:
        """Makes the step that runs end soon."""
        self._is_cancelled.set()

    def close(self) -> None:
        """Closes the file."""
        if self._slide:
            self._slide.close()

    def open(self) -> None:
        """Opens the file, and finds its cells.

        Raises:
            Refused: the file or an option cannot be used.
        """
        limits = self._service.limits
        try:
            self._slide = slide = self._open(limits)
            spacing = self._spacing(slide)
            patch = self._service.predictor.patch
            patch = patch._replace(mpp=patch.mpp or spacing.x)
            self._check_scale(spacing, patch.mpp or spacing.x)
            defaults = HeatmapConfig()
            self._settings = slide_map.Settings(
                patch=patch,
                stride=self._options.stride or patch.cell,
                threshold=self._service.info.threshold,
                threshold_source=self._service.info.threshold_source,
                tissue=tissue.Options(
                    self._options.tissue, defaults.min_tissue_area, defaults.max_hole_area
                ),
                positive=self._service.info.positive,
            )
            given = spacing.x if spacing.source in ("given", "assumed") else None
            self._view = slide_map.make_view(
                slide, SlideFile(slide.path, given), self._settings, self.name
            )
            self._view = self._view._replace(spacing=spacing)
        except UserError as error:
            raise Refused(422, self._public(error)) from None
        self._is_tissue = self._view.grid.meeting(self._view.mask, self._view.canvas.step)
        self._cells = int(self._is_tissue.sum())
        if self._cells > limits.cells:
            factor = int(np.ceil((self._cells / limits.cells) ** 0.5))
            raise Refused(
                413,
                f"{self.name} has {self._cells:,} cells, more than {limits.cells:,}: set stride = "
                f"{factor * patch.cell}, or use the mode heatmap of histo_jax",
            )

    def compute(self) -> None:
        """Computes the probability of each cell; runs in the thread of the networks.

        Raises:
            Refused: the file is corrupt.
            Cancelled: nobody waits any more.
        """
        done, service = 0, self._service
        assert self._slide

        def on_cells(count: int) -> None:
            nonlocal done
            done += count
            service.metrics.count_cells(count)
            self._on_cells(done, self._cells)
            if self._is_cancelled.is_set():
                raise Cancelled
            service.thread.serve_waiting()

        self._on_cells(0, self._cells)
        try:
            self._values = probabilities.compute(
                service.predictor, self._slide, self._view.scale, self._view.grid,
                self._is_tissue, on_cells,
            )  # fmt: skip
        except UserError as error:
            raise Refused(422, self._public(error)) from None

    def answer(self) -> dict[str, Any]:
        """Returns the map as a client gets it."""
        view, values = self._view, self._values
        grid, step = view.grid, view.canvas.step
        height, width = view.canvas.image.shape[:2]
        rows, columns = grid.shape
        result = {
            "name": self.name,
            **slide_map.describe(view, self._settings),
            **slide_map.summarise(values, [], self._settings.threshold),
            "positive": self._settings.positive,
            "thumbnail": data_url(view.canvas.image, "jpeg"),
            "map": data_url(overlay.map_picture(values), "png"),
            # Of the thumbnail's size, in percent: the last cells may reach beyond it.
            "map_width": 100 * columns * grid.stride * grid.full[0] / (width * step),
            "map_height": 100 * rows * grid.stride * grid.full[1] / (height * step),
        }
        for key in ("regions", "regions_mm2", "qupath_offset", "vendor"):
            del result[key]
        if self._options.with_probabilities:
            known = values.astype(object)
            known[np.isnan(values)] = None
            result["probabilities"] = known.tolist()
        return result

    def _open(self, limits: Limits) -> reader.Slide:
        if isinstance(self._source, File):
            return open_picture(self._source, limits)
        return reader.open_slide(self._source.path)

    def _spacing(self, slide: reader.Slide) -> reader.Spacing:
        """Returns the spacing: as given, as the file states it, or as that of the networks."""
        given, own = self._options.mpp, self._service.predictor.patch.mpp
        if own is None and (given or isinstance(self._source, SlideFile)):
            raise Refused(
                422,
                "micrometres a pixel of the network are not known, so it works on pictures at "
                "their own scale only: leave out mpp",
            )
        if given:
            return reader.Spacing(given, given, "given")
        if own is None:
            return reader.Spacing(1.0, 1.0, "assumed")
        if slide.spacing:
            return slide.spacing
        if isinstance(self._source, SlideFile):
            raise Refused(
                422, f"{self.name} does not state micrometres a pixel: give them in the field mpp"
            )
        return reader.Spacing(own, own, "assumed")

    def _check_scale(self, spacing: reader.Spacing, target: float) -> None:
        coarsest = max(spacing.x, spacing.y)
        if coarsest > resolution.MAX_UPSAMPLING * target:
            raise Refused(
                422,
                f"{self.name} has {coarsest:.4g} micrometres a pixel ({spacing.source}), too "
                f"coarse for the network's {target:g}: send a finer one, or correct mpp",
            )

    def _public(self, error: UserError) -> str:
        """Returns a message without a path of this machine."""
        text = one_line(error)
        if isinstance(self._source, SlideFile):
            for path in (self._source.path, self._source.path.parent):
                text = text.replace(str(path), self.name)
        return text


def parse_mpp(text: str) -> float | None:
    """Returns micrometres a pixel, None where the field is empty.

    Raises:
        Refused: it is not a number that can be the width of a slide's pixel.
    """
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not reader.is_plausible(value):
        low, high = reader.PLAUSIBLE
        raise Refused(422, f"mpp is {text[:20]!r}: give micrometres a pixel, {low:g} to {high:g}")
    return value


def parse_stride(text: str, cell: int) -> int | None:
    """Returns the distance of two cells, None where the field is empty.

    Raises:
        Refused: it is not a multiple of the cell, up to 16 times as wide.
    """
    if not text:
        return None
    stride = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
    if stride % cell or not cell <= stride <= 16 * cell:
        raise Refused(
            422,
            f"stride is {text[:20]!r}: give a multiple of the cell of {cell} pixels, up to "
            f"{16 * cell}",
        )
    return stride
