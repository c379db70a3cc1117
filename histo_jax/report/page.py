"""Gathers what a run reached and writes the page."""

import base64
import importlib.metadata
import io
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
from PIL import Image
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from histo_jax import predictions
from histo_jax import workdir as workdirs
from histo_jax.config import Config, flat, validate
from histo_jax.data import splits
from histo_jax.data.builder import Prepared, prepare
from histo_jax.errors import ExpectedError
from histo_jax.metrics.scores import per_patch_loss
from histo_jax.report import figures

log = logging.getLogger("histo_jax")

# Patches in each gallery.
_SHOWN = 12
_VERSIONS = ("histo_jax", "jax", "flax", "optax", "numpy")
# What the table of scores shows, in this order.
_SCORES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy at probability 0.5",
    "sensitivity_at_95_specificity": "sensitivity at 95% specificity",
    "specificity_at_95_sensitivity": "specificity at 95% sensitivity",
    "nll": "negative log-likelihood, nats",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
}


class Patch(NamedTuple):
    """One picture of a gallery."""

    id: str
    slide: str
    label: int
    probability: float
    image: str


def report(config: Config, workdir: str | os.PathLike[str]) -> Path:
    """Writes `report.html`, one page without any other file, and its figures into `report/`.

    Shows what `evaluate` has last written for `config.evaluate.split`.

    Returns:
        The page.

    Raises:
        ExpectedError: nothing was evaluated there.
        OSError: a file cannot be written.
    """
    validate(config)
    folder = Path(workdir)
    workdirs.check(folder, config)
    split = config.evaluate.split
    table = predictions.read(folder, split)
    scores = json.loads((folder / f"evaluation_{split}.json").read_text(encoding="utf-8"))
    history = pd.read_csv(folder / "history.csv") if (folder / "history.csv").exists() else None
    with workdirs.tracked(folder, "report"):
        prepared = prepare(config)
        logits, labels = table["logit"].to_numpy(), table["label"].to_numpy(np.float64)
        probabilities = expit(logits)
        drawn = {
            "roc": figures.roc(logits, labels, scores),
            "precision_recall": figures.precision_recall(logits, labels),
            "calibration": figures.calibration(probabilities, labels),
            "histogram": figures.histogram(probabilities, labels),
        }
        if history is not None and len(history):
            drawn["learning_curves"] = figures.learning_curves(history)
        text = _template().render(
            workdir=folder.absolute().name,
            source=config.data.source,
            split=split,
            scores=scores,
            score_names=_SCORES,
            figures=drawn,
            slides=_slides(table, probabilities),
            counts=_counts(probabilities, labels),
            galleries=_galleries(config, prepared, table, probabilities),
            settings=_read(folder / "config.json") or flat(config),
            versions=_versions(),
            records=f"{prepared.directory.parent.name} {prepared.directory.name}",
        )
        figure_folder = folder / "report"
        if workdirs.is_writer():
            figure_folder.mkdir(exist_ok=True)
        for name, svg in drawn.items():
            workdirs.write_text(figure_folder / f"{name}.svg", svg)
        workdirs.write_text(folder / "report.html", text)
    log.info("report in %s", folder / "report.html")
    return folder / "report.html"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("histo_jax.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in _VERSIONS}
    return {"python": platform.python_version(), **found}


def _slides(table: pd.DataFrame, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """One row a slide, the worst first; none where slides are not known."""
    if predictions.slides(table) is None:
        return []
    loss = per_patch_loss(table["logit"].to_numpy(), table["label"].to_numpy())
    rows = []
    for slide, places in table.groupby("slide").indices.items():
        labels, said = table["label"].to_numpy()[places], probabilities[places]
        both = 0 < labels.sum() < len(labels)
        rows.append(
            {
                "slide": slide,
                "patches": len(places),
                "tumour": float(labels.mean()),
                "auc": float(roc_auc_score(labels, said)) if both else None,
                "accuracy": float(((said > 0.5) == (labels == 1)).mean()),
                "nll": float(loss[places].mean()),
            }
        )
    return sorted(rows, key=lambda row: -row["nll"])


def _counts(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:
    """How many patches of each class are called tumour at each threshold of 0 to 100 percent."""
    thresholds = np.arange(101) / 100
    return {
        name: [int((chosen >= threshold).sum()) for threshold in thresholds]
        for name, chosen in (
            ("positives", probabilities[labels == 1]), ("negatives", probabilities[labels == 0]),
        )
    }  # fmt: skip


def _galleries(
    config: Config, prepared: Prepared, table: pd.DataFrame, probabilities: np.ndarray
) -> dict[str, list[Patch]]:
    sides = splits.make_sides(prepared.tables, config)
    side = sides.validation if config.evaluate.split == "validation" else sides.test
    if side is None:
        raise ExpectedError(f"{prepared.directory} has no {config.evaluate.split} patches any more")
    rows = side.rows
    ids = prepared.tables[side.records]["id"].to_numpy()[rows]
    if ids.tolist() != table["id"].tolist():
        raise ExpectedError(
            "these are not the patches that were evaluated: run --mode=evaluate again with the "
            "same config.data"
        )
    loss = per_patch_loss(table["logit"].to_numpy(), table["label"].to_numpy())
    rng = np.random.default_rng(config.seed)
    chosen = {
        "Most wrong": np.argsort(-loss, kind="stable")[:_SHOWN],
        "Least sure": np.argsort(np.abs(probabilities - 0.5), kind="stable")[:_SHOWN],
        "At random": rng.permutation(len(table))[:_SHOWN],
    }
    source = prepared.source(side.records)
    return {
        title: [
            Patch(
                id=str(ids[place]),
                slide=str(table["slide"].iloc[place]),
                label=int(table["label"].iloc[place]),
                probability=float(probabilities[place]),
                image=_data_url(record["image"]),
            )
            for place, record in zip(
                places, source.__getitems__(rows[places].tolist()), strict=True
            )
        ]
        for title, places in chosen.items()
    }


def _data_url(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
