"""What several processes must have in common, and decisions that are taken once for all of them.

With one process there is nothing to agree on, and nothing is sent.
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

# A network file system may show what another machine has written only after its cache has aged.
_SEEN_WITHIN_SECONDS = 60


def _gather(values: np.ndarray) -> np.ndarray:
    """Returns the values of all processes, one after the other along a new first axis."""
    if jax.process_count() == 1:
        return values[None]
    # As bytes: JAX would make float32 of float64.
    gathered = multihost_utils.process_allgather(np.frombuffer(values.tobytes(), np.uint8))
    return np.frombuffer(gathered.tobytes(), values.dtype).reshape(-1, *values.shape)


def broadcast_from_primary(values: np.ndarray) -> np.ndarray:
    """Returns, in every process, what the first one gives: theirs may differ in the last bit."""
    return _gather(values)[0]


def global_minimum(size: int | None) -> int | None:
    """Returns the smallest number that any process gives; None where one of them knows none."""
    smallest = int(_gather(np.array([-1 if size is None else size], np.int64)).min())
    return None if smallest < 0 else smallest


def check_options(config: Config, mode: str) -> None:
    """Refuses processes that are to do something else than the first, before any of them begins.

    Args:
        config: of this process; folders and placement may differ.
        mode: of its command.

    Raises:
        UserError: in all processes alike; names one that differs.
    """
    if jax.process_count() == 1:
        return
    values = plain(config)
    settings = {name: value for name, value in values.items() if name not in LOCATIONS}
    _refuse_others(
        "options than", json.dumps([mode, settings]).encode(), "start all with the same command"
    )


def check_records(config: Config, tables: dict[str, pd.DataFrame]) -> None:
    """Refuses processes that hold other records than the first.

    Args:
        config: of this process, which says where they lie.
        tables: its records, by split.

    Raises:
        UserError: in all processes alike; names one that differs.
    """
    if jax.process_count() == 1:
        return
    records = hashlib.sha256()
    for split, table in sorted(tables.items()):
        rows = pd.util.hash_pandas_object(table[["id", "label", "slide"]], index=False)
        records.update(split.encode() + rows.to_numpy().tobytes())
    _refuse_others(
        f"records in its {config.data.tfds_dir} than", records.digest(),
        "copy those of one machine to all",
    )  # fmt: skip


def _refuse_others(what: str, value: bytes, remedy: str) -> None:
    digests = _gather(np.frombuffer(hashlib.sha256(value).digest(), np.uint8))
    others = np.flatnonzero((digests != digests[0]).any(1))
    if len(others):
        raise UserError(f"process {others[0]} has other {what} process 0: {remedy}")


def check_shared_folder(folder: Path) -> None:
    """Refuses a workdir that is not one and the same folder for all processes.

    Raises:
        UserError: in all processes alike; names one that does not see it.
    """
    if jax.process_count() == 1:
        return
    token = broadcast_from_primary(np.frombuffer(uuid.uuid4().bytes, np.uint8)).tobytes().hex()
    mark = folder / f".{token}.part"
    if jax.process_index() == 0:
        mark.touch()
    seen = _gather(np.array([_appears(mark)]))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise UserError(
            f"process {np.flatnonzero(~seen[:, 0])[0]} does not see the --workdir={folder} of "
            "process 0: give a folder that all processes share"
        )


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SEEN_WITHIN_SECONDS
    # Listed, for asking by name may be answered by a cache.
    while path.name not in os.listdir(path.parent):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
