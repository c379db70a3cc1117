"""Tests whether one run scores better than another."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histo_jax import environment, evaluation_files
from histo_jax.config import Config
from histo_jax.config_checks import validate
from histo_jax.config_values import folders
from histo_jax.distributed import processes
from histo_jax.errors import UserError
from histo_jax.metrics import FEW_SLIDES, difference
from histo_jax.run import files
from histo_jax.run.workdir import Workdir

# The scores that decide: ranking and probabilities, each with the sign of an improvement. With
# all eight scores at 95% each, one would often differ by chance.
_DECIDING = {"auc": ("AUC", 1), "nll": ("NLL", -1)}
# With fewer slides, all of them favour the same one of two equal runs in more than 1 of 20 cases.
_FEWEST_SLIDES = 6


@environment.defaults()
def compare(config: Config, workdir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Compares the two runs of `config.compare.runs` by a paired bootstrap.

    Reads the predictions that `evaluate` wrote for `config.evaluate.split`, resamples patients
    (slides, where patients are not known; patches, where neither are) alike for both runs, and
    writes `compare.json`.

    Args:
        config: `compare.runs`, `evaluate.split` and `seed` matter.
        workdir: folder for `compare.json`; None writes no file.

    Returns:
        `first`, `second`, `split`, `count`, `interval_over`, how many `resampled`, for each score
        `difference` (second minus first), `interval` (95%) and `p`; and the `verdict` as text.

    Raises:
        UserError: not two runs, or they were not evaluated on the same patches.
        OSError: a file cannot be written.
    """
    validate(config)
    run = None
    if workdir is not None:
        run = Workdir(files.expand(workdir, "--workdir"), processes.is_primary())
        run.check_path()
    runs = folders(config.compare.runs)
    if len(runs) != 2:
        raise UserError("--mode=compare needs --config.compare.runs=RUN1,RUN2")
    split = config.evaluate.split
    places = [files.expand(name, "--config.compare.runs") for name in runs]
    for place in places:
        Workdir(place).saved_config()  # refuses runs of 0.1.0
    first, second = (evaluation_files.read(place, split) for place in places)
    if not first[["id", "label"]].equals(second[["id", "label"]]):
        raise UserError(
            f"{runs[0]} and {runs[1]} were not evaluated on the same patches: evaluate both with "
            "the same config.data and the same config.data.split_seed"
        )
    optimistic = [
        _is_optimistic(place, split, scored)
        for place, scored in zip(places, (first, second), strict=True)
    ]
    unit, groups = evaluation_files.resampled(first)
    result = {
        "first": runs[0],
        "second": runs[1],
        "split": split,
        "count": len(first),
        "interval_over": unit,
        "resampled": len(first) if groups is None else len(np.unique(groups)),
        **difference(
            (first["logit"].to_numpy(), second["logit"].to_numpy()),
            first["label"].to_numpy(np.float64),
            groups,
            config.seed,
        ),
    }
    result["verdict"] = _verdict(result, any(optimistic))
    if run is not None:
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_json("compare.json", result)
    return result


def _is_optimistic(folder: Path, split: str, table: pd.DataFrame) -> bool:
    """Returns whether the run's scores, if any, are marked as not slide- or patient-disjoint."""
    if not (folder / f"evaluation_{split}.json").exists():
        return False
    scores = evaluation_files.read_scores(folder, split)
    evaluation_files.check_scores(folder, split, table, scores)
    return False in (scores.get("slide_disjoint"), scores.get("patient_disjoint"))


def _verdict(result: dict[str, Any], optimistic: bool) -> str:
    """Returns in one line which run has the better AUC and NLL, and the caveats."""
    unit, count = result["interval_over"], result["resampled"]
    has_groups = unit != "patches"
    if has_groups and count < _FEWEST_SLIDES:
        return (
            f"too few {unit} to show a difference ({count}; at least {_FEWEST_SLIDES} are needed)"
        )
    better: dict[str, list[str]] = {}
    undecided = []
    for score, (name, sign) in _DECIDING.items():
        low, high = sorted(sign * end for end in result[score]["interval"])
        if low > 0 or high < 0:
            winner = result["second" if low > 0 else "first"]
            least, most = sorted((abs(low), abs(high)))
            gain = abs(result[score]["difference"])
            words = f"{name} (by {gain:.4f}, 95% {least:.4f} to {most:.4f})"
            better.setdefault(winner, []).append(words)
        else:
            undecided.append(name)
    parts = [f"{run} is better in {' and '.join(words)}" for run, words in better.items()]
    if undecided:
        parts.append(f"{' and '.join(undecided)}: no significant difference")
    if not has_groups:
        parts.append("slides are not known, so the intervals are too narrow")
    elif count < FEW_SLIDES:
        parts.append(f"few {unit} ({count}), so the intervals may be too narrow")
    if optimistic:
        unit = "patients" if unit == "patients" else "slides"
        parts.append(f"{unit} may be shared with training, so this may not hold for other {unit}")
    return "; ".join(parts)


def table(result: dict[str, Any]) -> str:
    """Returns the comparison as readable lines."""
    lines = [
        f"{result['second']} minus {result['first']}, {result['count']} {result['split']} patches, "
        f"resampled over {result['resampled']} {result['interval_over']}:"
    ]
    for name, value in result.items():
        if isinstance(value, dict):
            low, high = value["interval"]
            lines.append(
                f"  {name:<30} {value['difference']:+.4f}  95% {low:+.4f} to {high:+.4f}  "
                f"p {value['p']:.3g}"
            )
    lines.append("AUC and NLL decide, each by its own interval; the other scores are informative.")
    lines.append(f"verdict: {result['verdict']}")
    return "\n".join(lines)
