"""Trains a config on real patches and appends its scores to `recipes.csv`.

    .venv/bin/python tests/benchmarks/recipes.py pcam_fast --data=FOLDER --seeds=0,1,2
    .venv/bin/python tests/benchmarks/recipes.py pcam_best optimizer.weight_decay=0.1 --data=FOLDER
    .venv/bin/python tests/benchmarks/recipes.py pcam --pytorch --data=FOLDER

The config is a file of `configs/`, by name, or a path; settings after it replace its own. FOLDER
contains the data of its source: the HDF5 files of PatchCamelyon, Kaggle's TIFFs, or a sample of
them. Scores are those of the validation split. Runs that are in the CSV are skipped, interrupted
ones are resumed. --pytorch trains the original teaching project in PyTorch, see `original.py`.

Minutes are those of training, without compilation; `recipe_curves.csv` has them, and the scores,
for each epoch. They count only for a run that has the machine to itself: --busy leaves them out.
`recipe_table.py` prints a table of both files and draws the curves.
"""

import argparse
import ast
import datetime
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from absl import logging

import histo_jax
from histo_jax import config_files, streams
from histo_jax.config import Config, flat, set_field
from histo_jax.config_checks import validate
from histo_jax.data.records import Prepared
from histo_jax.data.splits import make_subsets
from histo_jax.models import create_model
from histo_jax.preparation import prepare
from histo_jax.run.workdir import Workdir

TABLE = Path(__file__).with_name("recipes.csv")
CURVES = Path(__file__).with_name("recipe_curves.csv")
KEY = ["recipe", "seed"]
Row = dict[str, Any]


def configure(name: str, changes: Sequence[str]) -> Config:
    """Returns a config with some settings replaced.

    Args:
        name: of a file of `configs/`, or a path.
        changes: `FIELD=VALUE`, such as `fit.epochs=3`.
    """
    config = config_files.execute(*config_files.find(name))
    for change in changes:
        field, _, text = change.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        set_field(config, field, value)
    validate(config)
    return config


def make_row(config: Config, key: Row, runs: Path, is_pytorch: bool, is_busy: bool) -> Row:
    """Trains and scores a config; returns its row of the table."""
    prepared = prepare(config)
    patches = len(make_subsets(prepared.tables, config.data, config.data_seed).train.rows)
    workdir = runs / re.sub(r"[^\w.-]+", "_", "_".join(map(str, key.values())))
    train = run_pytorch if is_pytorch else run
    result = train(config, prepared, workdir, key, is_busy)
    default = flat(Config())
    folders = ("data.raw_dir", "data.tfds_dir")
    changed = {k: v for k, v in flat(config).items() if v != default[k] and k not in folders}
    return {
        "date": datetime.date.today().isoformat(),
        **key,
        "training_patches": patches,
        **result,
        "config": " ".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()),
    }


class Curve(histo_jax.Callback):
    """Writes the scores of each epoch, and the minutes of training up to it, to `CURVES`.

    Args:
        run: recipe and seed.
        minutes: returns the minutes so far.
    """

    def __init__(self, run: dict[str, Any], minutes: Callable[[], float | None]) -> None:
        self._run, self._minutes = run, minutes

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        row = self._run | {
            "epoch": epoch,
            "minutes": self._minutes(),
            "validation_auc": round(logs["validation_auc"], 4),
            "validation_nll": round(logs["validation_loss"], 4),
        }
        table = pd.read_csv(CURVES) if CURVES.exists() else pd.DataFrame()
        table = pd.concat([table, pd.DataFrame([row])])
        # An epoch is trained again after a kill.
        table.drop_duplicates([*self._run, "epoch"], keep="last").to_csv(CURVES, index=False)


def run(config: Config, prepared: Prepared, workdir: Path, key: Row, is_busy: bool) -> Row:
    """Trains or resumes a run, and evaluates it; returns its part of a row of the table."""

    def status(name: str) -> float | None:
        return None if is_busy else round(Workdir(workdir).status()[name], 2)

    curve = Curve(key, lambda: status("minutes_trained"))
    history = histo_jax.fit(config, workdir, callbacks=[curve])
    scores = histo_jax.evaluate(config, workdir)
    model, size = create_model(config.model), prepared.image_size
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    )
    best = history.loc[history["validation_loss"].idxmin()]
    return {
        "validation_auc": round(scores["auc"], 4),
        "validation_nll": round(scores["nll"], 4),
        "validation_accuracy": round(scores["accuracy"], 4),
        "best_epoch": int(best["epoch"]),
        "last_auc": round(history["validation_auc"].iloc[-1], 4),
        "last_nll": round(history["validation_loss"].iloc[-1], 4),
        "minutes": status("minutes_trained"),
        "images_per_second": status("images_per_second"),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])),
    }


def run_pytorch(config: Config, prepared: Prepared, _: Path, key: Row, is_busy: bool) -> Row:
    """Trains the original in PyTorch; it cannot resume. Returns its part of a row."""
    import original

    epochs: list[Row] = []
    curve = Curve(key, lambda: None if is_busy else round(epochs[-1]["minutes"], 2))
    for epoch in original.train(config, prepared, os.cpu_count() or 1):
        epochs.append(epoch)
        curve.on_epoch_end(epoch["epoch"], epoch)
    best = min(epochs, key=lambda epoch: epoch["validation_loss"])
    return {
        "validation_auc": round(best["validation_auc"], 4),
        "validation_nll": round(best["validation_loss"], 4),
        "validation_accuracy": round(best["validation_accuracy"], 4),
        "best_epoch": best["epoch"],
        "last_auc": round(epochs[-1]["validation_auc"], 4),
        "last_nll": round(epochs[-1]["validation_loss"], 4),
        "minutes": None if is_busy else round(epochs[-1]["minutes"], 2),
        "parameters": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="name of a file of configs/, or a path")
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="settings to replace")
    parser.add_argument("--data", required=True, help="folder with the data of the config's source")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--pytorch", action="store_true", help="train the original in PyTorch")
    parser.add_argument("--busy", action="store_true", help="other programs run: no minutes")
    options = parser.parse_args()
    logging.set_verbosity(logging.FATAL)  # as histo_jax.main does
    streams.log_to_stderr()
    name = " ".join([Path(options.config).stem, *options.changes])
    for seed in map(int, options.seeds.split(",")):
        key = {"recipe": f"{name}, PyTorch" if options.pytorch else name, "seed": seed}
        done = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame()
        if len(done) and (done[KEY] == list(key.values())).all(axis=1).any():
            print(f"{TABLE.name} has {key}")
            continue
        config = configure(options.config, options.changes)
        config.seed, config.data.raw_dir = seed, options.data
        config.data.tfds_dir = str(options.runs / "records")
        row = make_row(config, key, options.runs, options.pytorch, options.busy)
        table = pd.concat([done, pd.DataFrame([row])]).astype({"parameters": "Int64"})
        table.to_csv(TABLE, index=False)
        print(row, flush=True)


if __name__ == "__main__":
    main()
