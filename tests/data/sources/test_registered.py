"""Sources from outside the package: used by every command, and refused in one line."""

import json
import re
import runpy
from pathlib import Path

import flax.linen as nn
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histo_jax
from histo_jax import registry
from histo_jax.config import Config
from histo_jax.config_checks import validate
from histo_jax.data import leakage, records
from histo_jax.data.example import Example
from histo_jax.data.source_adapter import class_names
from histo_jax.data.splits import make_subsets
from histo_jax.errors import DataError, UserError
from histo_jax.metrics import Calibration
from histo_jax.run.workdir import Workdir

IMAGES = np.random.default_rng(0).integers(150, 230, (64, 96, 96, 3), np.uint8)
IMAGES[::2, 32:64, 32:64] -= 90


pytestmark = pytest.mark.usefixtures("unregister")


class Pixel(nn.Module):
    """The smallest network, which compiles fast."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(1)(images.mean((1, 2)))[:, 0]


@pytest.fixture
def config(tmp_path):
    config = Config()
    config.data.source, config.data.tfds_dir = "mine", str(tmp_path / "records")
    return config


def prepare(config, **options):
    validate(config)
    return records.prepare(config.data, config.data_seed, **options)


def examples(count=8, first=0, label=None, slide="s"):
    """Examples with alternating labels, four to a slide."""
    return [
        Example(f"p{k}", IMAGES[k], k % 2 if label is None else label, f"{slide}{k // 4}")
        for k in range(first, first + count)
    ]


def register(splits, **attributes):
    """Registers a source that returns what `splits` returns."""
    body = {"__init__": lambda self, data: None, "splits": lambda self: splits(), **attributes}
    histo_jax.register_source("mine")(type("Mine", (), body))


def refused(config, *words):
    with pytest.raises(DataError) as error:
        prepare(config)
    line = str(error.value)
    assert line.isprintable()
    assert not [word for word in words if word not in line], line
    assert not list(Path(config.data.tfds_dir).rglob("*.json"))  # nothing is left
    return line


def test_a_source_of_a_config_file_goes_through_every_command(tmp_path):
    path = Path(__file__).with_name("png_folders.py")
    assert len(path.read_text().partition("@")[2].partition("\n\n\n")[0].split("\n")) < 20
    for split, numbers in (("train", range(32)), ("validation", range(32, 48)), ("test", (48, 49))):
        for k in numbers:
            folder = tmp_path / "raw" / split / str(k % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(IMAGES[k]).save(folder / f"{split}-{k // 4}_{k}.png")
    config = runpy.run_path(str(path))["get_config"]()
    config.data.raw_dir, config.data.tfds_dir = str(tmp_path / "raw"), str(tmp_path / "records")
    histo_jax.register_model("pixel")(Pixel)
    config.model.name = "pixel"
    config.fit.batch_size, config.fit.epochs = 8, 1
    config.predict.batch_size = 8
    histo_jax.fit(config, tmp_path / "run")
    scores = histo_jax.evaluate(config, tmp_path / "run")
    assert (scores["count"], scores["slide_disjoint"]) == (16, True)
    histo_jax.predict(config, tmp_path / "run")
    assert pd.read_csv(tmp_path / "run" / "submission.csv")["id"].tolist() == [
        "test-12_48", "test-12_49",
    ]  # fmt: skip
    histo_jax.report(config, tmp_path / "run")
    assert "png_folders" in (tmp_path / "run" / "report.html").read_text()


def test_patients_and_paths_go_through_every_command(config, tmp_path, log, save_run):
    def example(split, k):
        slide, patient, path = f"{split}{k // 4}", f"{split} {k // 8}", f"{split}/{k}.png"
        image = IMAGES[k + 48 * (split == "test")]
        return Example(f"{split}{k}", image, k % 2, slide, patient * (k % 4 > 0), path)

    register(lambda: {s: [example(s, k) for k in range(n)] for s, n in counts.items()})
    counts = {"train": 48, "test": 16}
    histo_jax.register_model("pixel")(Pixel)
    config.model.name, config.data.validation_fraction = "pixel", 0.34
    config.fit.batch_size, config.fit.epochs, config.predict.batch_size = 8, 1, 8
    for number in range(3):
        config.data.fold = f"{number + 1}/3"
        save_run(config, tmp_path / f"fold{number}", Calibration())
    config.data.fold = None
    run = tmp_path / "run"
    histo_jax.fit(config, run)
    assert "split by patient" in log.text
    scores = histo_jax.evaluate(config, run)
    assert (scores["split_by"], scores["slide_disjoint"]) == ("patient", True)
    assert (scores["patient_disjoint"], scores["interval_over"]) == (True, "patients")
    assert scores["resampled"] == scores["count"] / 8
    table = pd.read_csv(run / "predictions_validation.csv")
    assert list(table) == ["id", "label", "slide", "logit", "patient", "path"]
    assert table["patient"].nunique() == scores["resampled"]
    histo_jax.report(config, run)
    page = (run / "report.html").read_text()
    assert "Patient-disjoint:" in page
    assert table["path"][0] in page
    assert histo_jax.predict(config, run)["path"].tolist() == [f"test/{k}.png" for k in range(16)]
    assert list(pd.read_csv(run / "submission.csv")) == ["id", "label", "path"]
    config.predict.checkpoints = ",".join(str(tmp_path / f"fold{k}") for k in range(3))
    scores = histo_jax.evaluate(config, tmp_path / "folds")
    assert (scores["count"], scores["resampled"], scores["out_of_fold"]) == (48, 6, True)
    assert scores["patient_disjoint"] is True
    config.evaluate.split = "test"
    assert histo_jax.evaluate(config, tmp_path / "folds")["patient_disjoint"] is True


def test_records_hold_what_the_source_yields(config):
    register(lambda: {"train": iter(examples(12)), "test": examples(3, 12, label=-1, slide="")})
    prepared = prepare(config)
    train, test = prepared.tables["train"], prepared.tables["test"]
    assert train["id"].tolist() == [f"p{k}" for k in range(12)]
    assert train["label"].tolist() == [0, 1] * 6
    assert train["slide"].tolist() == [f"s{k // 4}" for k in range(12)]
    assert test["label"].tolist() == [-1] * 3
    assert not {"patient", "path"} & {*train, *test}
    np.testing.assert_array_equal(
        prepared.records("train", np.arange(12)).images(np.arange(12)), IMAGES[:12]
    )
    assert prepared.name.startswith("mine-")


def test_a_leak_is_found_by_pixels_although_ids_differ(config):
    leak = Example("other", IMAGES[3], 1, "elsewhere")
    register(lambda: {"train": examples(40), "test": [leak, *examples(4, 50)]})
    config.data.split_by = "image"
    prepared = prepare(config)
    subsets = make_subsets(prepared.tables, config.data, 0)
    report = leakage.audit(prepared, subsets, 0)
    identical = {name: pair["identical"]["count"] for name, pair in report["pairs"].items()}
    assert sum(identical.values()) == 1


def test_fingerprints_name_the_records(config):
    made = []
    for fingerprint in ("v1", "v1", "v2", "0123456789abcdef" * 4, "with / and spaces", None):
        register(lambda: {"train": examples()}, fingerprint=lambda self, f=fingerprint: f)
        if fingerprint is not None:
            made.append(prepare(config).name)
    assert made[0] == made[1]
    assert len(set(made)) == 4
    assert all(re.fullmatch(r"mine-[0-9a-f]{12}", name) for name in made)
    with pytest.raises(DataError, match=rf"several records, .*{made[0]}"):
        prepare(config)  # which of them is not known
    config.data.records = made[2]
    assert prepare(config).name == made[2]


@pytest.mark.parametrize("has_fingerprint", [False, True])
def test_other_code_makes_other_records(has_fingerprint, config, tmp_path):
    class First:
        def __init__(self, data):
            pass

        def splits(self):
            return {"train": examples(8)}

    class Second(First):
        def splits(self):
            return {"train": examples(10)}

    names = []
    for kind in (First, First, Second):
        if has_fingerprint:
            kind.fingerprint = lambda self: "v1"
        registry.SOURCES._entries["mine"] = kind
        names.append(prepare(config).name)
    assert names[0] == names[1] != names[2]
    # A run keeps its records: modes that read use them, training refuses.
    run = Workdir(tmp_path)
    run.save_config(config)
    run.update_status(records=names[0])
    with pytest.raises(
        DataError, match=r"source 'mine' has other (data or )?code .*choose another --workdir"
    ):
        prepare(config, workdir=tmp_path)
    assert prepare(config, workdir=tmp_path, raw_may_be_gone=True).name == names[0]


def test_optional_attributes_are_used(config, tmp_path):
    folders = []

    class Mine:
        scratch = None
        origin = "the archive"

        def __init__(self, data):
            assert data.split_seed == config.data_seed
            self.corrupt = {}

        @classmethod
        def recognizes(cls, raw_dir):
            return False

        def splits(self):
            folders.append(self.scratch)
            assert self.scratch.is_dir()
            self.corrupt["a.png"] = "is corrupt"
            return {"train": examples()}

    config.data.on_damaged = "skip"
    histo_jax.register_source("mine")(Mine)
    directory = prepare(config).directory
    manifest = json.loads((directory / "prepared.json").read_text())
    assert manifest["origin"] == "the archive"
    assert manifest["corrupt"] == {"a.png": "is corrupt"}
    assert not folders[0].exists()
    config.data.on_damaged = "stop"
    with pytest.raises(DataError, match="1 corrupt patches were left out"):
        prepare(config)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train_labels.csv").touch()
    config.data.raw_dir = str(tmp_path / "raw")
    with pytest.raises(DataError, match=r"holds files of data\.source = 'kaggle'"):
        prepare(config)


def changed(**values):
    return lambda: {"train": [*examples(3), examples(1, 3)[0]._replace(**values)]}


def raising(error):
    def read():
        yield from examples(3)
        raise error

    return lambda: {"train": read()}


WRONG_SPLITS = {
    "list": (lambda: examples(), "splits() returned list", "dict"),
    "name": (lambda: {"train": [], "valid": []}, "'valid'", "did you mean validation?"),
    "no-train": (lambda: {"test": examples()}, "no 'train' split"),
    "empty": (lambda: {"train": []}, "train split", "no examples"),
    "raises": (lambda: 1 / 0, "splits() raised ZeroDivisionError", "test_registered.py, line"),
    "not-iterable": (lambda: {"train": 5}, "splits()['train'] raised TypeError"),
    "reader-raises": (raising(OSError(5, "broken disk")), "raised OSError", "broken disk"),
    "reader-stops": (raising(DataError("a.png is corrupt: restore it")), "a.png is corrupt"),
    "tuple": (lambda: {"train": [("p", IMAGES[0], 1)]}, "example 0 is of type tuple", "Example("),
    "duplicate": (changed(id="p1"), "example 3 (id 'p1') is a duplicate"),
    "id-number": (changed(id=7), "example 3 (id 7)", "id"),
    "id-lines": (changed(id="a\nb"), "example 3", "visible text"),
    "id-empty": (changed(id=" "), "example 3", "visible text"),
    "image-list": (changed(image=[1]), "(id 'p3') has an image of type list", "numpy.asarray"),
    "image-float": (changed(image=IMAGES[0] / 255), "float64[96, 96, 3], not uint8[size, size, 3]"),
    "image-small": (changed(image=IMAGES[0, :64]), "uint8[64, 96, 3], not uint8[size, size, 3]"),
    "label-2": (changed(label=2), "label 2", "must be 0 or 1"),
    "label-text": (changed(label="1"), "label '1'", "must be 0 or 1"),
    "label-unknown": (changed(label=-1), "label -1", "must be 0 or 1"),
    "slide-none": (changed(slide=None), "slide of type NoneType", "'' = not known"),
    "test-label": (
        lambda: {"train": examples(), "test": [*examples(2, 10), *examples(2, 12, label=-1)]},
        "test split",
        "2 of 4 labels are -1",
    ),
}


@pytest.mark.parametrize("name", WRONG_SPLITS)
def test_a_wrong_source_is_one_line(config, name):
    splits, *words = WRONG_SPLITS[name]
    register(splits)
    line = refused(config, *words)
    assert "source 'mine'" in line or name == "reader-stops"


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("__init__", lambda self: None, "the constructor raised TypeError"),
        ("fingerprint", lambda self: {}["a"], "fingerprint() raised KeyError"),
        ("fingerprint", lambda self: 7, "fingerprint() returned int; return a str, or None"),
    ],
)
def test_a_wrong_attribute_is_one_line(config, attribute, value, words):
    register(lambda: {"train": examples()}, **{attribute: value})
    refused(config, "source 'mine'", words)


def test_names_are_checked(config):
    config.data.source = "kagle"
    with pytest.raises(UserError, match=r"config\.data\.source = 'kagle'.*did you mean kaggle"):
        validate(config)
    histo_jax.register_source("a/b")(type("Mine", (), {"__init__": lambda self, data: None}))
    config.data.source = "a/b"
    with pytest.raises(DataError, match="source 'a/b': the name"):
        prepare(config)
    with pytest.raises(UserError, match="source 'pcam' is built in"):
        histo_jax.register_source("pcam")(type("Mine", (), {}))


def test_records_of_sources_with_similar_names_are_kept_apart(config):
    register(lambda: {"train": examples()}, fingerprint=lambda self: None)
    histo_jax.register_source("mine-2")(registry.SOURCES.get("mine"))
    config.data.source = "mine-2"
    assert prepare(config).name == "mine-2"
    config.data.source = "mine"
    assert prepare(config).name == "mine"


def test_the_names_of_the_classes(config):
    # A source that is not registered here, as that of an exported network.
    assert class_names(config.data) == ("negative", "positive")
    register({"train": examples()})
    assert class_names(config.data) == ("negative", "positive")
    registry.SOURCES._entries["mine"].classes = ["healthy", "lesion"]
    assert class_names(config.data) == ("healthy", "lesion")


@pytest.mark.parametrize("classes", ["ab", ("lesion",), ("lesion", "lesion"), (0, 1), ("", "b")])
def test_wrong_names_of_the_classes(config, classes):
    register({"train": examples()}, classes=classes)
    with pytest.raises(DataError, match=r"^source 'mine': classes = .* label 0 and of label 1"):
        class_names(config.data)
