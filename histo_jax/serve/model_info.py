"""What the page says of the networks: classes, patches, operating point and scores."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from histo_jax import ensemble, evaluation_files, exported
from histo_jax.data.source_adapter import class_names
from histo_jax.errors import UserError
from histo_jax.predictor import Predictor
from histo_jax.version import VERSION
from histo_jax.wsi.heatmap import decision_threshold

_SPLITS = ("test", "validation")
_KEYS = (
    "split", "count", "auc", "auc_low", "auc_high", "interval_over", "slide_disjoint",
    "patient_disjoint",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What clients may know of the networks; names of folders, never their paths.

    Attributes:
        name: of the folder, or of the folders of an ensemble.
        negative: name of label 0.
        positive: name of label 1.
        size: height and width of a patch in pixels.
        label_region: width in pixels of the square in the centre that the label describes.
        mpp: micrometres a pixel; None = not known.
        networks: their number.
        is_scaled: whether images of other sizes are cropped and scaled to a patch.
        tta: whether test-time augmentation is used.
        prior: see `Predictor`.
        threshold: at or above it a patch is positive.
        threshold_source: where it comes from.
        scores: of each folder that was evaluated; `name` and some of `evaluation.json`.
        is_synthetic: whether the slides of training are synthetic.
        version: of histo_jax.
    """

    name: str
    negative: str
    positive: str
    size: int
    label_region: int | None
    mpp: float | None
    networks: int
    is_scaled: bool
    tta: bool
    prior: float | None
    threshold: float
    threshold_source: str
    scores: list[dict[str, Any]]
    is_synthetic: bool
    version: str = VERSION


def describe(predictor: Predictor, folders: Sequence[Path]) -> ModelInfo:
    """Returns what clients may know.

    Args:
        predictor: the networks.
        folders: of the runs or exports, as the command names them.
    """
    configs = [trained.config for trained in predictor.trained]
    classes = exported.read_config(folders[0]).get("class_names")
    negative, positive = classes or class_names(configs[0].data)
    threshold, source = 0.5, "default"
    if len(folders) == 1:
        threshold, source = decision_threshold(predictor, None, folders[0])
    patch = predictor.patch
    return ModelInfo(
        name=" + ".join(_name(folder) for folder in folders),
        negative=negative,
        positive=positive,
        size=patch.size,
        label_region=None if patch.label_region == patch.size else patch.label_region,
        mpp=patch.mpp,
        networks=len(predictor.trained),
        is_scaled=all(config.data.image_size is not None for config in configs),
        tta=predictor.tta,
        prior=predictor.prior,
        threshold=threshold,
        threshold_source=source,
        scores=[
            scores
            for number, folder in enumerate(folders)
            if (scores := _scores(predictor, folder, number, len(folders)))
        ],
        is_synthetic=any(
            trained.config.data.source == "synthetic"
            and not exported.is_exported(Path(trained.run))  # which does not record its source
            for trained in predictor.trained
        ),
    )


def _name(folder: Path) -> str:
    return folder.resolve().name or "run"


def _scores(predictor: Predictor, folder: Path, number: int, folders: int) -> dict[str, Any] | None:
    """Returns the scores of a folder, on the test split if it has one; None without any."""
    if exported.is_exported(folder):
        return _card_scores(folder)
    trained = predictor.trained
    if folders > 1:
        # One network a folder: an ensemble among them has more, and its scores are left out.
        trained = trained[number : number + 1] if len(trained) == folders else ()
    for split in _SPLITS:
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            scores = evaluation_files.read_scores(folder, split)
            ensemble.check_evaluated(trained, scores, split)
            if trained:
                return {"name": _name(folder), **{key: scores.get(key) for key in _KEYS}}
    return None


def _card_scores(folder: Path) -> dict[str, Any] | None:
    """Returns the scores in the head of an export's model card; None without any."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
        result = yaml.safe_load(head)["model-index"][0]["results"][0]
        auc = next(metric for metric in result["metrics"] if metric["type"] == "auc")
        low, high = auc.get("args", {}).get("interval_95", (None, None))
        facts = result["dataset"].get("args", {})
        return {
            **{key: facts.get(key) for key in _KEYS},
            "name": _name(folder),
            "split": str(result["dataset"]["split"]),
            "auc": float(auc["value"]),
            "auc_low": low,
            "auc_high": high,
            "interval_over": auc.get("args", {}).get("interval_over"),
        }
    except (OSError, LookupError, TypeError, ValueError, StopIteration, yaml.YAMLError):
        return None
