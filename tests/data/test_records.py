"""Which records are used, and how they are written: complete or absent, the same bytes."""

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import h5py
import numpy as np
import pandas as pd
import pytest
import tensorflow_datasets as tfds

from histo_jax import environment
from histo_jax.data import record_files, record_writer, records, splits
from histo_jax.data.record_files import SQUARES, SUMS
from histo_jax.data.sources import kaggle, synthetic
from histo_jax.errors import UserError
from histo_jax.run.workdir import Workdir
from histo_jax.settings import load_run_config


def prepare(config, workdir=None, **options):
    return records.prepare(config.data, config.data_seed, workdir, **options)


def test_records_follow_the_csv_and_the_tables(tiny_config, kaggle_dir):
    prepared = prepare(tiny_config)
    labels = pd.read_csv(kaggle_dir / "train_labels.csv")
    table = prepared.tables["train"]
    assert table["id"].tolist() == labels["id"].tolist()
    assert table["label"].tolist() == labels["label"].tolist()
    assert (table["slide"] == "").all()
    examples = prepared.source("train").__getitems__(list(range(len(table))))
    assert [r["id"].decode() for r in examples] == table["id"].tolist()
    assert [r["label"] for r in examples] == table["label"].tolist()
    pixels = np.stack([r["image"] for r in examples]).reshape(len(examples), -1, 3).astype(np.int64)
    np.testing.assert_array_equal(table[list(SUMS)], pixels.sum(1))
    np.testing.assert_array_equal(table[list(SQUARES)], (pixels**2).sum(1))


def test_records_of_several_files_keep_their_order(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(record_writer, "_SHARD", 8 * 96 * 96)
    tiny_config.data.tfds_dir = str(tmp_path)
    prepared = prepare(tiny_config)
    assert len(list(prepared.directory.glob("*train.array_record*"))) == 5
    examples = prepared.source("train").__getitems__(list(range(40)))
    assert [r["id"].decode() for r in examples] == prepared.tables["train"]["id"].tolist()


def test_test_records_keep_the_submission_order_and_hide_labels(tiny_config, kaggle_dir):
    table = prepare(tiny_config).tables["test"]
    ids = pd.read_csv(kaggle_dir / "sample_submission.csv")["id"]
    assert table["id"].tolist() == ids.tolist()
    assert (table["label"] == -1).all()


def test_prepared_records_need_no_raw_files(tiny_config):
    prepare(tiny_config)
    tiny_config.data.raw_dir = None
    assert len(prepare(tiny_config).tables["train"]) == 40


@pytest.fixture
def study(tiny_config, make_kaggle, tmp_path):
    """Sets `raw_dir` to a folder of other patches for each seed; one `tfds_dir` for all."""
    tiny_config.data.tfds_dir = str(tmp_path / "records")

    def choose(seed):
        folder = tmp_path / f"raw{seed}"
        if not folder.exists():
            make_kaggle(folder, train=4, test=1, seed=seed)
        tiny_config.data.raw_dir = str(folder)
        return tiny_config

    return choose


def refused(config, *words, **options):
    with pytest.raises(UserError) as error:
        prepare(config, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def begin(config, folder):
    """What `fit` leaves in the folder of a run."""
    prepared = prepare(config, folder)
    folder.mkdir(exist_ok=True)
    Workdir(folder).save_config(config)
    Workdir(folder).update_status(records=prepared.name)
    return prepared


def test_old_records_do_not_replace_a_missing_raw_folder(study, tmp_path):
    config = study(0)
    prepare(config)
    config.data.raw_dir = str(tmp_path / "typo")
    refused(config, "typo: no such folder", "--config.data.raw_dir", "None", "/records/")
    # Nor in a run that started with another folder, even where a mode only reads.
    run = tmp_path / "run"
    begin(study(0), run)
    config.data.raw_dir = str(tmp_path / "typo")
    refused(config, "typo: no such folder", workdir=run, raw_may_be_gone=True)
    (tmp_path / "typo").mkdir()
    refused(config, "typo/train", "missing", workdir=run, raw_may_be_gone=True)


@pytest.mark.parametrize("loss", ["folder", "part", "changed"])
def test_reading_modes_use_the_records_when_raw_files_are_gone(study, tmp_path, messages, loss):
    begun = begin(study(0), tmp_path / "run")
    config = study(1)
    prepare(config)  # later, of another study
    raw = tmp_path / "raw0"
    if loss == "folder":
        shutil.rmtree(raw)
    elif loss == "part":
        shutil.rmtree(raw / "train")
    else:
        labels = raw / "train_labels.csv"
        labels.write_text(labels.read_text().replace(",0\n", ",1\n", 1))
    config = study(0) if raw.exists() else config
    config.data.raw_dir = str(raw)
    found = prepare(config, tmp_path / "run", raw_may_be_gone=True)
    assert found.directory == begun.directory
    lost = "has other data than" if loss == "changed" else "; using"
    assert re.search(f"{raw}.*{lost}", "\n".join(messages))
    refused(config, str(raw), workdir=tmp_path / "run")  # training does not
    config.data.raw_dir = None
    assert prepare(config, tmp_path / "run").directory == begun.directory


def test_relative_and_absolute_paths_of_a_raw_folder_are_equal(study, tmp_path, monkeypatch):
    config = study(0)
    monkeypatch.chdir(tmp_path)
    config.data.raw_dir, config.data.tfds_dir = "raw0", "records"
    begin(config, tmp_path / "run")
    monkeypatch.chdir("/")
    saved = load_run_config(tmp_path / "run")
    assert saved.data.raw_dir == str(tmp_path / "raw0")
    shutil.rmtree(tmp_path / "raw0")
    assert prepare(saved, tmp_path / "run", raw_may_be_gone=True).tables["train"].size


def test_the_log_names_the_records_and_their_origin(study, tmp_path, messages):
    prepared = prepare(study(0))
    line = f"records: {prepared.directory} (4 train, 1 test patches), made from {tmp_path}/raw0"
    assert line in "\n".join(messages)
    with environment.defaults():  # as in one command
        prepare(study(0))
        prepare(study(0))
    assert "\n".join(messages).count(line) == 2


def test_the_layout_of_another_source_is_named(study, tmp_path):
    config = study(0)
    config.data.source = "pcam"
    refused(config, "'kaggle'", "--config.data.source=kaggle")
    config.data.source = "synthetic"
    refused(config, "raw0", "--config.data.source=kaggle or pcam")
    config.data.source, config.data.raw_dir = "kaggle", str(tmp_path)
    (tmp_path / "camelyonpatch_level_2_split_train_x.h5").touch()
    refused(config, "'pcam'", "--config.data.source=pcam")


def test_raw_files_beside_downloaded_records_are_not_ignored(study):
    config = study(0)
    record = prepare(config).directory / "prepared.json"
    downloaded = json.loads(record.read_text()) | {"fingerprint": None, "modified": None}
    record.write_text(json.dumps(downloaded))
    record.parents[1].rename(record.parents[2] / "kaggle")
    assert prepare(config).name.startswith("kaggle-")


def test_records_of_several_studies_are_kept_apart(study, tmp_path):
    one, other = begin(study(0), tmp_path / "one"), begin(study(1), tmp_path / "other")
    assert one.directory != other.directory
    assert not set(one.tables["train"]["id"]) & set(other.tables["train"]["id"])
    assert prepare(study(0)).directory == one.directory
    config = study(0)
    config.data.raw_dir = None
    refused(config, one.name, other.name, "raw0", "raw1", "--config.data.records")
    # A run uses its own.
    assert prepare(config, tmp_path / "one").directory == one.directory
    assert prepare(config, tmp_path / "other").directory == other.directory
    config.data.records = other.name
    assert prepare(config).directory == other.directory
    config.data.records = "kaggle-typo"
    refused(config, "kaggle-typo", one.name, other.name)
    refused(study(1), "kaggle-typo")
    config.data.records = one.name
    refused(study(1), "raw1 has other data", one.name, "raw0", "--config.data.records")


def test_records_of_version_0_1_0_are_read(study):
    """Their name has no hash, and `prepared.json` has other keys and no origin."""
    config = study(0)
    record = prepare(config).directory / "prepared.json"
    new = json.loads(record.read_text())
    old = {key: new[renamed] for key, renamed in record_files._OLD_KEYS.items()}
    record.write_text(json.dumps(old))
    record.parents[1].rename(record.parents[2] / "kaggle")
    for _ in range(2):
        prepared = prepare(config)
        assert (prepared.name, len(prepared.tables["train"])) == ("kaggle", 4)
        assert len(prepared.source("train").__getitems__([0, 3])) == 2
        config.data.raw_dir = None


def test_tfds_itself_reads_the_records(study):
    prepared = prepare(study(0))
    source = tfds.builder_from_directory(prepared.directory).as_data_source("train")
    assert [example["id"].decode() for example in source] == prepared.tables["train"]["id"].tolist()
    assert source[0]["image"].shape == (96, 96, 3)


def test_unfinished_records_are_removed_unless_they_are_being_written(study, tmp_path):
    dataset = tmp_path / "records" / "histopathology"
    for name in ("busy", "recent", "abandoned"):
        part = dataset / name / "incomplete.X_1.0.0" / "part"
        part.parent.mkdir(parents=True)
        (dataset / name / "lock").touch()
        part.touch()
    for path in [*dataset.rglob("busy/**/*"), *dataset.rglob("abandoned/**/*")]:
        os.utime(path, (1, 1))
    with (dataset / "busy" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepared = prepare(study(0))
    assert {path.name for path in dataset.iterdir()} == {"busy", "recent", prepared.name}
    assert len(list(dataset.rglob("part"))) == 2


def test_an_interrupted_preparation_leaves_nothing(tiny_config, make_kaggle, tmp_path, monkeypatch):
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    tiny_config.data.raw_dir = str(make_kaggle(tmp_path / "raw", train=6, test=1))
    read = kaggle.read

    def interrupted(files, skip, corrupt):
        yield from read(files[:3], skip, corrupt)
        raise KeyboardInterrupt

    monkeypatch.setattr(kaggle, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny_config)
    assert not list((tmp_path / "records" / "histopathology").iterdir())
    monkeypatch.undo()
    assert len(prepare(tiny_config).tables["train"]) == 6


def test_copied_or_cleaned_up_raw_files_have_the_same_records(
    tiny_config, make_kaggle, tmp_path, messages
):
    raw = make_kaggle(tmp_path / "raw", train=4, test=1)
    junk = raw / "train" / f"._{next((raw / 'train').iterdir()).name}"
    junk.write_bytes(b"of a Mac")
    tiny_config.data.tfds_dir, tiny_config.data.raw_dir = str(tmp_path / "records"), str(raw)
    before = prepare(tiny_config)
    junk.unlink()
    table = pd.read_csv(raw / "train_labels.csv")
    table[::-1].assign(fold=1).to_csv(raw / "train_labels.csv", lineterminator="\r\n")
    tiny_config.data.raw_dir = str(tmp_path / "copy")
    shutil.copytree(raw, tmp_path / "copy", copy_function=shutil.copy)
    after = prepare(tiny_config)
    assert after.directory == before.directory
    assert after.tables["train"].equals(before.tables["train"])
    assert "changed" not in "\n".join(messages)


def test_one_slide_in_two_spellings_is_shared_by_both_splits(tiny_config, tmp_path):
    """PatchCamelyon's files, whose validation has the slides of training in other spellings."""
    rng = np.random.default_rng(0)
    for name, names in (("train", ["Slide_01", "s 2"]), ("valid", ["slide_01 ", "S\u00a02"])):
        stem = f"{tmp_path}/camelyonpatch_level_2_split_{name}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = rng.integers(0, 256, (8, 96, 96, 3), np.uint8)
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = [0, 1] * 4
        pd.DataFrame({"wsi": np.repeat(names, 4)}).to_csv(f"{stem}_meta.csv", index=False)
    tiny_config.data.source, tiny_config.data.raw_dir = "pcam", str(tmp_path)
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    tables = prepare(tiny_config).tables
    assert (
        set(tables["train"]["slide"]) == set(tables["validation"]["slide"]) == {"Slide_01", "s 2"}
    )
    assert not splits.make_subsets(tables, tiny_config.data, 0).slide_disjoint


def test_newer_files_of_the_same_content_are_logged(study, tmp_path, messages, monkeypatch):
    record = prepare(study(0)).directory / "prepared.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"modified": "earlier"}))
    monkeypatch.setattr(kaggle.Kaggle, "modified", lambda self: "later", raising=False)
    prepare(study(0))
    assert f"{tmp_path}/raw0 has changed since it was prepared" in "\n".join(messages)


def test_changed_labels_make_new_records(study, tmp_path):
    config, raw = study(0), tmp_path / "raw0"
    before = prepare(config)
    labels = raw / "train_labels.csv"
    labels.write_text(labels.read_text().replace(",0\n", ",1\n", 1))
    after = prepare(config)
    assert after.directory != before.directory
    assert (after.tables["train"]["label"] != before.tables["train"]["label"]).sum() == 1


# Forks a child for each preparation, so that the libraries are loaded once. Prints the statuses.
CHILDREN = """
import logging, os, sys
from histo_jax.config import Config
from histo_jax.data import record_files, records
from histo_jax.data.sources import kaggle, synthetic

logging.basicConfig(level=logging.INFO, force=True)
raw, folder, *moments = sys.argv[1:]
read = kaggle.read

def prepare(name, moment):
    config = Config()
    config.data.source, config.data.raw_dir = "kaggle", raw
    config.data.tfds_dir = os.path.join(folder, name)
    if moment.isdigit():
        def dying(files, skip, corrupt):
            for number, example in enumerate(read(files, skip, corrupt)):
                if number == int(moment):
                    os.kill(os.getpid(), 9)
                yield example
        kaggle.read = dying
    elif moment == "manifest":
        record_files.files.write_json = lambda *_: os.kill(os.getpid(), 9)
    elif moment == "rename":
        records.Path.rename = lambda *_: os.kill(os.getpid(), 9)
    records.prepare(config.data, 0)

def start(name, moment="never"):
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        prepare(name, moment)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

print(wait(start("whole")))
for moment in moments:
    complete = records.Path(folder, "killed").glob("*/*/1.0.0")
    print(wait(start("killed", moment)), len(list(complete)))
print(wait(start("killed")))
both = [start("both"), start("both")]
print(*map(wait, both))
"""


def test_records_are_complete_or_absent_and_have_the_same_bytes(make_kaggle, tmp_path):
    """Whenever a process is killed; and of two processes one writes."""
    raw = make_kaggle(tmp_path / "raw", train=30, test=5)
    moments = [str(moment) for moment in np.random.default_rng(0).integers(0, 30, 3)]
    moments += ["manifest", "rename"]
    command = [sys.executable, "-c", CHILDREN, str(raw), str(tmp_path), *moments]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert run.stdout.split("\n") == ["0", *["-9 0"] * 5, "0", "0 0", ""], run.stderr
    assert run.stderr.count(f"into {tmp_path / 'both'}") == 1

    def contents(name):
        (folder,) = (tmp_path / name / "histopathology").iterdir()
        return {
            path.relative_to(folder): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    assert contents("whole") == contents("killed") == contents("both")


def test_synthetic_records_are_kept_apart_by_seed_and_size(tiny_config, tmp_path, monkeypatch):
    def generate_patches(seed, split, number):
        rng = np.random.default_rng([seed, number, len(split)])
        masks = np.zeros((64, 96, 96), bool)
        masks[::2] = True
        return rng.integers(0, 256, (64, 96, 96, 3), np.uint8), masks

    monkeypatch.setattr(synthetic, "generate_patches", generate_patches)
    tiny_config.data.source, tiny_config.data.raw_dir = "synthetic", None
    tiny_config.data.tfds_dir = str(tmp_path)
    tiny_config.data.synthetic_slides = 2
    first = prepare(tiny_config)
    tiny_config.seed = 1
    second = prepare(tiny_config)
    assert first.directory != second.directory
    assert first.tables["train"]["slide"].nunique() == 2
    assert not set(first.tables["train"]["id"]) & set(second.tables["train"]["id"])
    tiny_config.data.split_seed = 0  # the slides depend on the data's seed
    assert prepare(tiny_config).directory == first.directory


def test_records_on_a_file_system_without_locks_are_prepared_with_a_warning(
    tiny_config, tmp_path, monkeypatch, messages
):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    tiny_config.data.tfds_dir = str(tmp_path)
    directory = prepare(tiny_config).directory
    assert f"{directory.parent / 'lock'} cannot be locked" in "\n".join(messages)
    messages.clear()
    assert prepare(tiny_config).directory == directory  # which needs no lock
    assert "lock" not in "\n".join(messages)


@pytest.mark.parametrize("name", ["prepared.json", "train.csv", "test.csv"])
def test_truncated_tables_are_named(tiny_config, tmp_path, name):
    tiny_config.data.tfds_dir = str(tmp_path)
    path = prepare(tiny_config).directory / name
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-9], whole[: whole.rindex(b"\n", 0, -1)]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is corrupt: remove {path.parent} to"):
            prepare(tiny_config)


def test_threads_prepare_at_once(make_tiny_config, tmp_path):
    directories = []

    def run(name):
        config = make_tiny_config()
        config.data.tfds_dir = str(tmp_path / name)
        directories.append(prepare(config).directory)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.relative_to(tmp_path).parts[0] for path in directories) == ["a", "a", "b"]
