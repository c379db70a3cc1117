"""Proof that training, validation and test share nothing, and what colour alone can tell."""

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histo_jax.data import near_duplicates
from histo_jax.data.example import IMAGE_SIZE, UNLABELLED
from histo_jax.data.loader import Records, ordered_batches
from histo_jax.data.records import SQUARES, SUMS, Prepared
from histo_jax.data.splits import Subset, Subsets, caveat, has_slide_names
from histo_jax.run import progress, signals

# Examples that the report lists of each finding.
EXAMPLES, NEAR_EXAMPLES = 20, 50
# Training patches of the control: more do not help 48 numbers, and cost time.
CONTROL_PATCHES = 20_000
_BINS = 16
# A patch of one colour: no channel deviates by more than this, grey levels (0 to 255). It is dark
# or white if all means are beyond these: empty glass has 224 to 251 in Kaggle's patches.
_FLAT, _DARK, _WHITE = 5, 64, 224
_BATCH = 256
_COUNTS = {
    "patches": "patches",
    "without_tumour": "without tumour",
    "with_tumour": "with tumour",
    "unknown_label": "label not known",
    "slides": "slides",
    "patches_per_slide": "patches a slide (least, median, most)",
    "repeated": "repeats inside the side",
    "dark": "all dark",
    "white": "all white",
    "blank": "blank, not searched for near ones",
}
_FINDINGS = {
    "identical": "identical patches (leak)",
    "shared_slides": "shared slides (leak)",
    "near": "nearly identical patches (warning)",
}


class _Part(NamedTuple):
    """One side and what was seen of its n images; see `near_duplicates.hash_images`."""

    records: Records
    table: pd.DataFrame
    hashes: np.ndarray
    contrast: np.ndarray
    knows_slides: bool
    histograms: np.ndarray  # int64[k, 48]: red, green and blue of the k rows that were wanted


def audit(prepared: Prepared, subsets: Subsets, seed: int) -> dict[str, Any]:
    """Looks for patches and slides that are on two sides, reading the images once.

    Args:
        prepared: the records.
        subsets: who trains, validates and tests.
        seed: chooses the training patches of the control.

    Returns:
        What JSON can hold. `subsets`: the counts of `_describe` for each. `pairs`: per pair of
        subsets, as 'train/validation', patches that are `identical` by id, the SHA-1 of the
        pixels; the `shared_slides`, None where none is found and not all are known; patches of
        the second
        that are `near` to one of the first. `control`: validation AUC of a logistic regression on
        colour histograms. `honest`, see `Subsets`, and in `note` why the validation score is not.
    """
    named = {"train": subsets.train, "validation": subsets.validation}
    if subsets.test is not None:
        named["test"] = subsets.test
    # Whose colours are counted: a sample of those that train, and all that validate.
    wanted = {name: np.zeros(len(subset.rows), bool) for name, subset in named.items()}
    rank = np.random.default_rng(seed).permutation(len(subsets.train.rows))
    wanted["train"] = rank < CONTROL_PATCHES
    wanted["validation"][:] = True
    total = sum(len(subset.rows) for subset in named.values())
    with progress.bar("audit", total, unit=" patches") as bar:
        parts = {name: _look(prepared, subset, wanted[name], bar) for name, subset in named.items()}
    return {
        "sides": {name: _describe(part) for name, part in parts.items()},
        "pairs": {
            f"{first}/{second}": _compare(parts[first], parts[second])
            for first, second in itertools.combinations(parts, 2)
        },
        "control": _control(parts["train"], wanted["train"], parts["validation"]),
        "slide_disjoint": subsets.slide_disjoint,
        "note": caveat(subsets.slide_disjoint),
    }


def has_leak(report: dict[str, Any]) -> bool:
    """Whether two sides share a slide or, to the pixel, a patch."""
    return any(
        pair["identical"]["count"] or (pair["shared_slides"] or {"count": 0})["count"]
        for pair in report["pairs"].values()
    )


def digest(table: pd.DataFrame) -> str:
    """Returns a SHA-256 of `id` and `label` of patches: tells whether others were audited."""
    pairs = zip(table["id"], table["label"], strict=True)
    return hashlib.sha256(
        "".join(f"{name} {label}\n" for name, label in pairs).encode()
    ).hexdigest()


def table(report: dict[str, Any]) -> str:
    """Returns the report as plain text for people: counts, what two sides share, conclusions."""
    pairs, control = report["pairs"], report["control"]
    lines = [_columns(_COUNTS, report["sides"]), "", _columns(_FINDINGS, pairs), ""]
    if any(pair["shared_slides"] is None for pair in pairs.values()):
        lines.append("slides: not known, cannot be checked")
    for name, pair in pairs.items():
        for key in ("identical", "shared_slides"):
            if pair[key] and pair[key]["count"]:
                lines.append(f"LEAK: {_FINDINGS[key]}, {name}: {', '.join(pair[key]['examples'])}")
        for found in pair["near"]["examples"][:3]:
            lines.append(
                f"warning: nearly identical, {name}: {' and '.join(found['ids'])} "
                f"({found['bits']} of 64 bits differ, correlation {found['correlation']})"
            )
    lines += [
        f"control: colour histograms of {control['train_patches']:,} training patches alone reach "
        f"validation AUC {control['validation_auc']:.3f}",
        *filter(None, [report["note"]]),
        "LEAK FOUND" if has_leak(report) else "no leak found",
    ]
    return "\n".join(lines)


def _columns(labels: dict[str, str], columns: dict[str, dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(f"{number:g}" for number in value)
        count = value["count"] if isinstance(value, dict) else value
        return "not known" if count is None else f"{count:,}"

    cells = {name: [cell(values[key]) for key in labels] for name, values in columns.items()}
    return pd.DataFrame(cells, index=list(labels.values())).to_string()


def _look(prepared: Prepared, subset: Subset, wanted: np.ndarray, bar: progress.Bar) -> _Part:
    """Reads a side's images once; counts the colours of the rows in bool[n] `wanted`."""
    records = prepared.records(*subset)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    histograms = []
    # Red falls into bins 0 to 15, green into 16 to 31, blue into 32 to 47.
    shift = np.arange(0, 3 * _BINS, _BINS, dtype=np.uint8)
    for batch in signals.stopping(ordered_batches(records.source, subset.rows, _BATCH)):
        images = batch["image"][batch["mask"]]
        for image in images[wanted[_BATCH * len(seen) :][: len(images)]]:
            bins = image // (256 // _BINS) + shift
            histograms.append(np.bincount(bins.ravel(), minlength=3 * _BINS))
        seen.append(near_duplicates.hash_images(images))
        bar.update(len(images))
    hashes, contrast = (np.concatenate(values) for values in zip(*seen, strict=True))
    rows = prepared.tables[subset.records].iloc[subset.rows]
    knows_slides = bool((rows["slide"] != "").all()) and has_slide_names(
        prepared.tables[subset.records]
    )
    return _Part(records, rows, hashes, contrast, knows_slides, np.array(histograms))


def _describe(part: _Part) -> dict[str, Any]:
    """Counts one side, as `_COUNTS` says; None = not known. `per_slide`: [without, with tumour]."""
    rows, labels = part.table, part.table["label"].to_numpy()
    known = rows[rows["slide"] != ""].groupby("slide")["label"]
    sizes = known.size().to_numpy()
    mean = rows[list(SUMS)].to_numpy(np.float64) / IMAGE_SIZE**2
    variance = rows[list(SQUARES)].to_numpy(np.float64) / IMAGE_SIZE**2 - mean**2
    flat = (variance <= _FLAT**2).all(axis=1)
    ids = rows["id"].to_numpy()
    return {
        "digest": digest(rows),
        "patches": len(rows),
        "without_tumour": int((labels == 0).sum()),
        "with_tumour": int((labels == 1).sum()),
        "unknown_label": int((labels == UNLABELLED).sum()),
        "slides": len(sizes) or None,
        "patches_per_slide": np.quantile(sizes, (0, 0.5, 1)).tolist() if len(sizes) else None,
        "per_slide": {str(k): [int((v == 0).sum()), int((v == 1).sum())] for k, v in known},
        "repeated": int(rows["id"].duplicated().sum()),
        "dark": _found(ids[flat & (mean <= _DARK).all(axis=1)]),
        "white": _found(ids[flat & (mean >= _WHITE).all(axis=1)]),
        "blank": int((part.contrast < near_duplicates.BLANK).sum()),
    }


def _found(names: Iterable[str]) -> dict[str, Any]:
    names = sorted(names)
    return {"count": len(names), "examples": names[:EXAMPLES]}


def _compare(first: _Part, second: _Part) -> dict[str, Any]:
    shared = (set(first.table["slide"]) & set(second.table["slide"])) - {""}
    is_known = bool(shared) or (first.knows_slides and second.knows_slides)
    return {
        "identical": _found(set(first.table["id"]) & set(second.table["id"])),
        "shared_slides": _found(shared) if is_known else None,
        "near": _near(first, second),
    }


def _near(first: _Part, second: _Part) -> dict[str, Any]:
    """Patches of `second` whose nearest hash in `first` matches, and whose pixels correlate.

    Identical patches are counted elsewhere. Hashes alone match by chance where little is to be
    seen: 9 of 2,907 patches of PatchCamelyon match one of 19,171 of other slides.

    Returns:
        `count`; `hash_matches`, which the pixels had to confirm; `examples`, nearest first, with
        the `ids` of both, the `bits` that differ and the `correlation`.
    """
    new = ~second.table["id"].isin(first.table["id"]).to_numpy()
    left = np.flatnonzero(first.contrast >= near_duplicates.BLANK)
    right = np.flatnonzero((second.contrast >= near_duplicates.BLANK) & new)
    asked, known, bits = near_duplicates.nearest(first.hashes[left, 0], second.hashes[right])
    left, right = left[known], right[asked]
    alike = np.zeros(len(asked))
    for start in range(0, len(asked), _BATCH):
        part = slice(start, start + _BATCH)
        pixels = first.records.images(left[part]), second.records.images(right[part])
        alike[part] = near_duplicates.correlation(*pixels)
    same = [k for k in np.lexsort((-alike, bits)) if alike[k] >= near_duplicates.SAME]
    ids = first.table["id"].to_numpy()[left], second.table["id"].to_numpy()[right]
    examples = [
        {"ids": [i[k] for i in ids], "bits": int(bits[k]), "correlation": round(float(alike[k]), 3)}
        for k in same[:NEAR_EXAMPLES]
    ]
    return {"count": len(same), "hash_matches": len(alike), "examples": examples}


def _control(train: _Part, chosen: np.ndarray, validation: _Part) -> dict[str, Any]:
    """Trains a logistic regression on standardised histograms of `chosen`; scores validation."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train.histograms, train.table["label"].to_numpy()[chosen])
    scores = model.decision_function(validation.histograms)
    auc = roc_auc_score(validation.table["label"].to_numpy(), scores)
    return {"train_patches": int(chosen.sum()), "validation_auc": float(auc)}
