import functools
import hashlib
import io
import json
import os
import re
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

import histo_jax
from histo_jax.config import Config
from histo_jax.data import leakage
from histo_jax.data.overlap import OPTIMISTIC
from histo_jax.data.record_files import SQUARES, SUMS
from histo_jax.data.record_reader import Prepared
from histo_jax.data.splits import Subset, Subsets, make_subsets
from histo_jax.run import signals

CLASSES = ("no tumour", "tumour")


class Records:
    """Images in memory, which count how often they are read."""

    def __init__(self, table: pd.DataFrame, images: np.ndarray) -> None:
        self.table, self.images = table, images
        self.reads = np.zeros(len(images), int)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        np.add.at(self.reads, list(rows), 1)
        return [{"image": self.images[k], "label": self.table["label"].iloc[k]} for k in rows]


class Memory(Prepared):
    """Prepared records that never were on disk."""

    def __init__(self) -> None:
        self.tables, self.sources, self.image_size = {}, {}, 96

    def add(self, split: str, images: np.ndarray, labels: Any = None, slides: Any = "") -> None:
        labels = np.arange(len(images)) % 2 if labels is None else labels
        pixels = images.reshape(len(images), -1, 3).astype(np.int64)
        table = pd.DataFrame({"id": [sha1(image) for image in images]})
        table["label"], table["slide"] = labels, slides
        table[list(SUMS)], table[list(SQUARES)] = pixels.sum(1), (pixels**2).sum(1)
        table["pixels"] = 96**2
        self.tables[split], self.sources[split] = table, Records(table, images)

    def source(self, split: str) -> Records:
        return self.sources[split]

    def subsets(self, by: str = "image") -> Subsets:
        """Official splits: all of 'train', 'validation' and, where there is one, 'test'."""
        subset = {name: Subset(name, np.arange(len(table))) for name, table in self.tables.items()}
        return Subsets(subset["train"], subset["validation"], subset.get("test"), by, by == "slide")


def sha1(image: np.ndarray) -> str:
    return hashlib.sha1(image.tobytes()).hexdigest()


def draw_textures(count: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((count, 96, 96, 3))
    noise = gaussian_filter(noise, (0, 3, 3, 0))
    return np.clip(150 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)


def recompress(image: np.ndarray, quality: int = 90) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


@pytest.fixture
def clean() -> Memory:
    """Three subsets that share nothing; each row names its slide."""
    memory = Memory()
    for split, textures in clean_textures().items():
        slides = [f"{split}-{k // 5}" for k in range(len(textures))]
        memory.add(split, textures.copy(), slides=slides)
    return memory


@functools.cache
def clean_textures() -> dict[str, np.ndarray]:
    counts = {"train": 60, "validation": 20, "test": 12}
    return {split: draw_textures(count, k) for k, (split, count) in enumerate(counts.items())}


def counts(report: dict[str, Any], key: str) -> list[int]:
    return [pair[key]["count"] for pair in report["pairs"].values()]


def test_disjoint_subsets_pass(clean, capsys):
    report = leakage.audit(clean, clean.subsets("slide"), seed=0)
    assert list(report["pairs"]) == ["train/validation", "train/test", "validation/test"]
    for key in ("identical", "shared_slides", "near_duplicates"):
        assert counts(report, key) == [0, 0, 0]
    assert not leakage.has_leak(report)
    assert report["slide_disjoint"]
    assert report["note"] == ""
    subset = report["subsets"]["train"]
    assert (subset["patches"], subset["without_tumour"], subset["with_tumour"]) == (60, 30, 30)
    assert (subset["slides"], subset["patches_per_slide"]) == (12, [5, 5.0, 5])
    assert subset["per_slide"]["train-0"] == [3, 2]
    assert (subset["duplicates"], subset["dark"]["count"], subset["white"]["count"]) == (0, 0, 0)
    text = leakage.table(report, CLASSES)
    assert "no leak found" in text
    assert "LEAK" not in text
    named = leakage.table(report, ("not lesion", "lesion"))
    assert re.search("^not lesion +30", named, re.MULTILINE)
    assert "tumour" not in named
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    # Every image is read once, and the progress bar keeps quiet off a terminal.
    assert all((records.reads == 1).all() for records in clean.sources.values())
    assert capsys.readouterr().err == ""


def test_shared_patients_are_a_leak(clean):
    for split, table in clean.tables.items():
        assert "patients" not in leakage.audit(clean, clean.subsets("slide"), 0)["subsets"][split]
        clean.tables[split] = table.assign(patient="p" + table["slide"])
    report = leakage.audit(clean, clean.subsets("slide"), seed=0)
    assert counts(report, "shared_patients") == [0, 0, 0]
    assert report["subsets"]["train"]["patients"] == 12
    assert not leakage.has_leak(report)
    clean.tables["test"].loc[:4, "patient"] = "ptrain-3"
    report = leakage.audit(clean, clean.subsets("slide"), seed=0)
    assert counts(report, "shared_patients") == [0, 1, 0]
    assert leakage.has_leak(report)
    assert "LEAK: shared patients (leak), train/test: ptrain-3" in leakage.table(report, CLASSES)
    clean.tables["test"].loc[:4, "patient"] = ""
    report = leakage.audit(clean, clean.subsets("slide"), seed=0)
    assert report["pairs"]["train/test"]["shared_patients"] is None
    assert "patients: not all known" in leakage.table(report, CLASSES)


def test_an_identical_patch_is_a_leak(clean):
    images = clean.sources["train"].images
    clean.sources["test"].images[3] = images[41]
    clean.add("test", clean.sources["test"].images)
    report = leakage.audit(clean, clean.subsets(), seed=0)
    assert counts(report, "identical") == [0, 1, 0]
    assert report["pairs"]["train/test"]["identical"]["examples"] == [sha1(images[41])]
    # It is not reported as a near-duplicate, too.
    assert counts(report, "near_duplicates") == [0, 0, 0]
    assert leakage.has_leak(report)
    text = leakage.table(report, CLASSES)
    assert "LEAK FOUND" in text
    assert sha1(images[41]) in text


@pytest.mark.parametrize("quality", [90, 75])
@pytest.mark.parametrize(("rotations", "flip"), [(0, False), (1, False), (3, True), (2, True)])
def test_a_rotated_and_recompressed_copy_is_a_near_duplicate(clean, rotations, flip, quality):
    original = clean.sources["train"].images[17]
    copy = np.rot90(original.transpose(1, 0, 2) if flip else original, rotations)
    images = clean.sources["validation"].images
    images[8] = recompress(copy, quality)
    clean.add("validation", images)
    report = leakage.audit(clean, clean.subsets(), seed=0)
    assert counts(report, "near_duplicates") == [1, 0, 0]
    (found,) = report["pairs"]["train/validation"]["near_duplicates"]["examples"]
    assert found["ids"] == [sha1(original), sha1(images[8])]
    assert found["hamming_distance"] <= 4
    assert 0.9 < found["correlation"] <= 1
    assert counts(report, "identical") == [0, 0, 0]
    assert not leakage.has_leak(report)
    assert sha1(images[8]) in leakage.table(report, CLASSES)


def test_hashes_that_match_by_chance_are_not_near_duplicates(clean):
    """The lowest frequencies alike, the rest not: an edge of tissue, as PatchCamelyon has some."""
    rng = np.random.default_rng(5)
    slope = gaussian_filter(rng.standard_normal((96, 96)), 12)
    slope *= 12 / slope.std()
    for split in ("train", "validation"):
        fine = np.kron(rng.choice([-40, 40], (48, 48)), [[1, -1], [-1, 1]])
        images = clean.sources[split].images
        images[0] = (150 + slope + fine)[..., None].astype(np.uint8)
        clean.add(split, images)
    pair = leakage.audit(clean, clean.subsets(), seed=0)["pairs"]["train/validation"]
    near = pair["near_duplicates"]
    assert (near["hash_matches"], near["count"]) == (1, 0)


def test_blank_patches_are_left_out(clean):
    faint = 240 + gaussian_filter(np.random.default_rng(6).standard_normal((96, 96, 3)), (9, 9, 0))
    images = {split: clean.sources[split].images for split in ("train", "validation")}
    for offset, split in enumerate(images):
        images[split][0] = np.round(8 * (faint - 240) + 220 + 9 * offset)
        clean.add(split, images[split])
    report = leakage.audit(clean, clean.subsets(), seed=0)
    assert report["pairs"]["train/validation"]["near_duplicates"]["hash_matches"] == 0
    assert [subset["blank"] for subset in report["subsets"].values()] == [1, 1, 0]
    # The same picture with more contrast is found, so that it is the contrast that decides.
    for offset, split in enumerate(images):
        images[split][0] = np.round(200 * (faint - 240) + 120 + 9 * offset)
        clean.add(split, images[split])
    assert counts(leakage.audit(clean, clean.subsets(), seed=0), "near_duplicates") == [1, 0, 0]


def test_a_shared_slide_is_a_leak(clean):
    clean.tables["validation"].loc[[4, 7], "slide"] = "train-3"
    report = leakage.audit(clean, clean.subsets("slide"), seed=0)
    assert counts(report, "shared_slides") == [1, 0, 0]
    assert leakage.has_leak(report)
    text = leakage.table(report, CLASSES)
    assert "LEAK FOUND" in text
    assert "train-3" in text


def test_unknown_slides_are_not_shared_and_reported_as_unknown(clean):
    for split in ("train", "test"):
        clean.tables[split]["slide"] = ""
    clean.tables["validation"].loc[:3, "slide"] = ""
    report = leakage.audit(clean, clean.subsets(), seed=0)
    assert [pair["shared_slides"] for pair in report["pairs"].values()] == [None] * 3
    assert report["subsets"]["train"]["slides"] is None
    assert report["subsets"]["validation"]["slides"] == 4
    assert not leakage.has_leak(report)
    text = leakage.table(report, CLASSES)
    assert "slides: not all known" in text
    assert OPTIMISTIC in text
    assert report["note"] == OPTIMISTIC
    # Unknown slides beside known ones in both subsets are not a shared slide.
    clean.tables["train"].loc[5:, "slide"] = "a"
    pair = leakage.audit(clean, clean.subsets(), seed=0)["pairs"]["train/validation"]
    assert pair["shared_slides"] is None  # nor proof that there is none


def test_duplicates_inside_a_subset_are_no_leak(clean):
    images = clean.sources["train"].images
    images[5] = images[6] = images[7]
    clean.add("train", images)
    report = leakage.audit(clean, clean.subsets(), seed=0)
    assert report["subsets"]["train"]["duplicates"] == 2
    assert not leakage.has_leak(report)


def test_flat_patches_are_named(clean):
    images = clean.sources["test"].images
    images[2], images[9], images[10] = 246, 33, 128
    # A white edge beside tissue is no white patch, not even where one channel alone shows it.
    images[4], images[5] = 255, 255
    images[4, :20] = 150
    images[5, :20, :, 1] = 150
    clean.add("test", images, labels=-1)
    report = leakage.audit(clean, clean.subsets(), seed=0)
    subset = report["subsets"]["test"]
    assert subset["white"] == {"count": 1, "examples": [sha1(images[2])]}
    assert subset["dark"] == {"count": 1, "examples": [sha1(images[9])]}
    assert (subset["unknown_label"], subset["with_tumour"], subset["blank"]) == (12, 0, 3)


def test_rows_of_subsets_are_audited_not_whole_records(clean):
    """Two subsets of the same records, over several batches."""
    images = draw_textures(300, seed=7)
    images[260] = recompress(images[40], 60)
    images[299] = recompress(np.rot90(images[31]), 95)
    clean.add("train", images)
    inside = np.isin(np.arange(300), [0, 100, 260, 280, 299])
    train, validation = (Subset("train", np.flatnonzero(mask)) for mask in (~inside, inside))
    report = leakage.audit(clean, Subsets(train, validation, None, "image", False), seed=0)
    assert list(report["pairs"]) == ["train/validation"]
    assert [subset["patches"] for subset in report["subsets"].values()] == [295, 5]
    near = report["pairs"]["train/validation"]["near_duplicates"]
    # The nearest comes first.
    ids = [found["ids"] for found in near["examples"]]
    assert ids == [[sha1(images[31]), sha1(images[299])], [sha1(images[40]), sha1(images[260])]]
    assert near["count"] == 2


def test_the_baseline_uses_colour(clean, monkeypatch):
    rng = np.random.default_rng(8)
    for split, count in (("train", 300), ("validation", 200)):
        images, labels = draw_textures(count, count), rng.integers(0, 2, count)
        images[labels == 1, :, :, 1] //= 2
        clean.add(split, images, labels)
    # A subset must keep its own labels.
    monkeypatch.setattr(leakage, "BASELINE_PATCHES", 180)
    baseline = leakage.audit(clean, clean.subsets(), seed=0)["colour_histogram_baseline"]
    assert baseline["train_patches"] == 180
    assert baseline["validation_auc"] > 0.99
    for split in ("train", "validation"):
        clean.tables[split]["label"] = rng.permutation(clean.tables[split]["label"])
    baseline = leakage.audit(clean, clean.subsets(), seed=0)["colour_histogram_baseline"]
    assert 0.4 < baseline["validation_auc"] < 0.6


def test_slides_are_shared_only_when_split_by_image():
    memory, config = Memory(), Config()
    for split, slides in (("train", 3), ("test", 1)):
        names = [f"{split}-{k // 16}" for k in range(16 * slides)]
        memory.add(split, draw_textures(16 * slides, slides), slides=names)
    config.data.validation_fraction = 0.3
    report = leakage.audit(memory, make_subsets(memory.tables, config.data, 0), seed=0)
    assert report["subsets"]["validation"]["slides"] == 1
    assert report["slide_disjoint"]
    assert not leakage.has_leak(report)
    config.data.split_by = "image"
    report = leakage.audit(memory, make_subsets(memory.tables, config.data, 0), seed=0)
    assert counts(report, "shared_slides") == [3, 0, 0]
    assert leakage.has_leak(report)


def test_real_patches_pass(sample, tmp_path):
    config = Config()
    config.data.source = "kaggle"
    config.data.raw_dir = str(sample / "kaggle_sample")
    config.data.tfds_dir = str(tmp_path)
    prepared = histo_jax.prepare(config)
    report = leakage.audit(prepared, make_subsets(prepared.tables, config.data, 0), seed=0)
    assert not leakage.has_leak(report)
    assert counts(report, "identical") == counts(report, "near_duplicates") == [0, 0, 0]
    assert [subset["patches"] for subset in report["subsets"].values()] == [2250, 250, 629]
    assert report["subsets"]["test"]["unknown_label"] == 629
    assert "slides: not all known" in leakage.table(report, CLASSES)
    # Colours alone classify better than chance, and far from perfectly.
    assert 0.75 < report["colour_histogram_baseline"]["validation_auc"] < 0.95


def test_a_signal_ends_an_audit(clean):
    with signals.watch():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Preempted):
            leakage.audit(clean, clean.subsets("slide"), seed=0)


def test_audit_and_prepare_are_commands_from_python_too(tiny_config, tmp_path):
    report = histo_jax.audit(tiny_config, tmp_path / "run")
    assert report == json.loads((tmp_path / "run" / "audit.json").read_text())
    assert report["subsets"]["test"]["patches"] == 7
    prepared = histo_jax.prepare(tiny_config)
    assert {split: len(table) for split, table in prepared.tables.items()} == {
        "train": 40,
        "test": 7,
    }
    assert repr(prepared) == f"Prepared({str(prepared.directory)!r}, train: 40, test: 7)"
