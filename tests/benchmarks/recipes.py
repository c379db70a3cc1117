"""Trains recipes on real slides and appends the scores of each one to `recipes.csv`.

    .venv/bin/python tests/benchmarks/recipes.py --data=FOLDER --stage=screen [NAME ...]

FOLDER contains the HDF5 files of PatchCamelyon, or a sample of them. Scores are those of the
official validation split. Skips the runs that are in the CSV, and resumes interrupted ones. Stages:

    screen   `BASE`, and each of `FACTORS` alone, on 5,000 patches, for 15 epochs
    full     the recipes of `FULL`, on all patches; --seeds=0,1,2
    curve    the best recipe with the D4-invariant and with the plain network on 1,000 and 5,000
             patches; draws `learning_curves.svg` of these and the full runs
"""

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from absl import logging

import histo_jax
from histo_jax import streams
from histo_jax.config import Config, flat
from histo_jax.data.splits import make_subsets
from histo_jax.models import create_model
from histo_jax.preparation import prepare
from histo_jax.run.workdir import Workdir

TABLE = Path(__file__).with_name("recipes.csv")
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
FULL[f"{BEST}_plain"] = FULL[BEST] | FACTORS["plain"]
# The full run of each network; the runs on fewer patches use the same recipe.
NETWORKS = {"symmetric": BEST, "plain": f"{BEST}_plain"}
CURVE = {
    f"{network}_{size}": {**FULL[full], "data.samples_per_class": size // 2}
    for size in (1000, 5000)
    for network, full in NETWORKS.items()
}
STAGES = {"screen": FACTORS, "full": FULL, "curve": CURVE}


def configure(changes: dict[str, Any]) -> Config:
    config = Config()
    for name, value in changes.items():
        node = config
        *groups, field = name.split(".")
        for group in groups:
            node = getattr(node, group)
        assert hasattr(node, field), name
        setattr(node, field, value)
    return config


def run(stage: str, name: str, changes: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Trains or resumes a run, and evaluates it; returns the row of the table."""
    config = configure(changes)
    prepared = prepare(config)
    patches = len(make_subsets(prepared.tables, config.data, config.data_seed).train.rows)
    start = time.monotonic()
    history = histo_jax.fit(config, workdir)
    scores = histo_jax.evaluate(config, workdir)
    minutes = (time.monotonic() - start) / 60
    model = create_model(config.model)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 96, 96, 3), "float32")
    )
    default = flat(Config())
    changed = {
        k: v for k, v in flat(config).items() if v != default[k] and not k.startswith("data.")
    }
    best = history.loc[history["validation_loss"].idxmin()]
    return {
        "date": datetime.date.today().isoformat(),
        "stage": stage,
        "recipe": name,
        "seed": config.seed,
        "training_patches": patches,
        "validation_auc": round(scores["auc"], 4),
        "validation_nll": round(scores["nll"], 4),
        "validation_accuracy": round(scores["accuracy"], 4),
        "best_epoch": int(best["epoch"]),
        "last_auc": round(history["validation_auc"].iloc[-1], 4),
        "last_nll": round(history["validation_loss"].iloc[-1], 4),
        "minutes": round(minutes, 1),
        "images_per_second": Workdir(workdir).status()["images_per_second"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])),
        "config": " ".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="recipes of the stage (all)")
    parser.add_argument("--data", required=True, help="folder with the HDF5 files of PatchCamelyon")
    parser.add_argument("--stage", choices=STAGES, default="screen")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    options = parser.parse_args()
    logging.set_verbosity(logging.FATAL)  # as histo_jax.main does
    streams.log_to_stderr()
    for name in options.names or STAGES[options.stage]:
        for seed in map(int, options.seeds.split(",")):
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
            done = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame()
            same = {"stage": options.stage, "recipe": name, "seed": seed}
            if len(done) and (done[list(same)] == list(same.values())).all(axis=1).any():
                continue
            workdir = options.runs / f"{options.stage}_{name}_{seed}"
            row = run(options.stage, name, changes, workdir)
            pd.concat([done, pd.DataFrame([row])]).to_csv(TABLE, index=False)
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
