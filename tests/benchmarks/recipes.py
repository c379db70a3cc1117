"""Trains recipes on real slides and appends the scores of each one to `recipes.csv`.

    .venv/bin/python tests/benchmarks/recipes.py --data=FOLDER --stage=screen [NAME ...]

FOLDER contains the HDF5 files of PatchCamelyon, or a sample of them. Scores are those of the
official validation split. Skips the runs that are in the CSV, and resumes interrupted ones. Stages:

    screen   `BASE`, and each of `FACTORS` alone, on 5,000 patches, for 15 epochs
    full     the recipes of `FULL`, on all patches; --seeds=0,1,2
    curve    the best recipe with the D4-invariant and with the plain network on 1,000 and 5,000
             patches; draws `learning_curves.svg` of these and the full runs
    pytorch  the recipe of the original teaching project in PyTorch, see `original.py`

Minutes are those of training, without compilation; `recipe_curves.csv` has them, and the scores,
for each epoch. They count only for a run that has the machine to itself: --busy leaves them out.
"""

import argparse
import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from absl import logging

import histo_jax
from histo_jax import streams
from histo_jax.config import Config, flat
from histo_jax.data.records import Prepared
from histo_jax.data.splits import make_subsets
from histo_jax.models import create_model
from histo_jax.preparation import prepare
from histo_jax.run.workdir import Workdir

TABLE = Path(__file__).with_name("recipes.csv")
CURVES = Path(__file__).with_name("recipe_curves.csv")
Row = dict[str, Any]
BASE = {
    "model.name": "five_block_p4m",
    "model.features": (4, 8, 16, 32, 64),
    "model.dense": 256,
    "optimizer.learning_rate": 4e-3,
    "optimizer.schedule": "one_cycle",
    "optimizer.weight_decay": 1e-2,
}
FACTORS: dict[str, dict[str, Any]] = {
    "base": {},
    "stain": {"augment.stain": 0.2, "augment.brightness": 0.1},
    "shift": {"augment.shift": 4},
    "mixup": {"augment.mixup": 0.2},
    "ema": {"optimizer.ema_decay": 0.998},
    "wide": {"model.features": (6, 12, 24, 48, 96)},
    "no_dropout": {"model.dropout": 0.0},
    "decay_1": {"optimizer.weight_decay": 0.1},
    "rate_1e-3": {"optimizer.learning_rate": 1e-3},
    "rate_1e-2": {"optimizer.learning_rate": 1e-2},
    "batch_128": {"fit.batch_size": 128, "optimizer.learning_rate": 8e-3},
    "constant_ema": {
        "optimizer.schedule": "constant",
        "optimizer.learning_rate": 1e-3,
        "optimizer.ema_decay": 0.998,
    },
    "plain": {
        "model.name": "five_block",
        "model.features": (32, 64, 128, 256, 512),
        "model.dense": 1024,
        "optimizer.learning_rate": 1e-3,
    },
}
FULL: dict[str, dict[str, Any]] = {
    "stain_ema": {
        **FACTORS["stain"],
        "optimizer.ema_decay": 0.999,
        "fit.epochs": 20,
    },
    "strong": {
        "augment.stain": 0.3,
        "augment.brightness": 0.15,
        "augment.shift": 4,
        "augment.mixup": 0.2,
        "optimizer.weight_decay": 0.05,
        "optimizer.ema_decay": 0.999,
        "fit.epochs": 16,
    },
    # 0.94 in the fewest minutes.
    "fast": {
        "model.features": (3, 6, 12, 24, 48),
        "model.dropout": 0.2,
        "augment.stain": 0.3,
        "augment.brightness": 0.15,
        "augment.shift": 4,
        "augment.mixup": 0.2,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 8e-3,
        "optimizer.weight_decay": 0.05,
        "optimizer.ema_decay": 0.99,
        "fit.crop_epochs": 3,
        "fit.epochs": 4,
    },
    # As `configs/pcam.py`.
    "original": {
        "model.name": "five_block",
        "model.features": (32, 64, 128, 256, 512),
        "model.dense": 1024,
        "optimizer.learning_rate": 1.5e-4,
        "optimizer.schedule": "constant",
        "optimizer.weight_decay": 0.0,
        "early_stopping.patience": 4,
    },
}
BEST = "strong"
FULL["muon"] = FULL[BEST] | {
    "optimizer.name": "muon",
    "optimizer.learning_rate": 1.2e-2,
    "fit.crop_epochs": 16,
    "fit.epochs": 24,
}
FULL[f"{BEST}_plain"] = FULL[BEST] | FACTORS["plain"]
# The full run of each network; the runs on fewer patches use the same recipe.
NETWORKS = {"symmetric": BEST, "plain": f"{BEST}_plain"}
CURVE = {
    f"{network}_{size}": {**FULL[full], "data.samples_per_class": size // 2}
    for size in (1000, 5000)
    for network, full in NETWORKS.items()
}
PYTORCH = {"original": FULL["original"]}
STAGES = {"screen": FACTORS, "full": FULL, "curve": CURVE, "pytorch": PYTORCH}


def configure(options: argparse.Namespace, name: str, seed: int) -> Config:
    """Returns the settings of a recipe of a stage."""
    changes = {
        "early_stopping.patience": 1000,
        **BASE,
        **STAGES[options.stage][name],
        "seed": seed,
        "data.source": "pcam",
        "data.raw_dir": options.data,
        "data.tfds_dir": str(options.runs / "records"),
    }
    if options.stage == "screen":
        changes |= {"data.samples_per_class": 2500, "fit.epochs": 15}
    config = Config()
    for field, value in changes.items():
        node = config
        *groups, last = field.split(".")
        for group in groups:
            node = getattr(node, group)
        assert hasattr(node, last), field
        setattr(node, last, value)
    return config


def make_row(config: Config, key: Row, options: argparse.Namespace) -> Row:
    """Trains and scores a recipe; returns its row of the table."""
    prepared = prepare(config)
    patches = len(make_subsets(prepared.tables, config.data, config.data_seed).train.rows)
    workdir = options.runs / "_".join(map(str, key.values()))
    train = run_pytorch if key["stage"] == "pytorch" else run
    result = train(config, prepared, workdir, key, options.busy)
    default = flat(Config())
    changed = {
        k: v for k, v in flat(config).items() if v != default[k] and not k.startswith("data.")
    }
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
        run: stage, recipe and seed.
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
    model = create_model(config.model)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 96, 96, 3), "float32")
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
    parser.add_argument("names", nargs="*", help="recipes of the stage (all)")
    parser.add_argument("--data", required=True, help="folder with the HDF5 files of PatchCamelyon")
    parser.add_argument("--stage", choices=STAGES, default="screen")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--busy", action="store_true", help="other programs run: no minutes")
    options = parser.parse_args()
    logging.set_verbosity(logging.FATAL)  # as histo_jax.main does
    streams.log_to_stderr()
    for name in options.names or STAGES[options.stage]:
        for seed in map(int, options.seeds.split(",")):
            key = {"stage": options.stage, "recipe": name, "seed": seed}
            done = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame()
            if len(done) and (done[list(key)] == list(key.values())).all(axis=1).any():
                continue
            row = make_row(configure(options, name, seed), key, options)
            table = pd.concat([done, pd.DataFrame([row])]).astype({"parameters": "Int64"})
            table.to_csv(TABLE, index=False)
            print(row, flush=True)
    if options.stage == "curve":
        draw(pd.read_csv(TABLE))


def draw(table: pd.DataFrame) -> None:
    """Draws the validation AUC by number of training patches, one line per network."""
    import matplotlib.pyplot as plt

    table = table[table["seed"] == 0]
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axes.set(xscale="log", xlabel="training patches", ylabel="validation AUC, unseen slides")
    for (network, full), marker in zip(NETWORKS.items(), "os", strict=True):
        part = (table["stage"] == "curve") & table["recipe"].str.startswith(network)
        whole = (table["stage"] == "full") & (table["recipe"] == full)
        rows = table[part | whole].sort_values("training_patches")
        axes.plot(rows["training_patches"], rows["validation_auc"], marker + "-", label=network)
        axes.set_xticks(rows["training_patches"], [f"{n:,}" for n in rows["training_patches"]])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="network, one seed each")
    # Without a date and with fixed ids: the same numbers give the same file.
    plt.rcParams["svg.hashsalt"] = "histo_jax"
    figure.savefig(TABLE.with_name("learning_curves.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
