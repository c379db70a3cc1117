"""Which files are slides, and the names of their results."""

import csv
import logging
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from histo_jax.errors import ConfigError, DataError
from histo_jax.run import files
from histo_jax.slides import masks, reader

log = logging.getLogger("histo_jax")

# A file of a folder with one of these is a slide, and a failure where it cannot be opened.
_SLIDE_SUFFIXES = (
    ".svs", ".svslide", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm",
)  # fmt: skip
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
_SHOWN = 5
# Characters of a name; a file system has 255 bytes, and temporary names need about 50.
_LONGEST_NAME = 150
# Of the folder of all results.
_RESERVED = ("index.html",)


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
    if mpp is not None:
        _check_scale(mpp, f"config.heatmap.mpp = {mpp:g}")
    for text in paths:
        path = files.expand(text, "--config.heatmap.slides")
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
        unique.setdefault(_real(slide.path), slide)
    return list(unique.values())


def _real(path: Path) -> Path:
    """Returns the path without links; unlike `Path.resolve`, also that of a link to itself."""
    return Path(os.path.realpath(path))


def _check_scale(mpp: float, field: str) -> None:
    if not reader.is_plausible(mpp):
        low, high = reader.PLAUSIBLE
        raise ConfigError(
            f"{field} cannot be the scale of a slide: give micrometres a pixel, {low:g} to {high:g}"
        )


def file_key(name: str) -> str:
    """Returns a file's name as systems compare it that ignore case and the form of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def search(folder: Path) -> list[Path]:
    """Returns the slides below a folder, sorted, without the masks of others.

    Logs what is passed over, but for files with the name of a slide, such as annotations.
    """
    slides: list[Path] = []
    other: list[Path] = []
    links: list[Path] = []
    series: set[tuple[Path, str]] = set()
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            links += [path] * path.is_symlink()
        elif not _is_slide(path):
            other.append(path)
        elif path.suffix.lower() != ".dcm" or _is_first(path, series):
            slides.append(path)
    named = {(path.parent, file_key(name)) for path in slides for name in (path.stem, path.name)}
    other = [path for path in other if (path.parent, file_key(path.stem)) not in named]
    _log_skipped(folder, "files that are not slides", other)
    _log_skipped(folder, "links to folders, which are not followed", links)
    return [
        path
        for path in slides
        if (path.parent, file_key(masks.slide_stem(path) or "")) not in named
    ]


def _log_skipped(folder: Path, what: str, paths: list[Path]) -> None:
    if paths:
        shown = ", ".join(str(path.relative_to(folder)) for path in paths[:_SHOWN])
        more = ", ..." if len(paths) > _SHOWN else ""
        log.info("%s: passed over %d %s (%s%s)", folder, len(paths), what, shown, more)


def _is_slide(path: Path) -> bool:
    suffix = path.suffix.lower()
    if path.exists() and not path.is_file():
        return False  # a pipe or a device, whose reader may wait for ever
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
            SlideFile(
                path.parent / files.expand(row["slide"], f"{path}, line {number}: slide"),
                _number(path, number, row),
            )
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
    _check_scale(value, f"{path}, line {line}: mpp = {text}")
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
    owner: dict[str, Path | None] = dict.fromkeys(_RESERVED)
    owner |= {name.lower(): path for name, path in taken.items()}
    names = {path: name for name, path in taken.items()}
    for slide in slides:
        path = _real(slide.path)
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", slide.path.stem).lstrip(".") or "slide"
        stem = stem[:_LONGEST_NAME]
        name, number = names.get(path, stem), 1
        while owner.get(name.lower(), path) != path:
            number += 1
            name = f"{stem}-{number}"
        owner[name.lower()] = path
        result.append((name, slide))
    return result
