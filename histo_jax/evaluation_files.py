"""What `evaluate` has said of each patch: `predictions_<split>.csv`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histo_jax.config import Config
from histo_jax.data import splits
from histo_jax.data.records import Prepared
from histo_jax.errors import UserError
from histo_jax.metrics import binary_scores
from histo_jax.run.workdir import Workdir


def slides(table: pd.DataFrame) -> np.ndarray | None:
    """Returns the slide of each patch; None where some are not known, or names are no slides'.

    Patches of one could then be taken for patches of several.
    """
    is_known = (table["slide"] != "").all() and splits.has_slide_names(table)
    return table["slide"].to_numpy() if is_known else None


def write(run: Workdir, split: str, table: pd.DataFrame) -> None:
    """Writes `id`, `label`, `slide` and the calibrated `logit`, with all digits.

    Rounding would make equal what the scores tell apart.
    """
    run.write_text(f"predictions_{split}.csv", table.to_csv(index=False))


def read(folder: Path, split: str) -> pd.DataFrame:
    """Reads what `write` has written.

    Raises:
        UserError: it is not there.
    """
    path = folder / f"predictions_{split}.csv"
    if not path.exists():
        raise UserError(
            f"{path} is missing: run --mode=evaluate --config.evaluate.split={split} in {folder}"
        )
    types = {"id": str, "slide": str}
    return pd.read_csv(path, dtype=types, na_values=[], keep_default_na=False)


def read_scores(folder: Path, split: str) -> dict[str, Any]:
    """Reads the scores that `evaluate` has written beside them.

    Raises:
        UserError: they are missing or damaged.
    """
    path = folder / f"evaluation_{split}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise UserError(f"{path} is {what}: {_again(split)}") from None


def check_scores(folder: Path, split: str, table: pd.DataFrame, scores: dict[str, Any]) -> None:
    """Refuses scores that are not those of the predictions beside them.

    A process that is killed between the two files leaves such ones.

    Raises:
        UserError: names the file.
    """
    now = binary_scores(table["logit"].to_numpy(), table["label"].to_numpy(np.float64))
    for name in ("count", "auc", "nll"):
        # Text may lose the last digit.
        if scores.get(name) is None or not np.isclose(scores[name], now[name], rtol=1e-6):
            raise UserError(
                f"{folder / f'evaluation_{split}.json'} holds the scores of other predictions: "
                f"{_again(split)}"
            )


def _again(split: str) -> str:
    return f"run --mode=evaluate --config.evaluate.split={split} again"


def make_subsets(prepared: Prepared, config: Config, scores: dict[str, Any]) -> splits.Subsets:
    """Returns the sides that `evaluate` has scored.

    Args:
        prepared: the records.
        config: that of the command.
        scores: what `read_scores` returns; out of fold, all patches of the folds validate.
    """
    if not scores.get("out_of_fold"):
        return splits.make_subsets(prepared.tables, config.data, config.data_seed)
    # Any fold will do: the patches that are divided are the same for all.
    folded = dataclasses.replace(config, data=dataclasses.replace(config.data, fold="1/2"))
    everything = splits.draw_sample(prepared.tables, folded.data, folded.data_seed)
    return splits.Subsets(
        everything, everything, None, scores["split_by"], scores["slide_disjoint"]
    )


def subset(
    prepared: Prepared, subsets: splits.Subsets, split: str, table: pd.DataFrame
) -> splits.Subset:
    """Returns where the patches of what `read` returns lie, in its order.

    Raises:
        UserError: `subsets` are other patches than were evaluated.
    """
    found = subsets.validation if split == "validation" else subsets.test
    if found is None:
        raise UserError(f"{prepared.directory} has no {split} patches any more")
    if prepared.tables[found.records]["id"].iloc[found.rows].tolist() != table["id"].tolist():
        raise UserError(
            "these are not the patches that were evaluated: run --mode=evaluate again with the "
            "same config.data"
        )
    return found
