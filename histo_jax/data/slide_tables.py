"""Which slides there are, and the annotation of each: from a folder or a table.

Folder: the annotation of `NAME.svs` is beside it, as `NAME.geojson` or `NAME.svs.geojson`, as
`NAME.xml`, or as a mask image `NAME_mask.png` or `NAME_mask.tif`. Case does not matter.

Table: a `.csv`, `.tsv` or `.parquet` file with the columns `slide` and `annotation`, and where
known `patient`, `split` and `mpp`. Names of columns may be written as in
`histo_jax.data.image_tables`. A slide whose annotation is empty is normal.
"""

import collections
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from histo_jax.data import image_tables
from histo_jax.data.names import identity
from histo_jax.errors import DataError
from histo_jax.slides import annotations, masks, reader, search

log = logging.getLogger("histo_jax")

TABLE = "slides.csv"
_ALIASES = {
    "path": (*image_tables.ALIASES["slide"], *image_tables.ALIASES["path"]),
    "annotation": ("annotation", "annotations", "annotation_path", "geojson", "xml", "mask"),
    "slide": (),
    "patient": image_tables.ALIASES["patient"],
    "split": image_tables.ALIASES["split"],
    "mpp": ("mpp",),
}
_NEEDED = ("path", "annotation")
_ANNOTATION_SUFFIXES = (".geojson", ".xml")
# Bytes in which the root of an XML file of ASAP stands.
_HEAD = 4096


class AnnotatedSlide(NamedTuple):
    """A slide of which everything is known that was drawn on it.

    Attributes:
        path: of the slide.
        annotation: file; None = the slide is normal.
        name: of the slide, unique among those that are listed together.
        patient: name; '' = not known.
        split: 'train', 'validation' or 'test'.
        mpp: micrometres a pixel of level 0, as given; None = as the file states.
    """

    path: Path
    annotation: Path | None
    name: str
    patient: str = ""
    split: str = "train"
    mpp: float | None = None


class SlideAreas(NamedTuple):
    """A slide and its annotated areas, in pixels of level 0.

    Attributes:
        listed: where the slide is.
        positive: area of the positive classes.
        excluded: area that takes no part.
    """

    listed: AnnotatedSlide
    positive: Any
    excluded: Any


def read_areas(
    listed: AnnotatedSlide, size: tuple[int, int], offset: tuple[int, int]
) -> dict[str, annotations.Area]:
    """Returns the annotated area of each class of a slide; none where it is normal.

    Args:
        listed: the slide.
        size: see `annotations.read_annotations`.
        offset: likewise.

    Raises:
        DataError: the annotation cannot be read, or has no polygons.
    """
    if listed.annotation is None:
        return {}
    areas = annotations.read_annotations(listed.annotation, size, offset)
    if not areas:
        raise DataError(
            f"{listed.annotation} has no polygons: annotate {listed.path.name}, or list it in a "
            "table with an empty annotation if it is normal"
        )
    return areas


def list_slides(folder: Path | None, table: Path | None = None) -> list[AnnotatedSlide]:
    """Returns the slides of a table or a folder; opens none.

    Args:
        folder: of the slides, which is searched; may itself be a table. None = that of the table.
        table: None = `slides.csv` in the folder, or else all slides in it that are annotated.

    Raises:
        DataError: there is none, a file is missing, an annotation belongs to no slide, or a row of
            the table is wrong.
        UserError: the extra `slides` is not installed.
    """
    if folder is not None and table is None and not folder.is_dir():
        if not folder.exists():
            raise DataError(f"{folder}: no such file or folder; give the folder of the slides")
        folder, table = None, folder
    if table is not None and not table.exists():
        raise image_tables.missing_table(table, folder)
    if folder is None:
        assert table is not None
        folder = table.parent
    if table is None and (folder / TABLE).is_file():
        table = folder / TABLE
    slides = _list_folder(folder) if table is None else _read_table(table, folder)
    return _name(slides, folder)


def is_annotation(path: Path) -> bool:
    """Whether a file is the annotation of a slide by its name, and for XML by its beginning."""
    suffix = path.suffix.lower()
    if suffix not in _ANNOTATION_SUFFIXES or path.name.startswith(".") or not path.is_file():
        return False
    if suffix != ".xml":
        return True
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return True  # reading it gives the reason, as of an empty file
    return not head or b"ASAP_Annotations" in head.replace(b"\0", b"")  # of UTF-16


def _list_folder(folder: Path) -> list[AnnotatedSlide]:
    """Returns the annotated slides below a folder."""
    slides = search.search(folder)
    if not slides:
        raise DataError(f"{folder} has no slides: give the folder of the slides")
    annotated = _find_annotations(folder)
    beside = {path: _annotations(path, annotated) for path in slides}
    slides = [path for path in slides if beside[path] or masks.slide_stem(path) is None]
    _check_pairs(beside, [path for several in annotated.values() for path in several])
    bare = [path for path in slides if not beside[path]]
    if len(bare) == len(slides):
        raise DataError(
            f"{folder}: none of {len(slides)} slides has an annotation beside it, such as "
            f"{slides[0].stem}.geojson: export them from QuPath, or list them in {TABLE}"
        )
    if bare:
        log.warning(
            "%d of %d slides have no annotation and are left out, the first is %s: annotate them, "
            "or list all slides in %s, where an empty annotation means normal",
            len(bare), len(slides), bare[0], TABLE,
        )  # fmt: skip
    return [AnnotatedSlide(path, beside[path][0], "") for path in slides if beside[path]]


def _find_annotations(folder: Path) -> dict[tuple[Path, str], list[Path]]:
    """Returns the annotations below a folder, by their folder and `file_key` of the slide."""
    found: dict[tuple[Path, str], list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        stem = masks.slide_stem(path)
        if stem is None and is_annotation(path):
            stem = path.stem
        if stem and not path.name.startswith(".") and path.is_file():
            found.setdefault((path.parent, search.file_key(stem)), []).append(path)
    return found


def _annotations(slide: Path, found: Mapping[tuple[Path, str], list[Path]]) -> list[Path]:
    """Returns the annotations beside a slide; of several spellings those in its own."""
    several = []
    for name in (slide.stem, slide.name):
        several += found.get((slide.parent, search.file_key(name)), [])
    return [path for path in several if path.name.startswith(slide.stem)] or several


def _check_pairs(beside: Mapping[Path, list[Path]], found: list[Path]) -> None:
    """Refuses slides with several annotations, and annotations of several slides or of none."""
    owner: dict[Path, Path] = {}
    for slide, several in beside.items():
        if len(several) > 1:
            listed = " and ".join(path.name for path in several)
            raise DataError(f"{slide} has several annotations, {listed}: keep one of them")
        for path in several:
            first = owner.setdefault(path, slide)
            if first != slide:
                raise DataError(
                    f"{path} is the annotation of two slides by its name, {first.name} and "
                    f"{slide.name}: move one of them, or list the slides in {TABLE}"
                )
    for path in found:
        if path not in owner and not beside.get(path):
            stem = masks.slide_stem(path) or path.stem
            raise DataError(
                f"{path} is an annotation without a slide: add {stem} with its suffix beside it, "
                "or remove the file"
            )


def _read_table(table: Path, folder: Path) -> list[AnnotatedSlide]:
    """Returns the slides of a table."""
    listed = image_tables.read_table(table, folder, aliases=_ALIASES, what="slides", needed=_NEEDED)
    rows = listed.rows
    rows["annotation"] = rows["annotation"].map(
        lambda text: text and image_tables.clean_path(text, str(folder))
    )
    for column in ("path", "annotation"):
        files = rows[column].map(lambda text: folder / text)
        missing = (rows[column] != "") & ~files.map(Path.is_file)
        fix = "restore the file, or correct the table"
        if column == "annotation":
            fix += "; leave the cell empty where the slide is normal"
        listed.check(missing, f"{column} {{}} is missing", fix, rows[column])
    scales = rows["mpp"].map(_number)
    low, high = reader.PLAUSIBLE
    listed.check(
        scales.isna() & (rows["mpp"] != ""),
        "mpp {} cannot be the scale of a slide",
        f"give micrometres a pixel, {low:g} to {high:g}",
        rows["mpp"],
    )
    columns = [rows[name].tolist() for name in ("path", "annotation", "patient", "split")]
    return [
        AnnotatedSlide(
            path=folder / path,
            annotation=folder / annotation if annotation else None,
            name="",
            patient=patient,
            split=split or "train",
            mpp=None if math.isnan(scale) else scale,
        )
        for path, annotation, patient, split, scale in zip(*columns, scales.tolist(), strict=True)
    ]


def _number(text: str) -> float:
    """Returns a scale, NaN where it is none."""
    value = float(pd.to_numeric(text.replace(",", "."), errors="coerce"))
    return value if reader.is_plausible(value) else math.nan


def _name(slides: list[AnnotatedSlide], folder: Path) -> list[AnnotatedSlide]:
    """Returns the slides with names: the file's without suffix, or the path where it is shared."""
    counts = collections.Counter(identity(slide.path.stem) for slide in slides)
    counts[""] = 2  # 'NA' and the like, which mean that a slide is not known
    return [
        slide._replace(
            name=slide.path.stem
            if counts[identity(slide.path.stem)] == 1
            else relative(slide.path, folder)
        )
        for slide in slides
    ]


def relative(path: Path, folder: Path) -> str:
    """Returns a path with '/', relative if it is below the folder."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
