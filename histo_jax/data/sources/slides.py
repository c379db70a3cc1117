"""The source `slides`: patches cut from annotated slides, by PatchCamelyon's rule.

The slide is divided into cells of the labelled region, as for a map. A patch has a cell with tissue
in its centre; its label is 1 where the positive annotations cover at least one pixel of the cell.
`histo_jax.data.slide_tables` describes folders and tables of slides.
"""

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from histo_jax.config import DataConfig
from histo_jax.data import raw_files, slide_patches
from histo_jax.data.example import SPLITS, Example, SizedExamples
from histo_jax.data.slide_patches import Cells
from histo_jax.data.slide_tables import (
    TABLE,
    AnnotatedSlide,
    SlideAreas,
    is_annotation,
    list_slides,
    read_areas,
    relative,
)
from histo_jax.errors import DataError
from histo_jax.registry import register_source
from histo_jax.run import progress, signals
from histo_jax.run.files import expand
from histo_jax.slides import annotations, libraries, masks, reader, resolution, tissue
from histo_jax.slides.grid import Grid
from histo_jax.slides.overlap import overlaps
from histo_jax.slides.scaling import thumbnail

log = logging.getLogger("histo_jax")

_SIZE = 96
# As `heatmap` finds tissue by default.
_THUMBNAIL = 2048
_TISSUE = tissue.Options("auto", 4_000.0, 4_000.0)
# Bytes of a slide or a mask that the fingerprint covers, besides its size.
_HEAD = 2**20
# Less of the annotated area is tissue than this where coordinates are wrong, and more where right.
_FEW, _MOST = 0.5, 0.9


@register_source("slides")
class Slides:
    """Annotated slides.

    Args:
        data: `raw_dir` is their folder, `table` lists them; `positive`, `exclude`, `min_overlap`,
            `per_slide`, `image_size`, `label_region`, `mpp`, `split_seed` and `on_damaged`.
    """

    # As PatchCamelyon's.
    label_region, mpp = 32, 0.972

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._raw_dir = expand(data.raw_dir, "--config.data.raw_dir") if data.raw_dir else None
        self._table = expand(data.table, "--config.data.table") if data.table else None
        self._size = data.image_size or _SIZE
        self._region = data.label_region or self.label_region
        self._mpp = data.mpp or self.mpp
        self.origin = str(self._table and self._table.absolute())
        self.corrupt: dict[str, str] = {}
        if self._region > self._size:
            raise DataError(
                f"config.data.label_region = {self._region} is more than the {self._size} pixels "
                f"of a patch: set at most {self._size}"
            )

    @staticmethod
    def recognizes(raw_dir: Path) -> bool:
        """Whether a folder has a table or annotations."""
        is_mask = masks.slide_stem
        return (raw_dir / TABLE).exists() or any(
            is_annotation(path) or is_mask(path) for path in raw_dir.rglob("*")
        )

    def fingerprint(self) -> str | None:
        """Returns a SHA-256 of settings, table and annotations, and the beginning of pictures."""
        if not self._is_given:
            return None
        data = self._data
        settings = [self._size, self._region, self._mpp, data.positive, data.exclude]
        settings += [data.min_overlap, data.per_slide, data.split_seed]
        digest = hashlib.sha256(repr(settings).encode(errors="backslashreplace"))
        for slide in sorted(self._slides, key=lambda slide: slide.name):
            digest.update(repr([slide.name, *slide[3:]]).encode(errors="backslashreplace"))
            for path in filter(None, (slide.path, slide.annotation)):
                is_picture = path == slide.path or path.suffix.lower() in masks.SUFFIXES
                try:
                    with path.open("rb") as file:
                        content = file.read(_HEAD if is_picture else -1)
                        digest.update(f"{path.stat().st_size} ".encode() + content)
                except OSError as error:
                    raise raw_files.unreadable(path, error) from None
        return digest.hexdigest()

    def modified(self) -> str | None:
        """Returns a hash of the modification times."""
        if not self._is_given:
            return None
        paths = [path for slide in self._slides for path in slide[:2] if path]
        times = sorted((str(path), path.stat().st_mtime_ns) for path in paths)
        return hashlib.sha256(repr(times).encode(errors="backslashreplace")).hexdigest()

    def splits(self) -> dict[str, Iterable[Example]]:
        """Returns the patches of each split; finds all cells before the first is read."""
        if not self._is_given:
            raise DataError(
                "config.data.raw_dir is not set, and there are no prepared records: set "
                "--config.data.raw_dir to the folder of the slides, or --config.data.table"
            )
        libraries.check()
        drawn = self._read_annotations()
        with progress.bar("finding tissue", len(drawn), unit=" slides") as bar:
            counted = signals.stopping(progress.counted(bar, drawn))
            found = [cells for slide in counted if (cells := self._find_cells(slide))]
        self._check_labels(found)
        by_split = {split: [c for c in found if c.listed.split == split] for split in SPLITS}
        return {
            split: SizedExamples(self._read(cells), sum(len(each.labels) for each in cells))
            for split, cells in by_split.items()
            if cells
        }

    @functools.cached_property
    def _slides(self) -> list[AnnotatedSlide]:
        return list_slides(self._raw_dir, self._table)

    @property
    def _is_given(self) -> bool:
        return bool(self._raw_dir or self._table)

    @property
    def _place(self) -> str:
        return str(self._table or self._raw_dir)

    def _read_annotations(self) -> list[SlideAreas]:
        """Reads what was drawn on all slides."""
        drawn, found = [], set()
        data = self._data
        for listed in signals.stopping(self._slides):
            try:
                with reader.open_slide(listed.path) as slide:
                    size, offset = slide.size, slide.offset
            except DataError as error:
                self._skip(listed, error)
                continue
            areas = read_areas(listed, size, offset)
            found |= set(areas)
            regions = annotations.regions(areas, data.positive or "", data.exclude)
            drawn.append(SlideAreas(listed, *regions))
        if not data.positive:
            listed_classes = ", ".join(map(repr, sorted(found))) or "no class"
            raise DataError(
                f"{self._place}: the annotations have {listed_classes}; name the positive class by "
                "--config.data.positive=CLASS"
            )
        annotations.check_classes(found, data.positive, data.exclude, self._place)
        if others := annotations.negative_classes(found, data.positive, data.exclude):
            listed_classes = ", ".join(map(repr, others))
            log.info("%s: areas of %s count as negative", self._place, listed_classes)
        return drawn

    def _skip(self, listed: AnnotatedSlide, error: DataError) -> None:
        """Leaves a corrupt slide out where the settings allow it, else raises the error."""
        if self._data.on_damaged != "skip" or listed.split != "train":
            raise error
        self.corrupt[str(listed.path)] = str(error).removeprefix(f"{listed.path} ")

    def _find_cells(self, drawn: SlideAreas) -> Cells | None:
        """Returns the cells of a slide that become patches; None = there are none."""
        listed = drawn.listed
        try:
            with reader.open_slide(listed.path) as slide:
                spacing = _spacing(slide, listed)
                scale = resolution.choose_scale(slide, spacing, self._mpp)
                step = max(1.0, max(slide.size) / _THUMBNAIL)
                image = thumbnail(slide, step)
                mask = tissue.find(slide, image, step, spacing, _TISSUE, listed.name)
                grid = Grid(self._size, self._region, self._region, scale.full, slide.size)
        except DataError as error:
            self._skip(listed, error)
            return None
        is_tissue = grid.meeting(mask, step)
        cell = self._region * scale.full[0], self._region * scale.full[1]
        covered = overlaps(drawn.positive, grid.shape, cell)
        _check_on_tissue(drawn, covered, is_tissue, cell, spacing)
        # Sums of coordinates are not exact.
        pixel = (1 - 1e-6) / self._region**2
        excluded = overlaps(drawn.excluded, grid.shape, cell) >= pixel
        rows, columns = np.nonzero(is_tissue & ~excluded)
        labels = (covered[rows, columns] >= max(pixel, self._data.min_overlap)).astype(int)
        if not len(labels):
            reason = "all tissue is excluded" if is_tissue.any() else "no tissue was found"
            log.warning("%s: %s, and no patch is taken", listed.path, reason)
            return None
        chosen = self._sample(labels, listed.name)
        return Cells(listed, scale, grid, rows[chosen], columns[chosen], labels[chosen])

    def _sample(self, labels: np.ndarray, name: str) -> np.ndarray:
        """Returns at most `per_slide` patches of each class, by seed and name of the slide."""
        key = int.from_bytes(hashlib.sha256(name.encode(errors="backslashreplace")).digest()[:8])
        rng = np.random.default_rng([self._data.split_seed or 0, key])
        chosen = []
        for label in (0, 1):
            of_class = np.flatnonzero(labels == label)
            if self._data.per_slide is not None and len(of_class) > self._data.per_slide:
                of_class = rng.choice(of_class, self._data.per_slide, replace=False)
            chosen.append(of_class)
        return np.sort(np.concatenate(chosen))

    def _check_labels(self, found: list[Cells]) -> None:
        """Refuses training patches of one class; logs the counts."""
        labels = [cells.labels for cells in found if cells.listed.split == "train"]
        counts = np.bincount(np.concatenate([[], *labels]).astype(int), minlength=2)
        log.info(
            "%s: %d slides, %d training patches without and %d with %s",
            self._place, len(found), *counts, self._data.positive,
        )  # fmt: skip
        if not labels:
            raise DataError(
                f"{self._place} gives no training patch: add slides of the split train, or exclude "
                "less"
            )
        if not counts.all():
            raise DataError(
                f"{self._place}: of the training patches, {counts[0]} have label 0 and {counts[1]} "
                f"have label 1, where {self._data.positive} covers at least "
                f"{self._data.min_overlap or 'a pixel'} of the cell: both are needed; annotate "
                "more slides"
            )

    def _read(self, found: list[Cells]) -> Iterator[Example]:
        """Yields the patches of a split; leaves out repeated ones."""
        ids: set[str] = set()
        repeated = 0
        folder = self._raw_dir or Path(self._place).parent
        for cells in found:
            try:
                path = relative(cells.listed.path, folder)
                for example in slide_patches.read(cells, path):
                    repeated += example.id in ids
                    if example.id not in ids:
                        ids.add(example.id)
                        yield example
            except DataError as error:
                self._skip(cells.listed, error)
        if repeated:
            log.warning(
                "%d patches of the %s split have the same pixels as an earlier one and are left "
                "out", repeated, found[0].listed.split,
            )  # fmt: skip


def _spacing(slide: reader.Slide, listed: AnnotatedSlide) -> reader.Spacing:
    if listed.mpp is None and slide.spacing is None:
        raise DataError(
            f"{slide.path} does not state micrometres a pixel: list the slides in a table with the "
            "column mpp"
        )
    return resolution.slide_spacing(slide, listed.mpp)


def _check_on_tissue(
    drawn: SlideAreas,
    covered: np.ndarray,
    is_tissue: np.ndarray,
    cell: tuple[float, float],
    spacing: reader.Spacing,
) -> None:
    """Refuses annotations of glass, as where micrometres are taken for pixels."""
    total = covered.sum()
    on_tissue = covered[is_tissue].sum()
    if not total or on_tissue >= _FEW * total:
        return
    affinity = libraries.load("shapely.affinity")
    scaled = affinity.scale(drawn.positive, 1 / spacing.x, 1 / spacing.y, origin=(0, 0))
    as_micrometres = overlaps(scaled, covered.shape, cell)[is_tissue].sum()
    place = f"{drawn.listed.annotation}: {1 - on_tissue / total:.0%} of the positive area"
    if as_micrometres >= _MOST * scaled.area / (cell[0] * cell[1]):
        raise DataError(
            f"{place} is not on tissue, but taken as micrometres it is: give coordinates in pixels "
            "of level 0"
        )
    if not on_tissue:
        raise DataError(f"{place} is not on tissue: give the annotation of this slide")
    log.warning("%s is not on tissue, and no patches are taken there", place)
