"""`README.md`: a model card for Hugging Face and for people, from what the run's files say."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jinja2
import yaml

from histo_jax import ensemble, evaluation_files
from histo_jax.config import Config
from histo_jax.data import leakage
from histo_jax.errors import UserError
from histo_jax.export import safetensors
from histo_jax.exported import Exported
from histo_jax.predictor import Predictor
from histo_jax.run.saved_config import plain
from histo_jax.version import VERSION

_TEMPLATE = Path(__file__).with_name("model_card.md")
_SPLITS = ("test", "validation")
# Names of scores for people, in the order of the table.
_SCORES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "sensitivity_at_95_specificity": "sensitivity at 95% specificity",
    "specificity_at_95_sensitivity": "specificity at 95% sensitivity",
    "nll": "negative log-likelihood (nats)",
    "brier": "Brier score",
    "accuracy": "accuracy at probability 0.5",
    "ece": "expected calibration error",
}
_POINTS = {
    "threshold_at_95_specificity": "95% specificity",
    "threshold_at_95_sensitivity": "95% sensitivity",
}
# What the head of the card states of the patches of an evaluation.
_FACTS = ("count", "slide_disjoint", "patient_disjoint")
_DATASETS = {"pcam": "patchcamelyon", "kaggle": "histopathologic-cancer-detection"}
_TITLES = {
    "pcam": "PatchCamelyon",
    "kaggle": "Kaggle Histopathologic Cancer Detection",
    "images": "own images",
    "synthetic": "synthetic slides",
}
# What a patch is, where the source says so.
_KINDS = {"pcam": "H&E patch", "kaggle": "H&E patch", "synthetic": "synthetic patch"}
# What Markdown or HTML would take for markup.
_MARKUP = re.compile(r"[\\`*\[\]<>|&#~]")


def render(
    folder: Path,
    config: Config,
    predictor: Predictor,
    contents: Exported,
    data: ensemble.TrainingData | None,
    parity: Mapping[str, Any],
    weights: bytes,
) -> str:
    """Returns the card.

    Args:
        folder: of the run, whose evaluations and audit are read.
        config: settings of the command.
        predictor: the exported networks.
        contents: what the files compute.
        data: what the (first) network was trained on, if known.
        parity: result of `parity.measure`.
        weights: content of `model.safetensors`.
    """
    evaluations = _read_evaluations(folder, predictor)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": _code, "escape": _escape}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        head=_head(folder, config, contents, evaluations),
        name=_name(folder),
        dataset=_title(config),
        kind=_KINDS.get(config.data.source, "image patch"),
        is_synthetic=config.data.source == "synthetic",
        patch=contents.patch,
        class_names=contents.class_names,
        tta=contents.tta,
        prior=contents.prior,
        networks=[_describe_network(each) for each in predictor.trained],
        evaluations=[_describe_evaluation(scores) for scores in evaluations],
        audit=_read_audit(folder, data, contents.class_names),
        data=data and _describe_data(data),
        parity=parity,
        sha256=hashlib.sha256(weights).hexdigest(),
        has_pytorch="safetensors" in parity["formats"] and safetensors.has_pytorch(contents),
        version=VERSION,
    )


def _code(text: Any) -> str:
    """Returns a text as a code span of Markdown, on one line."""
    line = " ".join(str(text).split())
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _escape(text: str) -> str:
    """Returns a text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _head(
    folder: Path, config: Config, contents: Exported, evaluations: list[dict[str, Any]]
) -> str:
    """Returns the head of the card, YAML that Hugging Face reads."""
    architectures = dict.fromkeys(network.config.model.name for network in contents.networks)
    head: dict[str, Any] = {
        "license": config.export.license,
        "library_name": "histo_jax",
        "pipeline_tag": "image-classification",
        "tags": ["histopathology", "pathology", "medical", "jax", *architectures],
        "metrics": ["roc_auc", "accuracy"],
    }
    if config.data.source in _DATASETS:
        head["datasets"] = [_DATASETS[config.data.source]]
    if evaluations:
        results = [_result(scores, config) for scores in evaluations]
        head["model-index"] = [{"name": _name(folder), "results": results}]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=100)


def _result(scores: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Returns an evaluation as an entry of the model index."""
    metrics = []
    for score, name in _SCORES.items():
        metric: dict[str, Any] = {"type": score, "name": name, "value": scores[score]}
        interval = scores[f"{score}_low"], scores[f"{score}_high"]
        if None not in interval:
            metric["args"] = {
                "interval_95": list(interval),
                "interval_over": scores["interval_over"],
            }
        metrics.append(metric)
    return {
        "task": {"type": "image-classification"},
        "dataset": {
            "type": config.data.source,
            "name": _title(config),
            "split": scores["split"],
            "args": {key: scores.get(key) for key in _FACTS},
        },
        "metrics": [metric for metric in metrics if metric["value"] is not None],
    }


def _read_evaluations(folder: Path, predictor: Predictor) -> list[dict[str, Any]]:
    """Returns the scores of the exported networks, test first; not those of other checkpoints."""
    evaluations = []
    for split in _SPLITS:
        try:
            scores = evaluation_files.read_scores(folder, split)
            ensemble.check_evaluated(predictor.trained, scores, split)
        except UserError:
            continue
        evaluations.append(scores)
    return evaluations


def _describe_evaluation(scores: Mapping[str, Any]) -> dict[str, Any]:
    def number(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{value:.4f}"

    return {
        **scores,
        "rows": [
            (
                name,
                number(scores[score]),
                f"{number(scores[f'{score}_low'])} to {number(scores[f'{score}_high'])}",
            )
            for score, name in _SCORES.items()
        ],
        "points": [(name, number(scores[key])) for key, name in _POINTS.items() if key in scores],
    }


def _describe_network(trained: Any) -> dict[str, Any]:
    settings, defaults = plain(trained.config), plain(Config())
    training = ("model.", "augment.", "optimizer.", "fit.", "early_stopping.")
    return {
        "name": trained.config.model.name,
        "step": trained.step,
        "calibration": trained.calibration,
        "mean": [round(float(value), 4) for value in trained.weights.mean],
        "std": [round(float(value), 4) for value in trained.weights.std],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.weights.params)),
        "settings": {
            name: value
            for name, value in settings.items()
            if name == "seed" or (name.startswith(training) and value != defaults[name])
        },
    }


def _describe_data(data: ensemble.TrainingData) -> dict[str, Any]:
    subsets, tables = data.subsets, data.prepared.tables
    train = tables[subsets.train.records].iloc[subsets.train.rows]
    return {
        "train": len(subsets.train.rows),
        "validation": len(subsets.validation.rows),
        "slides": train["slide"][train["slide"] != ""].nunique(),
        "division": subsets.division,
    }


def _read_audit(
    folder: Path, data: ensemble.TrainingData | None, classes: tuple[str, str]
) -> str | None:
    """Returns the audit's text, None where these patches were not audited."""
    try:
        audit = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
        audited = audit["subsets"]
        for name in ("train", "validation"):
            subset = getattr(data.subsets, name)  # type: ignore[union-attr]
            table = data.prepared.tables[subset.records].iloc[subset.rows]  # type: ignore[union-attr]
            if audited[name]["digest"] != leakage.digest(table):
                return None
        names = [" ".join(name.split()) for name in classes]
        return leakage.table(audit, (names[0], names[1]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _name(folder: Path) -> str:
    return folder.absolute().name


def _title(config: Config) -> str:
    return _TITLES.get(config.data.source, config.data.source)
