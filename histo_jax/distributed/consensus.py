"""Consensus of several processes: shared values and decisions, and checks that inputs are equal.

With one process nothing is communicated.
"""

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from jax.experimental import multihost_utils

from histo_jax.config import Config
from histo_jax.errors import UserError
from histo_jax.run.saved_config import LOCATIONS, plain

# A network file system may show the files of another machine only after its cache has expired.
_VISIBLE_SECONDS = 60


def _gather(values: np.ndarray) -> np.ndarray:
    """Returns the values of all processes, stacked along a new first axis."""
    if jax.process_count() == 1:
        return values[None]
    # As bytes: JAX would convert float64 to float32.
    gathered = multihost_utils.process_allgather(np.frombuffer(values.tobytes(), np.uint8))
    return np.frombuffer(gathered.tobytes(), values.dtype).reshape(-1, *values.shape)


def broadcast_from_primary(values: np.ndarray) -> np.ndarray:
    """Returns the values of process 0 in every process: the last bits may differ between them."""
    return _gather(values)[0]


def global_minimum(size: int | None) -> int | None:
    """Returns the minimum over all processes; None if the size is unknown (None) in one of them."""
    minimum = int(_gather(np.array([-1 if size is None else size], np.int64)).min())
    return None if minimum < 0 else minimum


def check_options(config: Config, mode: str) -> None:
    """Refuses processes whose settings or mode differ from those of process 0.

    Args:
        config: of this process; folders and placement may differ.
        mode: of its command.

    Raises:
        UserError: in all processes; names the first that differs.
    """
    if jax.process_count() == 1:
        return
    values = plain(config)
    settings = {name: value for name, value in values.items() if name not in LOCATIONS}
    _refuse_different(
        "options",
        json.dumps([mode, settings]).encode(),
        "start all processes with the same command",
    )


def check_records(config: Config, tables: dict[str, pd.DataFrame]) -> None:
    """Refuses processes whose records differ from those of process 0.

    Args:
        config: of this process; its folder of records is named in the error.
        tables: its records, by split.

    Raises:
        UserError: in all processes; names the first that differs.
    """
    if jax.process_count() == 1:
        return
    records = hashlib.sha256()
    for split, table in sorted(tables.items()):
        columns = [name for name in ("id", "label", "slide", "patient") if name in table]
        rows = pd.util.hash_pandas_object(table[columns], index=False)
        records.update(split.encode() + rows.to_numpy().tobytes())
    _refuse_different(
        f"records in {config.data.tfds_dir}",
        records.digest(),
        "copy the records of one machine to all others",
    )


def _refuse_different(what: str, value: bytes, fix: str) -> None:
    digests = _gather(np.frombuffer(hashlib.sha256(value).digest(), np.uint8))
    different = np.flatnonzero((digests != digests[0]).any(1))
    if len(different):
        raise UserError(f"process {different[0]} and process 0 have different {what}: {fix}")


def check_shared_folder(folder: Path) -> None:
    """Refuses a workdir that is not the same folder in all processes.

    Raises:
        UserError: in all processes; names the first that uses another folder.
    """
    if jax.process_count() == 1:
        return
    token = broadcast_from_primary(np.frombuffer(uuid.uuid4().bytes, np.uint8)).tobytes().hex()
    marker = folder / f".{token}.part"
    if jax.process_index() == 0:
        marker.touch()
    is_visible = _gather(np.array([_becomes_visible(marker)]))
    if jax.process_index() == 0:
        marker.unlink()
    if not is_visible.all():
        raise UserError(
            f"--workdir={folder} of process {np.flatnonzero(~is_visible[:, 0])[0]} is not the "
            "folder of process 0: use a folder that all processes share"
        )


def _becomes_visible(path: Path) -> bool:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    # Listed, because a lookup by name may be answered from a cache.
    while path.name not in os.listdir(path.parent):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
