"""What `evaluate` writes: `predictions_<split>.csv` and `evaluation_<split>.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histo_jax.config import Config
from histo_jax.data import groups, splits
from histo_jax.data.records import Prepared
from histo_jax.errors import DataError, UserError
from histo_jax.metrics import binary_scores
from histo_jax.run.workdir import Workdir


def resampled(table: pd.DataFrame) -> tuple[str, np.ndarray | None]:
    """Returns what an interval is over, and the group of each patch, None for single patches.

    'patients' where all are known, else 'slides' where all are known, else 'patches': one name that
    is not known could be that of any other patch. Patients that share slides are one group.
    """
    if groups.are_known(table, "patient"):
        return "patients", groups.connect(table)
    if groups.are_known(table, "slide"):
        return "slides", table["slide"].to_numpy()
    return "patches", None


def write(run: Workdir, split: str, table: pd.DataFrame) -> None:
    """Writes `id`, `label`, `slide`, `logit` and, where any is known, `patient` and `path`.

    The calibrated logit has all digits: rounded ones could be equal where the scores were computed
    from different ones.
    """
    known = [name for name in ("patient", "path") if name in table and (table[name] != "").any()]
    columns = ["id", "label", "slide", "logit", *known]
    run.write_text(f"predictions_{split}.csv", table.to_csv(index=False, columns=columns))


def read(folder: Path, split: str) -> pd.DataFrame:
    """Reads the predictions that `write` has written.

    Raises:
        UserError: the file is missing.
    """
    path = folder / f"predictions_{split}.csv"
    if not path.exists():
        raise UserError(
            f"{path} is missing: run --mode=evaluate --config.evaluate.split={split} in {folder}"
        )
    types = dict.fromkeys(("id", "slide", "patient", "path"), str)
    return pd.read_csv(path, dtype=types, na_values=[], keep_default_na=False)


def read_scores(folder: Path, split: str) -> dict[str, Any]:
    """Reads the scores of these predictions.

    Raises:
        UserError: the file is missing or corrupt.
    """
    path = folder / f"evaluation_{split}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        problem = "missing" if isinstance(error, FileNotFoundError) else "corrupt"
        raise UserError(f"{path} is {problem}: {_rerun(split)}") from None


def check_scores(folder: Path, split: str, table: pd.DataFrame, scores: dict[str, Any]) -> None:
    """Refuses scores of other predictions, as a process leaves them that was killed between files.

    Args:
        folder: of the files.
        split: the split that was evaluated.
        table: the predictions.
        scores: the scores.

    Raises:
        UserError: names the file.
    """
    computed = binary_scores(table["logit"].to_numpy(), table["label"].to_numpy(np.float64))
    for name in ("count", "auc", "nll"):
        # Text may lose the last digit.
        if scores.get(name) is None or not np.isclose(scores[name], computed[name], rtol=1e-6):
            raise UserError(
                f"{folder / f'evaluation_{split}.json'} does not match the predictions: "
                f"{_rerun(split)}"
            )


def _rerun(split: str) -> str:
    return f"rerun --mode=evaluate --config.evaluate.split={split}"


def make_subsets(prepared: Prepared, config: Config, scores: dict[str, Any]) -> splits.Subsets:
    """Returns the split that `evaluate` has used.

    Args:
        prepared: the records.
        config: settings of the command.
        scores: result of `read_scores`; out of fold, the patches of all folds are validation.
    """
    if not scores.get("out_of_fold"):
        return splits.make_subsets(prepared.tables, config.data, config.data_seed)
    # All folds split the same patches, so any will do.
    any_fold = dataclasses.replace(config.data, fold="1/2")
    sample = splits.draw_sample(prepared.tables, any_fold, config.data_seed)
    disjoint = scores["slide_disjoint"], scores.get("patient_disjoint")
    return splits.Subsets(sample, sample, None, scores["split_by"], *disjoint)


def subset(
    prepared: Prepared, subsets: splits.Subsets, split: str, table: pd.DataFrame
) -> splits.Subset:
    """Returns the records of the evaluated patches, in the order of `table`.

    Args:
        prepared: the records.
        subsets: result of `make_subsets`.
        split: the split that was evaluated.
        table: result of `read`.

    Raises:
        DataError: the records or the split are not those that were evaluated.
    """
    current = subsets.validation if split == "validation" else subsets.test
    if current is None:
        raise DataError(f"{prepared.directory} no longer has {split} patches: {_rerun(split)}")
    current = splits.labelled(prepared.tables, current)
    if prepared.tables[current.records]["id"].iloc[current.rows].tolist() != table["id"].tolist():
        raise DataError(
            f"the {split} patches are not those that were evaluated: {_rerun(split)}, with the "
            "same config.data"
        )
    return current
