"""Gathers what a run reached and writes the page."""

import base64
import dataclasses
import importlib.metadata
import io
import itertools
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
import pandas as pd
from jax.sharding import SingleDeviceSharding
from PIL import Image
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from histo_jax import members, predictions
from histo_jax import workdir as workdirs
from histo_jax.config import Config, validate
from histo_jax.data import splits
from histo_jax.data.audit import table as audit_table
from histo_jax.data.builder import prepare
from histo_jax.errors import ExpectedError
from histo_jax.members import Member
from histo_jax.metrics.scores import per_patch_loss
from histo_jax.report import figures, patches
from histo_jax.report.patches import gather
from histo_jax.training import runtime

log = logging.getLogger("histo_jax")

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
_OF_EVALUATION = ("evaluate.", "predict.")


def report(config: Config, workdir: str | os.PathLike[str]) -> Path:
    """Writes `report.html`, one page without any other file, and its figures into `report/`.

    Shows what `evaluate` has last written for `config.evaluate.split`, and where the networks that
    it judged looked.

    Returns:
        The page.

    Raises:
        ExpectedError: nothing was evaluated there.
        OSError: a file cannot be written.
    """
    validate(config)
    runtime.set_up()
    folder = Path(workdir).expanduser()
    workdirs.check(folder, config)
    split = config.evaluate.split
    table = predictions.read(folder, split)
    scores = json.loads((folder / f"evaluation_{split}.json").read_text(encoding="utf-8"))
    with workdirs.tracked(folder, "report"):
        prepared = prepare(config)
        sides = splits.make_sides(prepared.tables, config)
        side = predictions.side(prepared, sides, split, table)
        trained = _judged(config, folder, scores)
        chosen = patches.galleries(table, config.seed)
        # All at once: the networks are compiled for them only one time.
        rows = np.concatenate(list(chosen.values()))
        logits = table["logit"].to_numpy()[rows]
        found = iter(gather(prepared, side.records, side.rows[rows], trained, logits))
        galleries = {
            title: list(itertools.islice(found, len(places))) for title, places in chosen.items()
        }
        history = folder / "history.csv"
        audited = _read(folder / "audit.json")
        # Those of training are as `fit` has saved them; those of evaluation are this command's.
        settings = workdirs.plain(config)
        saved = _read(folder / "config.json") or settings
        settings |= {k: v for k, v in saved.items() if not k.startswith(_OF_EVALUATION)}
        text, drawn = render(
            workdir=folder.absolute().name,
            source=config.data.source,
            split=split,
            scores=scores,
            history=pd.read_csv(history) if history.exists() else None,
            table=table,
            galleries=galleries,
            settings=settings,
            records=f"{prepared.directory.parent.name} {prepared.directory.name}",
            fingerprint=splits.fingerprint(prepared.tables, sides, config)[:16],
            audit=audit_table(audited) if audited else None,
        )
        if workdirs.is_writer():
            (folder / "report").mkdir(exist_ok=True)
        for name, svg in drawn.items():
            workdirs.write_text(folder / "report" / f"{name}.svg", svg)
        workdirs.write_text(folder / "report.html", text)
    log.info("report in %s", folder / "report.html")
    return folder / "report.html"


def _judged(config: Config, folder: Path, scores: dict[str, Any]) -> list[Member]:
    """The networks that these scores are of; none where they are gone."""
    runs = ",".join(member["run"] for member in scores.get("members", []))
    predict = dataclasses.replace(config.predict, checkpoints=runs)
    place = SingleDeviceSharding(jax.local_devices()[0])
    try:
        return members.restore(dataclasses.replace(config, predict=predict), folder, place)
    except ExpectedError as error:
        log.warning("the report does not show where the network looked: %s", error)
        return []


def render(
    *,
    scores: dict[str, Any],
    history: pd.DataFrame | None,
    table: pd.DataFrame,
    settings: dict[str, Any],
    **facts: Any,
) -> tuple[str, dict[str, str]]:
    """Returns the page, and its figures as SVG by name.

    Args:
        scores: what `evaluate` has returned.
        history: what `fit` has returned; None = not known.
        table: what `predictions.read` returns.
        settings: by dotted name, as JSON gives them.
        facts: the other words of `page.html`.
    """
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
        scores=scores,
        score_names=_SCORES,
        figures=drawn,
        slides=_slides(table, probabilities),
        counts=_counts(probabilities, labels),
        versions=_versions(),
        settings=settings,
        changed=_changed(settings),
        **facts,
    )
    return text, drawn


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("histo_jax.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = _data_url
    return environment.get_template("page.html")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _changed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the default, without those that say where things lie."""
    default = workdirs.plain(Config())
    return {
        name: value
        for name, value in settings.items()
        if name not in default or (value != default[name] and not name.endswith("_dir"))
    }


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


def _data_url(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
