"""Slides of patches that do not name theirs."""

import contextlib
import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path

import pandas as pd

from histo_jax.config import DataConfig
from histo_jax.data.names import clean, clean_column, identity
from histo_jax.data.sources import pcam
from histo_jax.data.sources.kaggle import clean_id
from histo_jax.data.tables import read_csv
from histo_jax.errors import UserError, one_line
from histo_jax.run import files, signals

log = logging.getLogger("histo_jax")

# Look-ups that could not be kept on disk, by the folder's fingerprint.
_in_memory: dict[str, pd.Series] = {}


def fill_in(table: pd.DataFrame, data: DataConfig, cache: Path) -> pd.DataFrame:
    """Returns the table with its `slide` column taken from `data.slide_map`.

    Args:
        table: columns `id` and `slide`.
        data: `slide_map` is a CSV with the columns `id` and `wsi`, or a folder of PatchCamelyon's
            files with their `_meta.csv`, where the pixels' SHA-1 is the id; None changes nothing.
        cache: folder in which the look-up of a PatchCamelyon folder is kept.

    Raises:
        UserError: the map cannot be read, or names the slides of a part only and
            `data.on_damaged` is 'stop'.
    """
    if data.slide_map is None:
        return table
    path = files.expand(data.slide_map, "--config.data.slide_map")
    known = _from_patchcamelyon(path, cache) if path.is_dir() else _from_csv(path)
    slides = clean_column(table["id"].map(known).fillna(""))
    missing = int((slides == "").sum())
    if missing == len(table):
        if table["id"].isin(known.index).any():
            raise UserError(f"{path} names no slide in its column wsi; complete it")
        raise UserError(
            f"{path} names the slide of no patch: is it the map of other data? Its first id is "
            f"{known.index[0][:60]!r}, the data's {table['id'].iloc[0]}"
        )
    if missing:
        found = f"{path} names the slides of {len(table) - missing} of {len(table)} patches"
        if data.on_damaged == "stop":
            raise UserError(
                f"{found}: complete it, or leave the other {missing} out of training and "
                "validation by --config.data.on_damaged=skip"
            )
        log.warning("%s; the other %d neither train nor validate", found, missing)
    return table.assign(slide=slides)


def unify(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Returns the tables with each slide under one name in all of them, the first spelling met.

    Args:
        tables: each with a column `slide`; '' and the words of `names.UNKNOWN` = not known.
    """
    first: dict[str, str] = {}
    spellings: dict[str, set[str]] = {}
    for table in tables.values():
        for name in table["slide"].unique():
            key = identity(name)
            first.setdefault(key, clean(name))
            spellings.setdefault(key, set()).add(name)
    several = [key for key, found in spellings.items() if key and len(found) > 1]
    if several:
        examples = ", ".join(map(repr, sorted(spellings[several[0]])[:3]))
        _say_once(
            f"slides spelled in more than one way: {len(several)}, the first as {examples}; each "
            "counts as one slide"
        )
    renamed = {name: first[key] for key, found in spellings.items() for name in found}
    return {
        split: table.assign(slide=table["slide"].map(renamed)) for split, table in tables.items()
    }


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def _from_csv(path: Path) -> pd.Series:
    """Returns the slide of each id."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; set --config.data.slide_map")
    table = read_csv(path, ("id", "wsi"))
    table["id"] = table["id"].map(clean_id)
    slides = table["wsi"].map({name: identity(name) for name in table["wsi"].unique()})
    table = table[~table.assign(wsi=slides).duplicated()]
    twice = table["id"][table["id"].duplicated()]
    if table.empty:
        raise UserError(f"{path} names no patches; complete it")
    if not twice.empty:
        raise UserError(
            f"{path}, line {twice.index[0]}: {len(twice)} ids stand there twice with other "
            f"slides, the first is {twice.iloc[0][:60]!r}; mend these rows"
        )
    return table.set_index("id")["wsi"]


def _from_patchcamelyon(folder: Path, cache: Path) -> pd.Series:
    content, _ = pcam.fingerprint(folder)
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
            raise UserError(
                f"{folder}: the _meta.csv beside {split.x.name} is missing; it names the slides"
            )
        with files.naming(scratch), pcam.unpacked(split, scratch) as plain:
            rows |= {example.id: example.slide for example in signals.stopping(pcam.read(plain))}
    return rows
