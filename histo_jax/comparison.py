"""Does one run score better than another, or is it chance?"""

import os
from typing import Any

import numpy as np

from histo_jax import environment, files, predictions
from histo_jax import workdir as workdirs
from histo_jax.config import Config, names, validate
from histo_jax.errors import ExpectedError
from histo_jax.metrics import difference


@environment.defaults()
def compare(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Compares the two runs of `config.compare.runs` on the patches that both have scored.

    Reads what `evaluate` has written of `config.evaluate.split`, draws slides (or patches, where
    slides are not known) alike for both, and writes `compare.json`.

    Returns:
        `first`, `second`, `split`, `count`, `interval_over`, and for each score `difference`
        (second minus first), `interval` (95%) and `p`.

    Raises:
        ExpectedError: not two runs, or they were not scored on the same patches.
        OSError: a file cannot be written.
    """
    validate(config)
    runs = names(config.compare.runs)
    if len(runs) != 2:
        raise ExpectedError("--mode=compare needs --config.compare.runs=RUN1,RUN2")
    split = config.evaluate.split
    first, second = (
        predictions.read(files.expand(run, "--config.compare.runs"), split) for run in runs
    )
    if not first[["id", "label"]].equals(second[["id", "label"]]):
        raise ExpectedError(
            f"{runs[0]} and {runs[1]} were not scored on the same patches: evaluate both with the "
            "same config.data and config.seed"
        )
    slides = predictions.slides(first)
    result = {
        "first": runs[0],
        "second": runs[1],
        "split": split,
        "count": len(first),
        "interval_over": "patches" if slides is None else "slides",
        **difference(
            (first["logit"].to_numpy(), second["logit"].to_numpy()),
            first["label"].to_numpy(np.float64),
            slides,
            config.seed,
        ),
    }
    folder = files.expand(workdir, "--workdir")
    folder.mkdir(parents=True, exist_ok=True)
    workdirs.write_json(folder / "compare.json", result)
    return result


def table(result: dict[str, Any]) -> str:
    """Returns the comparison as lines for people."""
    lines = [
        f"{result['second']} minus {result['first']}, {result['count']} {result['split']} patches, "
        f"resampled over {result['interval_over']}:"
    ]
    for name, value in result.items():
        if isinstance(value, dict):
            low, high = value["interval"]
            lines.append(
                f"  {name:<30} {value['difference']:+.4f}  95% {low:+.4f} to {high:+.4f}  "
                f"p {value['p']:.3g}"
            )
    return "\n".join(lines)
