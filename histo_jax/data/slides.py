"""Slides of patches that do not name theirs."""

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

import pandas as pd

from histo_jax import files, preemption
from histo_jax.config import DataConfig
from histo_jax.data import pcam
from histo_jax.data.tables import read_csv
from histo_jax.errors import ExpectedError, one_line

log = logging.getLogger("histo_jax")

# Look-ups that could not be kept on disk, by the folder's fingerprint.
_in_memory: dict[str, pd.Series] = {}


def fill_in(table: pd.DataFrame, data: DataConfig, cache: Path) -> pd.DataFrame:
    """Returns the table with its `slide` column taken from `data.slide_map`.

    Args:
        table: columns `id` and `slide`.
        data: `slide_map` is a CSV with the header `id,wsi`, or a folder of PatchCamelyon's files
            with their `_meta.csv`, where the pixels' SHA-1 is the id; None changes nothing.
        cache: folder in which the look-up of a PatchCamelyon folder is kept.

    Raises:
        ExpectedError: the map cannot be read, or names the slides of a part only and
            `data.on_damaged` is 'stop'.
    """
    if data.slide_map is None:
        return table
    path = Path(data.slide_map).expanduser()
    known = _from_patchcamelyon(path, cache) if path.is_dir() else _from_csv(path)
    slides = table["id"].map(known).fillna("")
    missing = int((slides == "").sum())
    if missing == len(table):
        raise ExpectedError(f"{path} names the slide of no patch: is it the map of other data?")
    if missing:
        found = f"{path} names the slides of {len(table) - missing} of {len(table)} patches"
        if data.on_damaged == "stop":
            raise ExpectedError(
                f"{found}: complete it, or leave the other {missing} out of training and "
                "validation by --config.data.on_damaged=skip"
            )
        log.warning("%s; the other %d neither train nor validate", found, missing)
    return table.assign(slide=slides)


def _from_csv(path: Path) -> pd.Series:
    try:
        table = read_csv(path)
    except (ValueError, OSError) as error:
        raise ExpectedError(
            f"{path} is no readable CSV ({one_line(error)}); set --config.data.slide_map"
        ) from None
    if list(table.columns) != ["id", "wsi"]:
        raise ExpectedError(f"{path}: the header must be id,wsi")
    twice = table["id"][table["id"].duplicated()]
    if not twice.empty:
        raise ExpectedError(f"{path}: id {twice.iloc[0][:60]!r} stands there twice; remove one row")
    return table.set_index("id")["wsi"]


def _from_patchcamelyon(folder: Path, cache: Path) -> pd.Series:
    content, _ = files.fingerprints(pcam.raw_files(folder))
    if content in _in_memory:
        return _in_memory[content]
    for cached in cache.glob(f"slides-{content}-*.csv"):
        with contextlib.suppress(OSError):  # another user's that cannot be read
            if cached == _cache_file(cache, content, cached.read_bytes()):
                return _from_csv(cached)
    table = pd.DataFrame(_look_up(folder, cache).items(), columns=["id", "wsi"])
    text = table.to_csv(index=False)
    try:
        files.write_text(_cache_file(cache, content, text.encode()), text)
    except OSError as error:  # the records are another user's, or their disk is full
        log.info("the slides of %s are not kept for the next time (%s)", folder, one_line(error))
        _in_memory[content] = table.set_index("id")["wsi"]
    return table.set_index("id")["wsi"]


def _cache_file(cache: Path, content: str, text: bytes) -> Path:
    """Its name holds its SHA-256: one that was cut short is not taken for whole."""
    return cache / f"slides-{content}-{hashlib.sha256(text).hexdigest()[:16]}.csv"


def _look_up(folder: Path, cache: Path) -> dict[str, str]:
    """Returns the slide of each patch, by the SHA-1 of its pixels."""
    log.info("looking up slides by pixels in %s", folder)
    # Packed files are unpacked where the records lie, unless these are another user's.
    scratch = cache if os.access(cache, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    rows: dict[str, str] = {}
    for split in pcam.find(folder).values():
        if split.meta is None:
            raise ExpectedError(
                f"{folder}: the _meta.csv beside {split.x.name} is missing; it names the slides"
            )
        with files.naming(scratch), pcam.unpacked(split, scratch) as plain:
            rows |= {example.id: example.slide for example in preemption.stopping(pcam.read(plain))}
    return rows
