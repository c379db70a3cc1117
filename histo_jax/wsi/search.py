"""Which files are slides, and the names of their results."""

import csv
import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from histo_jax.errors import ConfigError, DataError
from histo_jax.run import files
from histo_jax.wsi import reader

log = logging.getLogger("histo_jax")

# A file of a folder with one of these is a slide, and a failure where it cannot be opened.
_SLIDE_SUFFIXES = (
    ".svs", ".svslide", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm",
)  # fmt: skip
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
_SHOWN = 5


class SlideFile(NamedTuple):
    """A slide to be read.

    Attributes:
        path: of the file.
        mpp: micrometres a pixel, as given for it; None = not given.
    """

    path: Path
    mpp: float | None = None


def find(paths: Sequence[str], mpp: float | None) -> list[SlideFile]:
    """Returns the slides that a user names, each once, in order.

    Args:
        paths: of slides, of folders that are searched, and of tables `slide[,mpp]`.
        mpp: for all that a table gives none for.

    Raises:
        ConfigError: there is none, a path does not exist, or a table is wrong.
    """
    slides: list[SlideFile] = []
    for text in paths:
        path = files.expand(text, "config.heatmap.slides")
        if path.is_dir():
            slides += [SlideFile(file, mpp) for file in search(path)]
        elif not path.is_file():
            raise ConfigError(
                f"config.heatmap.slides: {path} does not exist: give a slide, a folder, or a CSV "
                "with the columns slide,mpp"
            )
        elif path.suffix.lower() == ".csv":
            slides += [slide._replace(mpp=slide.mpp or mpp) for slide in _read_table(path)]
        else:
            slides.append(SlideFile(path, mpp))
    if not slides:
        raise ConfigError(
            f"config.heatmap.slides: no slides in {', '.join(map(str, paths)) or 'an empty list'}: "
            "give slides, folders of slides, or a CSV with the columns slide,mpp"
        )
    unique: dict[Path, SlideFile] = {}
    for slide in slides:
        unique.setdefault(slide.path.resolve(), slide)
    return list(unique.values())


def search(folder: Path) -> list[Path]:
    """Returns the slides below a folder, sorted; logs what is passed over."""
    slides: list[Path] = []
    other: list[Path] = []
    series: set[tuple[Path, str]] = set()
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.startswith("."):
            continue
        if not _is_slide(path):
            other.append(path)
        elif path.suffix.lower() != ".dcm" or _is_first(path, series):
            slides.append(path)
    if other:
        shown = ", ".join(str(path.relative_to(folder)) for path in other[:_SHOWN])
        more = ", ..." if len(other) > _SHOWN else ""
        log.info("%s: passed over %d files that are not slides (%s%s)", folder, len(other), shown,
                 more)  # fmt: skip
    return slides


def _is_slide(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in _SLIDE_SUFFIXES:
        return True
    if suffix not in _PICTURE_SUFFIXES:
        # MIRAX keeps its pixels in files .dat, which no reader takes for a slide.
        return reader.detect(path) is not None
    if any(path.parent.glob("*.vm[su]")):
        return False  # a part of that slide
    try:
        with Image.open(path):
            return True
    except Exception:  # Pillow's plug-ins raise anything on other content
        return False


def _is_first(path: Path, series: set[tuple[Path, str]]) -> bool:
    """Returns whether no file of the same DICOM series came before: each level is a file."""
    try:
        with reader.open_slide(path) as slide:
            key = path.parent, slide.series or str(path)
    except DataError:
        key = path.parent, str(path)  # fails again, and is then named
    is_first = key not in series
    series.add(key)
    return is_first


def _read_table(path: Path) -> list[SlideFile]:
    """Reads a CSV `slide[,mpp]`; relative paths start at its folder."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"{path} is not a CSV file: give one with slide,mpp") from None
    if not rows or "slide" not in rows[0]:
        raise ConfigError(f"{path} has no column slide, or no rows: its header is slide,mpp")
    slides = []
    for number, row in enumerate(rows, start=2):
        if not row["slide"]:
            raise ConfigError(f"{path}, line {number}: the slide is missing")
        slides.append(
            SlideFile(path.parent / Path(row["slide"]).expanduser(), _number(path, number, row))
        )
    return slides


def _number(path: Path, line: int, row: dict[str, str]) -> float | None:
    text = (row.get("mpp") or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{path}, line {line}: mpp = {text} must be a number above 0")
    return value


def assign_names(
    slides: Iterable[SlideFile], taken: dict[str, Path]
) -> list[tuple[str, SlideFile]]:
    """Returns each slide with the name of its results, unique among them and `taken`.

    Args:
        slides: to be named.
        taken: the slide of each name that has results.
    """
    result = []
    owner = {name.lower(): path for name, path in taken.items()}
    for slide in slides:
        path = slide.path.resolve()
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", slide.path.stem).lstrip(".") or "slide"
        name, number = stem, 1
        while owner.get(name.lower(), path) != path:
            number += 1
            name = f"{stem}-{number}"
        owner[name.lower()] = path
        result.append((name, slide))
    return result
