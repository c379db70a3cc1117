"""Gathers what a run reached and writes the page."""

import base64
import dataclasses
import datetime
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
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

from histo_jax import ensemble, evaluation_files
from histo_jax.config import Config, validate
from histo_jax.data import leakage as audits
from histo_jax.data import splits
from histo_jax.data.records import prepare
from histo_jax.distributed import runtime
from histo_jax.ensemble import TrainedModel
from histo_jax.errors import UserError
from histo_jax.metrics.scores import per_patch_loss
from histo_jax.report import figures, patches
from histo_jax.report import folder as folders
from histo_jax.report.patches import gather
from histo_jax.run import files
from histo_jax.run import workdir as workdirs

log = logging.getLogger("histo_jax")

# Of the slider, from 0 to 100%.
_POSITIONS = 1000
# What the table of scores shows, in this order.
_SCORES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy at probability 0.5",
    "sensitivity_at_95_specificity": "sensitivity at 95% specificity",
    "specificity_at_95_sensitivity": "specificity at 95% sensitivity",
    "nll": "negative log-likelihood (NLL)",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
}
# Each in a line, for readers who do not compute them; `%s` is the share of tumour.
_MEANINGS = {
    "auc": "How often a patch with tumour gets a higher probability than one without: 0.5 is "
    "guessing, 1 is perfect.",
    "average_precision": "Share of those called tumour that have it (precision), mean over all "
    "sensitivities: %s is guessing, 1 is perfect.",
    "accuracy": "Share of patches that are classified correctly.",
    "sensitivity_at_95_specificity": "Share of patches with tumour that are found where 95% of "
    "those without are cleared.",
    "specificity_at_95_sensitivity": "Share of patches without tumour that are cleared where 95% "
    "of those with it are found.",
    "nll": "Penalty for probabilities that are far from the truth, most of all for sure mistakes "
    "(natural logarithm): 0 is perfect, 0.693 is saying 50% of every patch.",
    "brier": "Mean squared distance between probability and truth (0 or 1): 0 is perfect, 0.25 is "
    "saying 50% of every patch.",
    "ece": "Mean distance between the predicted probability and how often there was tumour: 0 is "
    "perfect.",
}
# All figures that `render` can draw; those of an earlier page that it does not draw are removed.
_FIGURES = ("learning_curves", "roc", "precision_recall", "calibration", "histogram")
_OF_EVALUATION = ("evaluate.", "predict.")


@runtime.session
def report(config: Config, workdir: str | os.PathLike[str]) -> Path:
    """Writes `report.html`, one page without any other file, and its figures into `report/`.

    Shows what `evaluate` has last written for `config.evaluate.split`, and what spoke for tumour
    to the networks that it judged.

    Returns:
        The page.

    Raises:
        UserError: nothing was evaluated there, or another checkpoint than would be used now.
        OSError: a file cannot be written.
    """
    validate(config)
    runtime.set_up()
    folder = files.expand(workdir, "--workdir")
    workdirs.check_compatible(folder, config)
    split = config.evaluate.split
    table = evaluation_files.read(folder, split)
    scores = evaluation_files.read_scores(folder, split)
    with workdirs.session(folder, "report"):
        prepared = prepare(config, folder, raw_may_be_gone=True)
        subsets = evaluation_files.make_subsets(prepared, config, scores)
        subset = evaluation_files.subset(prepared, subsets, split, table)
        evaluation_files.check_scores(folder, split, table, scores)
        trained = _judged(config, folder, scores)
        ensemble.check_evaluated(trained, scores, split)
        chosen = patches.galleries(table, config.seed)
        # All at once: the networks are compiled for them only one time.
        rows = np.concatenate(list(chosen.values()))
        logits = table["logit"].to_numpy()[rows]
        owners = patches.owners(trained, config, prepared, scores, subset.rows[rows])
        found = iter(gather(prepared, subset.records, subset.rows[rows], trained, logits, owners))
        galleries = {
            title: list(itertools.islice(found, len(places))) for title, places in chosen.items()
        }
        # Several runs have no history in common.
        history = None if "members" in scores else folder / "history.csv"
        seen = prepared.tables[subsets.train.records].iloc[subsets.train.rows]
        validation = prepared.tables[subsets.validation.records].iloc[subsets.validation.rows]
        found_audit = _read(folder / "audit.json")
        audited = found_audit if _is_audit_of(found_audit, seen, validation) else None
        # Those of training are as `fit` has saved them; those of evaluation as it was done.
        settings = workdirs.plain(config)
        saved = _read(folder / "config.json") or settings
        settings |= {
            k: v for k, v in saved.items() if k in settings and not k.startswith(_OF_EVALUATION)
        }
        settings["predict.tta"] = scores.get("tta", settings["predict.tta"])
        settings["predict.checkpoints"] = _runs(scores)
        text, drawn = render(
            workdir=folder.absolute().name,
            source=config.data.source,
            split=split,
            scores=scores,
            history=pd.read_csv(history) if history and history.exists() else None,
            table=table,
            galleries=galleries,
            settings=settings,
            records=f"{prepared.directory.parent.name} {prepared.directory.name}",
            fingerprint=splits.fingerprint(prepared.tables, subsets, config)[:16],
            trained_on={
                "patches": len(seen),
                "slides": seen["slide"][seen["slide"] != ""].nunique(),
            },
            parameters=[_count_parameters(member) for member in trained],
            trained_with=workdirs.status(folder).get("trained_with"),
            # Its note on honesty stands in the page already.
            audit=audits.table(audited | {"note": ""}) if audited else None,
            leak=bool(audited and audits.has_leak(audited)),
            audit_knows_slides=bool(
                audited and all(pair["shared_slides"] for pair in audited["pairs"].values())
            ),
            # An audit is of one division into training and validation, and here are several.
            is_audit_of_others=bool(found_audit and not audited and not scores.get("out_of_fold")),
            color_auc=audited["control"]["validation_auc"] if audited else None,
            date=_date(folder / f"evaluation_{split}.json"),
        )
        if workdirs.is_primary():
            svgs = {f"{name}.svg": svg.encode() for name, svg in drawn.items()}
            folders.update(folder / "report", svgs, {f"{name}.svg" for name in _FIGURES})
        workdirs.write_text(folder / "report.html", text)
    log.info("report in %s", folder / "report.html")
    return folder / "report.html"


def _runs(scores: dict[str, Any]) -> str:
    return ",".join(member["run"] for member in scores.get("members", []))


def _judged(config: Config, folder: Path, scores: dict[str, Any]) -> list[TrainedModel]:
    """The networks that these scores are of; none where they are gone."""
    predict = dataclasses.replace(config.predict, checkpoints=_runs(scores))
    place = SingleDeviceSharding(jax.local_devices()[0])
    try:
        return ensemble.restore(dataclasses.replace(config, predict=predict), folder, place)
    except UserError as error:
        log.warning("the report does not show where the network looked: %s", error)
        return []


def _count_parameters(member: TrainedModel) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(member.weights.params))


def _is_audit_of(
    audit: dict[str, Any] | None, train: pd.DataFrame, validation: pd.DataFrame
) -> bool:
    """Whether these patches were audited; audits of 0.1.0 do not tell."""
    tables = {"train": train, "validation": validation}
    audited = audit.get("sides", {}) if audit else {}
    return all(
        audited.get(name, {}).get("digest") == audits.digest(table)
        for name, table in tables.items()
    )


def _date(path: Path) -> str:
    """Returns the day that a file was written, in UTC: with today's the page would change."""
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date().isoformat()


def render(
    *,
    scores: dict[str, Any],
    history: pd.DataFrame | None,
    table: pd.DataFrame,
    galleries: dict[str, list[patches.Patch]],
    settings: dict[str, Any],
    color_auc: float | None = None,
    is_audit_of_others: bool = False,
    date: str = "",
    **facts: Any,
) -> tuple[str, dict[str, str]]:
    """Returns the page, and its figures as SVG by name.

    Args:
        scores: what `evaluate` has returned.
        history: what `fit` has returned; None = not known.
        table: what `evaluation_files.read` returns.
        galleries: patches by title.
        settings: by dotted name, as JSON gives them.
        color_auc: what colour histograms alone reach on the validation patches; None = not known.
        is_audit_of_others: whether there is an audit that is not of these patches.
        date: of the evaluation.
        facts: the other words of `page.html`.
    """
    logits, labels = table["logit"].to_numpy(), table["label"].to_numpy(np.float64)
    probabilities = expit(logits)
    prior = f"{scores['prior']:.3f}"
    drawn = {
        "roc": figures.roc(logits, labels, scores),
        "precision_recall": figures.precision_recall(probabilities, labels, scores),
        "calibration": figures.calibration(probabilities, labels),
        "histogram": figures.histogram(probabilities, labels),
    }
    said = {
        "low": float((probabilities[labels == 0] < 0.1).mean()),
        "high": float((probabilities[labels == 1] >= 0.9).mean()),
    }
    epochs: list[Any] = [] if history is None else list(history.itertuples(index=False))
    if history is not None and epochs:
        used = history[history["step"] == scores.get("checkpoint_step")]
        drawn["learning_curves"] = figures.learning_curves(history, used)
    text = _template().render(
        scores=scores,
        score_names=_SCORES,
        meanings=_MEANINGS | {"average_precision": _MEANINGS["average_precision"] % prior},
        color=_against_color(facts["split"], scores, color_auc),
        color_auc=color_auc,
        is_audit_of_others=is_audit_of_others,
        date=date,
        figures=drawn,
        epochs=epochs,
        used=next((row for row in epochs if row.step == scores.get("checkpoint_step")), None),
        said=said,
        galleries=galleries,
        is_explained=any(p.saliency is not None for shown in galleries.values() for p in shown),
        wrong=int(patches.is_wrong(logits, labels).sum()),
        slides=_slides(table, probabilities),
        counts=_counts(probabilities, labels),
        thresholds=_thresholds(scores),
        positions=_positions(scores),
        versions=runtime.versions(),
        settings=settings,
        changed=_changed(settings),
        **facts,
    )
    return text, drawn


def _against_color(split: str, scores: dict[str, Any], color_auc: float | None) -> str | None:
    """Returns how the network does against colour histograms: better, worse, or 'unproven'."""
    if color_auc is None or split != "validation":
        return None
    if color_auc >= scores["auc"]:
        return "worse"
    is_proven = scores["auc_low"] is not None and scores["auc_low"] > color_auc
    return "better" if is_proven else "unproven"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("histo_jax.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = _data_url
    environment.filters["commas"] = "{:,}".format
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


def _slides(table: pd.DataFrame, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """One row a slide, the worst first; none where slides are not known."""
    if evaluation_files.slides(table) is None:
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
    """How many patches of each class are called tumour from each tenth of a percent on."""
    return {
        name: [int((chosen >= position / _POSITIONS).sum()) for position in range(_POSITIONS + 1)]
        for name, chosen in (
            ("positives", probabilities[labels == 1]),
            ("negatives", probabilities[labels == 0]),
        )
    }


def _operating_points(scores: dict[str, Any]) -> Iterator[tuple[str, float, Callable[..., Any]]]:
    """Yields each one's name, its probability, and how to round that so that its 95% hold."""
    for name, rounding in (("specificity", np.ceil), ("sensitivity", np.floor)):
        probability = scores.get(f"probability_at_95_{name}")
        if probability is not None:
            yield name, probability, rounding


def _thresholds(scores: dict[str, Any]) -> dict[str, str]:
    """The probability of each score's operating point, with three digits next to 0 and to 1."""
    said = {}
    for name, probability, rounding in _operating_points(scores):
        digits = 2 - int(np.floor(np.log10(max(min(probability, 1 - probability), 1e-12))))
        other = "sensitivity" if name == "specificity" else "specificity"
        rounded = rounding(probability * 10**digits) / 10**digits
        said[f"{other}_at_95_{name}"] = f"{rounded:.{digits}f}"
    return said


def _positions(scores: dict[str, Any]) -> dict[str, int]:
    """Where the slider stands for each operating point; not where it would call all or none."""
    at = {
        f"95% {name}": int(rounding(_POSITIONS * probability))
        for name, probability, rounding in _operating_points(scores)
    }
    return {name: position for name, position in at.items() if 0 < position < _POSITIONS}


def _data_url(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
