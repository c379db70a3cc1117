"""Checks that training, validation and test share no slide and no patch, and scores a baseline."""

import hashlib
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histo_jax.data import groups, near_duplicates
from histo_jax.data.example import UNLABELLED
from histo_jax.data.loader import Records, ordered_batches, read_size
from histo_jax.data.record_files import SQUARES, SUMS, pixel_hashes
from histo_jax.data.record_reader import Prepared
from histo_jax.data.splits import Subset, Subsets
from histo_jax.run import progress, signals

# Examples that the report lists of each finding.
EXAMPLES, NEAR_EXAMPLES = 20, 50
# Training patches of the baseline: more do not improve a model of 48 numbers, and cost time.
BASELINE_PATCHES = 20_000
_BINS = 16
# Grey levels (0 to 255). A patch has one colour if no channel has a higher standard deviation than
# `_FLAT`. It is dark or white if all means are beyond these; glass has 224 to 251 in Kaggle's data.
_FLAT, _DARK, _WHITE = 5, 64, 224
_COUNTS = {
    "patches": "patches",
    "without_tumour": "",  # the names of the classes
    "with_tumour": "",
    "unknown_label": "label not known",
    "slides": "slides",
    "patches_per_slide": "patches per slide (minimum, median, maximum)",
    "patients": "patients",
    "duplicates": "duplicates inside the subset",
    "dark": "all dark",
    "white": "all white",
    "blank": "blank, not searched for near-duplicates",
}
_LEAKS = ("identical", "shared_slides", "shared_patients")
_FINDINGS = {
    "identical": "identical patches (leak)",
    "shared_slides": "shared slides (leak)",
    "shared_patients": "shared patients (leak)",
    "near_duplicates": "near-duplicates (warning)",
}


class _Scan(NamedTuple):
    """A subset of n examples with features of its images.

    Attributes:
        records: the examples.
        table: their rows.
        hashes: uint64[n, 8], see `near_duplicates.hash_images`.
        contrast: float32[n], likewise.
        known: which of `groups.UNITS` every example names.
        histograms: int64[k, 48] of red, green and blue, of the k examples that were selected.
    """

    records: Records
    table: pd.DataFrame
    hashes: np.ndarray
    contrast: np.ndarray
    known: list[str]
    histograms: np.ndarray


def audit(prepared: Prepared, subsets: Subsets, seed: int) -> dict[str, Any]:
    """Searches for patches, slides and patients that several subsets share; reads the images once.

    Args:
        prepared: the records.
        subsets: of training, validation and test.
        seed: chooses the training patches of the baseline.

    Returns:
        A dict for JSON:
        `subsets`: the counts of `_describe` for each.
        `pairs`: for each pair of subsets, as 'train/validation': patches that are `identical` to
        the pixel; `shared_slides`, None where none were found and not all slides are known; where
        any patch names its patient, `shared_patients` likewise; the `near_duplicates` of the second
        subset in the first.
        `colour_histogram_baseline`: validation AUC of a logistic regression on colour histograms.
        `slide_disjoint` and, where known, `patient_disjoint`, see `Subsets`; in `note` the caveat.
    """
    named = {"train": subsets.train, "validation": subsets.validation}
    if subsets.test is not None:
        named["test"] = subsets.test
    # The baseline trains on a sample of the training patches and is scored on all of validation.
    with_histogram = {name: np.zeros(len(subset.rows), bool) for name, subset in named.items()}
    rank = np.random.default_rng(seed).permutation(len(subsets.train.rows))
    with_histogram["train"] = rank < BASELINE_PATCHES
    with_histogram["validation"][:] = True
    total = sum(len(subset.rows) for subset in named.values())
    with progress.bar("audit", total, unit=" patches") as bar:
        scans = {
            name: _scan(prepared, subset, with_histogram[name], bar)
            for name, subset in named.items()
        }
    return {
        "subsets": {name: _describe(scan) for name, scan in scans.items()},
        "pairs": {
            f"{first}/{second}": _compare(scans[first], scans[second])
            for first, second in itertools.combinations(scans, 2)
        },
        "colour_histogram_baseline": _baseline(
            scans["train"], with_histogram["train"], scans["validation"]
        ),
        "slide_disjoint": subsets.slide_disjoint,
        **_if_known("patient_disjoint", subsets.patient_disjoint),
        "note": subsets.caveat,
    }


def _if_known(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {name: value}


def has_leak(report: dict[str, Any]) -> bool:
    """Whether two subsets share a patient, a slide or, to the pixel, a patch."""
    return any(
        (pair.get(key) or {"count": 0})["count"]
        for pair in report["pairs"].values()
        for key in _LEAKS
    )


def digest(table: pd.DataFrame) -> str:
    """Returns a SHA-256 of `id` and `label` of patches, to detect that others were audited."""
    pairs = zip(table["id"], table["label"], strict=True)
    return hashlib.sha256(
        "".join(f"{name} {label}\n" for name, label in pairs).encode()
    ).hexdigest()


def table(report: dict[str, Any], classes: tuple[str, str]) -> str:
    """Returns the report as plain text: counts, what subsets share, conclusions.

    Args:
        report: result of `audit`.
        classes: names of label 0 and label 1.
    """
    pairs, baseline = report["pairs"], report["colour_histogram_baseline"]
    counts = _COUNTS | dict(zip(("without_tumour", "with_tumour"), classes, strict=True))
    lines = [_columns(counts, report["subsets"]), "", _columns(_FINDINGS, pairs), ""]
    for unit in ("slides", "patients"):
        if any(pair.get(f"shared_{unit}", ...) is None for pair in pairs.values()):
            lines.append(f"{unit}: not all known, shared ones cannot be found")
    for name, pair in pairs.items():
        for key in _LEAKS:
            if pair.get(key) and pair[key]["count"]:
                lines.append(f"LEAK: {_FINDINGS[key]}, {name}: {', '.join(pair[key]['examples'])}")
        for example in pair["near_duplicates"]["examples"][:3]:
            lines.append(
                f"warning: near-duplicates, {name}: {' and '.join(example['ids'])} "
                f"({example['hamming_distance']} of 64 bits differ, correlation "
                f"{example['correlation']})"
            )
    lines += [
        f"baseline: colour histograms of {baseline['train_patches']:,} training patches alone "
        f"reach validation AUC {baseline['validation_auc']:.3f}",
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

    # Patients are left out where no patch names one.
    labels = {key: text for key, text in labels.items() if all(key in c for c in columns.values())}
    cells = {name: [cell(values[key]) for key in labels] for name, values in columns.items()}
    return pd.DataFrame(cells, index=list(labels.values())).to_string()


def _scan(
    prepared: Prepared, subset: Subset, with_histogram: np.ndarray, bar: progress.Bar
) -> _Scan:
    """Reads the images of a subset once.

    Args:
        prepared: the records.
        subset: of them.
        with_histogram: bool[n], the examples whose colour histogram is needed.
        bar: counts the images.
    """
    records = prepared.records(*subset)
    hashes: list[tuple[np.ndarray, np.ndarray]] = []
    histograms: list[np.ndarray] = []
    size = read_size(prepared.image_size)
    # Red falls into bins 0 to 15, green into 16 to 31, blue into 32 to 47.
    offset = np.arange(0, 3 * _BINS, _BINS, dtype=np.uint8)
    for batch in signals.stopping(ordered_batches(records.source, subset.rows, size)):
        images = batch["image"][batch["mask"]]
        selected = with_histogram[size * len(hashes) :][: len(images)]
        for image in images[selected]:
            bins = image // (256 // _BINS) + offset
            histograms.append(np.bincount(bins.ravel(), minlength=3 * _BINS))
        hashes.append(near_duplicates.hash_images(images))
        bar.update(len(images))
    table = prepared.tables[subset.records]
    rows = table.iloc[subset.rows]
    return _Scan(
        records,
        table=rows,
        hashes=np.concatenate([pair[0] for pair in hashes]),
        contrast=np.concatenate([pair[1] for pair in hashes]),
        known=[
            unit
            for unit in groups.UNITS
            if (groups.names(rows, unit) != "").all() and groups.has_names(table, unit)
        ],
        histograms=np.array(histograms),
    )


def _describe(scan: _Scan) -> dict[str, Any]:
    """Returns counts of a subset, None = not known; `per_slide`: [label 0, label 1]."""
    rows, labels = scan.table, scan.table["label"].to_numpy()
    by_slide = rows[rows["slide"] != ""].groupby("slide")["label"]
    sizes = by_slide.size().to_numpy()
    pixels = rows[["pixels"]].to_numpy(np.float64)
    mean = rows[list(SUMS)].to_numpy(np.float64) / pixels
    variance = rows[list(SQUARES)].to_numpy(np.float64) / pixels - mean**2
    flat = (variance <= _FLAT**2).all(axis=1)
    ids, patients = rows["id"].to_numpy(), groups.names(rows, "patient")
    return {
        "digest": digest(rows),
        "patches": len(rows),
        "without_tumour": int((labels == 0).sum()),
        "with_tumour": int((labels == 1).sum()),
        "unknown_label": int((labels == UNLABELLED).sum()),
        "slides": len(sizes) or None,
        "patches_per_slide": np.quantile(sizes, (0, 0.5, 1)).tolist() if len(sizes) else None,
        **_if_known("patients", patients[patients != ""].nunique() or None),
        "per_slide": {str(k): [int((v == 0).sum()), int((v == 1).sum())] for k, v in by_slide},
        "duplicates": int(pixel_hashes(rows).duplicated().sum()),
        "dark": _listed(ids[flat & (mean <= _DARK).all(axis=1)]),
        "white": _listed(ids[flat & (mean >= _WHITE).all(axis=1)]),
        "blank": int((scan.contrast < near_duplicates.BLANK).sum()),
    }


def _listed(names: Iterable[str]) -> dict[str, Any]:
    names = sorted(names)
    return {"count": len(names), "examples": names[:EXAMPLES]}


def _compare(first: _Scan, second: _Scan) -> dict[str, Any]:
    """Returns what two subsets share, see `audit`; `identical` lists the ids of the first."""
    knows_patients = any(groups.is_named(scan.table, "patient") for scan in (first, second))
    units = ("slide", "patient") if knows_patients else ("slide",)
    is_identical = pixel_hashes(first.table).isin(pixel_hashes(second.table))
    return {
        "identical": _listed(set(first.table["id"][is_identical])),
        **{f"shared_{unit}s": _shared(first, second, unit) for unit in units},
        "near_duplicates": _near_duplicates(first, second),
    }


def _shared(first: _Scan, second: _Scan, unit: str) -> dict[str, Any] | None:
    shared = set(groups.names(first.table, unit)) & set(groups.names(second.table, unit)) - {""}
    is_known = bool(shared) or (unit in first.known and unit in second.known)
    return _listed(shared) if is_known else None


def _near_duplicates(first: _Scan, second: _Scan) -> dict[str, Any]:
    """Returns patches of `second` whose nearest hash in `first` matches and whose pixels correlate.

    Identical patches are counted elsewhere. Hashes alone match by chance where patches have little
    structure: 9 of 2,907 patches of PatchCamelyon match one of 19,171 of other slides.

    Returns:
        `count`; `hash_matches`, the candidates before pixels were compared; `examples`, nearest
        first, with the `ids` of both, the `hamming_distance` in bits and the `correlation`.
    """
    is_new = ~pixel_hashes(second.table).isin(pixel_hashes(first.table)).to_numpy()
    left = np.flatnonzero(first.contrast >= near_duplicates.BLANK)
    right = np.flatnonzero((second.contrast >= near_duplicates.BLANK) & is_new)
    queries, matches, distances = near_duplicates.nearest(
        first.hashes[left, 0], second.hashes[right]
    )
    left, right = left[matches], right[queries]
    correlation = np.zeros(len(queries))
    size = read_size(math.isqrt(first.table["pixels"].iloc[0]))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        pixels = first.records.images(left[part]), second.records.images(right[part])
        correlation[part] = near_duplicates.correlation(*pixels)
    order = np.lexsort((-correlation, distances))
    confirmed = order[correlation[order] >= near_duplicates.MIN_CORRELATION]
    ids = first.table["id"].to_numpy()[left], second.table["id"].to_numpy()[right]
    examples = [
        {
            "ids": [column[k] for column in ids],
            "hamming_distance": int(distances[k]),
            "correlation": round(float(correlation[k]), 3),
        }
        for k in confirmed[:NEAR_EXAMPLES]
    ]
    return {"count": len(confirmed), "hash_matches": len(queries), "examples": examples}


def _baseline(train: _Scan, selected: np.ndarray, validation: _Scan) -> dict[str, Any]:
    """Fits a logistic regression to standardised histograms of `selected`; scores validation."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train.histograms, train.table["label"].to_numpy()[selected])
    scores = model.decision_function(validation.histograms)
    auc = roc_auc_score(validation.table["label"].to_numpy(), scores)
    return {"train_patches": int(selected.sum()), "validation_auc": float(auc)}
