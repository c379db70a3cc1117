"""What `evaluate` has said of each patch: `predictions_<split>.csv`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histo_jax import workdir as workdirs
from histo_jax.data import splits
from histo_jax.data.builder import Prepared
from histo_jax.errors import ExpectedError
from histo_jax.metrics import binary_scores


def slides(table: pd.DataFrame) -> np.ndarray | None:
    """Returns the slide of each patch; None where some are not known.

    Patches of one could then be taken for patches of several.
    """
    return table["slide"].to_numpy() if (table["slide"] != "").all() else None


def write(folder: Path, split: str, table: pd.DataFrame) -> None:
    """Writes `id`, `label`, `slide` and the calibrated `logit`, with all digits.

    Rounding would make equal what the scores tell apart.
    """
    workdirs.write_text(folder / f"predictions_{split}.csv", table.to_csv(index=False))


def read(folder: Path, split: str) -> pd.DataFrame:
    """Reads what `write` has written.

    Raises:
        ExpectedError: it is not there.
    """
    path = folder / f"predictions_{split}.csv"
    if not path.exists():
        raise ExpectedError(
            f"{path} is missing: run --mode=evaluate --config.evaluate.split={split} in {folder}"
        )
    types = {"id": str, "slide": str}
    return pd.read_csv(path, dtype=types, na_values=[], keep_default_na=False)


def read_scores(folder: Path, split: str, table: pd.DataFrame) -> dict[str, Any]:
    """Reads the scores that `evaluate` has written beside the predictions `table`.

    Raises:
        ExpectedError: they are missing, damaged, or those of other predictions.
    """
    path = folder / f"evaluation_{split}.json"
    again = f"run --mode=evaluate --config.evaluate.split={split} again"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        known = [float(scores[name]) for name in ("count", "auc", "nll")]
    except FileNotFoundError:
        raise ExpectedError(f"{path} is missing: {again}") from None
    except (ValueError, KeyError, TypeError):
        raise ExpectedError(f"{path} is damaged: {again}") from None
    now = binary_scores(table["logit"].to_numpy(), table["label"].to_numpy(np.float64))
    # Text may lose the last digit. A process that is killed between the two files leaves others.
    if not np.allclose([now["count"], now["auc"], now["nll"]], known, rtol=1e-6, atol=1e-9):
        raise ExpectedError(f"{path} holds the scores of other predictions: {again}")
    return scores


def side(prepared: Prepared, sides: splits.Sides, split: str, table: pd.DataFrame) -> splits.Side:
    """Returns where the patches of what `read` returns lie, in its order.

    Raises:
        ExpectedError: `sides` are other patches than were evaluated.
    """
    found = sides.validation if split == "validation" else sides.test
    if found is None:
        raise ExpectedError(f"{prepared.directory} has no {split} patches any more")
    if prepared.tables[found.records]["id"].iloc[found.rows].tolist() != table["id"].tolist():
        raise ExpectedError(
            "these are not the patches that were evaluated: run --mode=evaluate again with the "
            "same config.data"
        )
    return found
