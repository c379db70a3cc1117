"""Slides of patches that do not name theirs."""

import logging
from pathlib import Path

import pandas as pd

from histo_jax import files, preemption
from histo_jax.config import DataConfig
from histo_jax.data import pcam
from histo_jax.data.tables import read_csv
from histo_jax.errors import ExpectedError, one_line

log = logging.getLogger("histo_jax")


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
    path = files.expand(data.slide_map, "--config.data.slide_map")
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
    cached = cache / f"slides-{content}.csv"
    if not cached.exists():
        log.info("looking up slides by pixels in %s", folder)
        rows: dict[str, str] = {}
        for split in pcam.find(folder).values():
            if split.meta is None:
                raise ExpectedError(
                    f"{folder}: the _meta.csv beside {split.x.name} is missing; it names the slides"
                )
            with pcam.unpacked(split, cache) as plain:
                rows |= {
                    example.id: example.slide for example in preemption.stopping(pcam.read(plain))
                }
        table = pd.DataFrame({"id": list(rows), "wsi": list(rows.values())})
        files.write_text(cached, table.to_csv(index=False))
    return _from_csv(cached)
