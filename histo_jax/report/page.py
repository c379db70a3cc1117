"""Renders the page `report.html` from what a run has produced."""

import base64
import dataclasses
import io
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image
from scipy.special import expit

from histo_jax.data.example import PatchSpec
from histo_jax.report import figures, patches, tables

# Scores in the order of the table: name and explanation, with phrases of `_phrases`.
SCORES = {
    "auc": (
        "AUC",
        "Probability that a patch {with_positive} is ranked above one of the other class: 0.5 is "
        "chance, 1 is perfect.",
    ),
    "average_precision": (
        "average precision",
        "Area under the precision-recall curve: {prior:.3f} is chance, 1 is perfect.",
    ),
    "accuracy": (
        "accuracy at threshold 0.5",
        "Fraction of patches that are classified correctly.",
    ),
    "sensitivity_at_95_specificity": (
        "sensitivity at 95% specificity",
        "Fraction of patches {with_positive} that are detected when 95% of the other patches are "
        "classified correctly.",
    ),
    "specificity_at_95_sensitivity": (
        "specificity at 95% sensitivity",
        "Fraction of the other patches that are classified correctly when 95% of the patches "
        "{with_positive} are detected.",
    ),
    "nll": (
        "negative log-likelihood (NLL)",
        "Mean of -log(probability of the true label), natural logarithm; confident mistakes cost "
        "most: 0 is perfect, 0.693 is a probability of 50% for every patch.",
    ),
    "brier": (
        "Brier score",
        "Mean squared difference between probability and label (0 or 1): 0 is perfect, 0.25 is a "
        "probability of 50% for every patch.",
    ),
    "ece": (
        "expected calibration error (ECE)",
        "Mean difference between predicted probability and observed frequency of {positive}, over "
        "15 bins: 0 is perfect.",
    ),
}
# Largest height and width of a patch on the page, pixels.
_LARGEST = 256
# All figures that `render` can draw.
FIGURES = ("learning_curves", "roc", "precision_recall", "calibration", "histogram")


@dataclasses.dataclass(frozen=True)
class Audit:
    """Result of an audit of the evaluated data.

    Attributes:
        text: the audit as plain text.
        has_leak: whether splits share patches or slides.
        knows_slides: whether shared slides could be checked.
        color_auc: validation AUC of the colour-histogram baseline.
        knows_patients: whether shared patients could be checked.
    """

    text: str
    has_leak: bool
    knows_slides: bool
    color_auc: float
    knows_patients: bool = False


@dataclasses.dataclass(frozen=True)
class Training:
    """What the networks were trained on, and with.

    Attributes:
        records: name of the prepared records.
        fingerprint: of the training and validation splits.
        patches: number of training patches.
        slides: number of training slides; 0 = not known.
        parameters: number of parameters of each network; none if checkpoints are missing.
        versions: of the packages, and the devices; None = not known.
    """

    records: str
    fingerprint: str
    patches: int
    slides: int
    parameters: list[int]
    versions: dict[str, str] | None


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that the page shows.

    Attributes:
        workdir: name of the run's folder.
        source: `config.data.source`.
        classes: names of label 0 and label 1.
        patch_spec: size and scale of the patches, and the region that their label describes.
        split: the evaluated split.
        scores: result of `evaluate`.
        table: `id`, `label`, `slide` and calibrated `logit` of each patch.
        has_slides: whether the slides of the patches are known.
        date: of the evaluation.
        history: result of `fit`; None = not available, as for an ensemble.
        galleries: patches by title of the gallery.
        audit: None = there is none of these patches.
        has_other_audit: whether there is an audit of other patches.
        training: what the networks were trained on.
        settings: all settings by dotted name.
        changed_settings: those that differ from the default.
        versions: of the packages that write the page, and the devices.
    """

    workdir: str
    source: str
    classes: tuple[str, str]
    patch_spec: PatchSpec
    split: str
    scores: dict[str, Any]
    table: pd.DataFrame
    has_slides: bool
    date: str
    history: pd.DataFrame | None
    galleries: dict[str, list[patches.Patch]]
    audit: Audit | None
    has_other_audit: bool
    training: Training
    settings: dict[str, Any]
    changed_settings: dict[str, Any]
    versions: dict[str, str]


def render(contents: Contents) -> tuple[str, dict[str, str]]:
    """Returns the page as HTML, and its figures as SVG by name."""
    scores, table = contents.scores, contents.table
    logits, labels = table["logit"].to_numpy(), table["label"].to_numpy(np.float64)
    probabilities = expit(logits)
    svgs = _draw_figures(contents, probabilities, labels)
    color_auc = contents.audit.color_auc if contents.audit else None
    phrases = _phrases(contents.classes)
    epochs: list[Any] = []
    if contents.history is not None:
        epochs = list(contents.history.itertuples(index=False))
    shown = [patch for gallery in contents.galleries.values() for patch in gallery]
    text = _template().render(
        **{field.name: getattr(contents, field.name) for field in dataclasses.fields(contents)},
        score_names={key: name for key, (name, _) in SCORES.items()},
        **phrases,
        meanings={
            key: meaning.format(prior=scores["prior"], **phrases)
            for key, (_, meaning) in SCORES.items()
        },
        color=tables.compare_with_color(contents.split, scores, color_auc),
        color_auc=color_auc,
        figures=svgs,
        epochs=epochs,
        evaluated=next((row for row in epochs if row.step == scores.get("checkpoint_step")), None),
        confident={
            "negatives": float((probabilities[labels == 0] < 0.1).mean()),
            "positives": float((probabilities[labels == 1] >= 0.9).mean()),
        },
        frame=_frame(contents.patch_spec),
        has_attribution=any(patch.attribution is not None for patch in shown),
        misclassified=int(patches.is_wrong(logits, labels).sum()),
        slides=tables.slide_scores(table, probabilities) if contents.has_slides else [],
        counts=tables.predicted_positives(probabilities, labels),
        thresholds=tables.threshold_texts(scores),
        positions=tables.slider_positions(scores),
    )
    return text, svgs


def _draw_figures(
    contents: Contents, probabilities: np.ndarray, labels: np.ndarray
) -> dict[str, str]:
    scores, history = contents.scores, contents.history
    svgs = {
        "roc": figures.roc(contents.table["logit"].to_numpy(), labels, scores),
        "precision_recall": figures.precision_recall(probabilities, labels, scores),
        "calibration": figures.calibration(probabilities, labels, contents.classes),
        "histogram": figures.histogram(probabilities, labels, contents.classes),
    }
    if history is not None and len(history):
        evaluated = history[history["step"] == scores.get("checkpoint_step")]
        svgs["learning_curves"] = figures.learning_curves(history, evaluated)
    return svgs


def _frame(patch: PatchSpec) -> float | None:
    """Returns the margin around the labelled region in percent of the patch; None = no margin."""
    region = patch.label_region
    return None if region in (None, patch.size) else 50 * (1 - region / patch.size)


def _phrases(classes: tuple[str, str]) -> dict[str, str]:
    """Returns the names of the classes as the page's sentences need them."""
    negative, positive = classes
    with_positive = "with tumour" if positive == "tumour" else f"of class {positive}"
    return {"negative": negative, "positive": positive, "with_positive": with_positive}


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


def _data_url(image: np.ndarray) -> str:
    file, picture = io.BytesIO(), Image.fromarray(image)
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BOX)
    picture.save(file, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
