"""Adds the slides of patches whose source does not name them."""

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

import pandas as pd

from histo_jax.config import DataConfig
from histo_jax.data.names import clean_column, identity
from histo_jax.data.record_files import pixel_hashes
from histo_jax.data.sources import pcam
from histo_jax.data.sources.kaggle import clean_id
from histo_jax.data.tables import read_csv
from histo_jax.errors import DataError, one_line
from histo_jax.run import files, signals

log = logging.getLogger("histo_jax")

# Slides that could not be cached on disk, by the fingerprint of PatchCamelyon's folder.
_memory_cache: dict[str, pd.Series] = {}


def fill_in(table: pd.DataFrame, data: DataConfig, cache: Path) -> pd.DataFrame:
    """Returns the table with its `slide` column filled from `data.slide_map`.

    Args:
        table: of a split, see `record_files`.
        data: `slide_map` is a CSV with the columns `id` and `wsi`, or a folder of PatchCamelyon's
            files with their `_meta.csv`, in which patches are found by the SHA-1 of their pixels;
            None changes nothing.
        cache: folder for the slides that were read from PatchCamelyon's files.

    Raises:
        DataError: the map cannot be read, or names the slides of some patches only and
            `data.on_damaged` is 'stop'.
    """
    if data.slide_map is None:
        return table
    path = files.expand(data.slide_map, "--config.data.slide_map")
    if path.is_dir():
        known, keys = _from_patchcamelyon(path, cache), pixel_hashes(table)
    else:
        known, keys = _from_csv(path), table["id"].map(clean_id)
    slides = clean_column(keys.map(known).fillna(""))
    missing = int((slides == "").sum())
    if missing == len(table):
        if keys.isin(known.index).any():
            raise DataError(f"{path} names no slide in its column wsi; complete it")
        raise DataError(
            f"{path} names the slide of no patch: does it belong to other data? Its first id is "
            f"{known.index[0][:60]!r}, that of the data is {keys.iloc[0][:60]!r}"
        )
    if missing:
        summary = f"{path} names the slides of {len(table) - missing} of {len(table)} patches"
        if data.on_damaged == "stop":
            raise DataError(
                f"{summary}: complete it, or leave the other {missing} out of training and "
                "validation by --config.data.on_damaged=skip"
            )
        log.warning("%s; the other %d are left out of training and validation", summary, missing)
    return table.assign(slide=slides)


def _from_csv(path: Path) -> pd.Series:
    """Returns the slide of each id."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; set --config.data.slide_map")
    table = read_csv(path, ("id", "wsi"))
    table["id"] = table["id"].map(clean_id)
    slides = table["wsi"].map({name: identity(name) for name in table["wsi"].unique()})
    table = table[~table.assign(wsi=slides).duplicated()]
    duplicates = table["id"][table["id"].duplicated()]
    if table.empty:
        raise DataError(f"{path} lists no patches; complete it")
    if not duplicates.empty:
        raise DataError(
            f"{path}, line {duplicates.index[0]}: {len(duplicates)} duplicate ids have different "
            f"slides, the first is {duplicates.iloc[0][:60]!r}; correct these rows"
        )
    return table.set_index("id")["wsi"]


def _from_patchcamelyon(folder: Path, cache: Path) -> pd.Series:
    content, _ = pcam.fingerprint(folder)
    if content in _memory_cache:
        return _memory_cache[content]
    for cached in cache.glob(f"slides-{content}-*.csv"):
        with contextlib.suppress(OSError):  # another user's, not readable
            if cached == _cache_file(cache, content, cached.read_bytes()):
                return _from_csv(cached)
    table = pd.DataFrame(_read_slides(folder, cache).items(), columns=["id", "wsi"])
    text = table.to_csv(index=False)
    try:
        files.write_text(_cache_file(cache, content, text.encode()), text)
    except OSError as error:  # the records are another user's, or their disk is full
        log.info("the slides of %s cannot be cached (%s)", folder, one_line(error))
        _memory_cache[content] = table.set_index("id")["wsi"]
    return table.set_index("id")["wsi"]


def _cache_file(cache: Path, content: str, text: bytes) -> Path:
    """Returns a name with the SHA-256 of the content, so that a truncated file is not used."""
    return cache / f"slides-{content}-{hashlib.sha256(text).hexdigest()[:16]}.csv"


def _read_slides(folder: Path, cache: Path) -> dict[str, str]:
    """Returns the slide of each patch, by the SHA-1 of its pixels."""
    log.info("reading the slides of patches from %s", folder)
    # Packed files are unpacked beside the records, unless these are another user's.
    scratch = cache if os.access(cache, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    rows: dict[str, str] = {}
    for split in pcam.find(folder).values():
        if split.meta is None:
            raise DataError(
                f"{folder}: the _meta.csv of {split.x.name} is missing; add it, it names the slides"
            )
        with files.naming(scratch), pcam.unpacked(split, scratch) as plain:
            rows |= {example.id: example.slide for example in signals.stopping(pcam.read(plain))}
    return rows
