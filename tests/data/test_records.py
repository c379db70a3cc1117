import errno
import fcntl
import json
import logging
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
from tensorflow_datasets.core import ExampleSerializer

from histo_jax import environment
from histo_jax.data import records, splits
from histo_jax.errors import UserError
from histo_jax.run.workdir import Workdir
from histo_jax.settings import load_run_config


def test_records_follow_the_csv_and_the_tables(tiny_config, kaggle_dir):
    prepared = records.prepare(tiny_config)
    labels = pd.read_csv(kaggle_dir / "train_labels.csv")
    table = prepared.tables["train"]
    assert table["id"].tolist() == labels["id"].tolist()
    assert table["label"].tolist() == labels["label"].tolist()
    assert (table["slide"] == "").all()
    examples = prepared.source("train").__getitems__(list(range(len(table))))
    assert [r["id"].decode() for r in examples] == table["id"].tolist()
    assert [r["label"] for r in examples] == table["label"].tolist()
    pixels = np.stack([r["image"] for r in examples]).reshape(len(examples), -1, 3).astype(np.int64)
    np.testing.assert_array_equal(table[list(records.SUMS)], pixels.sum(1))
    np.testing.assert_array_equal(table[list(records.SQUARES)], (pixels**2).sum(1))


def test_records_of_several_files_keep_their_order(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_SHARD", 8)
    monkeypatch.setattr(records, "_AT_ONCE", 3)
    tiny_config.data.tfds_dir = str(tmp_path)
    prepared = records.prepare(tiny_config)
    assert len(list(prepared.directory.glob("*train.array_record*"))) == 5
    examples = prepared.source("train").__getitems__(list(range(40)))
    assert [r["id"].decode() for r in examples] == prepared.tables["train"]["id"].tolist()


def test_test_records_keep_the_submission_order_and_hide_labels(tiny_config, kaggle_dir):
    table = records.prepare(tiny_config).tables["test"]
    wanted = pd.read_csv(kaggle_dir / "sample_submission.csv")["id"]
    assert table["id"].tolist() == wanted.tolist()
    assert (table["label"] == -1).all()


def test_prepared_records_need_no_raw_files(tiny_config):
    records.prepare(tiny_config)
    tiny_config.data.raw_dir = None
    assert len(records.prepare(tiny_config).tables["train"]) == 40


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


@pytest.fixture
def messages(caplog):
    """What was logged, although other tests have kept the logger from passing it on."""
    logging.getLogger("histo_jax").addHandler(caplog.handler)
    yield lambda: caplog.text
    logging.getLogger("histo_jax").removeHandler(caplog.handler)


def refused(config, *words, **options):
    with pytest.raises(UserError) as error:
        records.prepare(config, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def begin(config, folder):
    """What `fit` leaves in the folder of a run."""
    prepared = records.prepare(config, folder)
    folder.mkdir(exist_ok=True)
    Workdir(folder).save_config(config)
    Workdir(folder).update_status(records=prepared.name)
    return prepared


def test_a_raw_folder_that_is_not_there_is_not_made_up_for_by_old_records(study, tmp_path):
    config = study(0)
    records.prepare(config)
    config.data.raw_dir = str(tmp_path / "typo")
    refused(config, "typo: no such folder", "--config.data.raw_dir", "None", "/records/")
    # Nor in a run that was begun with another folder, even where a mode only reads.
    run = tmp_path / "run"
    begin(study(0), run)
    config.data.raw_dir = str(tmp_path / "typo")
    refused(config, "typo: no such folder", workdir=run, raw_may_be_gone=True)
    (tmp_path / "typo").mkdir()
    refused(config, "typo/train", "missing", workdir=run, raw_may_be_gone=True)


@pytest.mark.parametrize("loss", ["folder", "part", "changed"])
def test_a_run_goes_on_reading_when_its_raw_folder_is_gone(study, tmp_path, messages, loss):
    begun = begin(study(0), tmp_path / "run")
    config = study(1)
    records.prepare(config)  # somebody else's, later
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
    found = records.prepare(config, tmp_path / "run", raw_may_be_gone=True)
    assert found.directory == begun.directory
    lost = "holds other files than" if loss == "changed" else "; going on with"
    assert re.search(f"{raw}.*{lost}", messages())
    refused(config, str(raw), workdir=tmp_path / "run")  # training does not
    config.data.raw_dir = None
    assert records.prepare(config, tmp_path / "run").directory == begun.directory


def test_relative_and_absolute_names_of_a_raw_folder_are_one(study, tmp_path, monkeypatch):
    config = study(0)
    monkeypatch.chdir(tmp_path)
    config.data.raw_dir, config.data.tfds_dir = "raw0", "records"
    begin(config, tmp_path / "run")
    monkeypatch.chdir("/")
    saved = load_run_config(tmp_path / "run")
    assert saved.data.raw_dir == str(tmp_path / "raw0")
    shutil.rmtree(tmp_path / "raw0")
    assert records.prepare(saved, tmp_path / "run", raw_may_be_gone=True).tables["train"].size


def test_the_log_says_which_records_are_used_and_from_what(study, tmp_path, messages):
    prepared = records.prepare(study(0))
    wanted = f"records: {prepared.directory} (4 train, 1 test patches), made from {tmp_path}/raw0"
    assert wanted in messages()
    with environment.defaults():  # as in one command
        records.prepare(study(0))
        records.prepare(study(0))
    assert messages().count(wanted) == 2


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
    record = records.prepare(config).directory / "prepared.json"
    downloaded = json.loads(record.read_text()) | {"files": None, "times": None}
    record.write_text(json.dumps(downloaded))
    record.parents[1].rename(record.parents[2] / "kaggle")
    assert records.prepare(config).name.startswith("kaggle-")


def test_studies_lie_side_by_side_and_are_told_apart(study, tmp_path):
    one, other = begin(study(0), tmp_path / "one"), begin(study(1), tmp_path / "other")
    assert one.directory != other.directory
    assert not set(one.tables["train"]["id"]) & set(other.tables["train"]["id"])
    assert records.prepare(study(0)).directory == one.directory
    config = study(0)
    config.data.raw_dir = None
    refused(config, one.name, other.name, "raw0", "raw1", "--config.data.records")
    # A run keeps to its own.
    assert records.prepare(config, tmp_path / "one").directory == one.directory
    assert records.prepare(config, tmp_path / "other").directory == other.directory
    config.data.records = other.name
    assert records.prepare(config).directory == other.directory
    config.data.records = "kaggle-typo"
    refused(config, "kaggle-typo", one.name, other.name)
    refused(study(1), "kaggle-typo")
    config.data.records = one.name
    refused(study(1), "raw1 holds other files", one.name, "raw0", "--config.data.records")


def test_records_of_version_0_1_0_serve(study):
    """Their name has no hash, and they do not say where they come from."""
    config = study(0)
    record = records.prepare(config).directory / "prepared.json"
    old = json.loads(record.read_text())
    del old["origin"]
    record.write_text(json.dumps(old))
    record.parents[1].rename(record.parents[2] / "kaggle")
    for _ in range(2):
        prepared = records.prepare(config)
        assert (prepared.name, len(prepared.tables["train"])) == ("kaggle", 4)
        assert len(prepared.source("train").__getitems__([0, 3])) == 2
        config.data.raw_dir = None


def test_tfds_itself_reads_the_records(study):
    prepared = records.prepare(study(0))
    source = tfds.builder_from_directory(prepared.directory).as_data_source("train")
    assert [example["id"].decode() for example in source] == prepared.tables["train"]["id"].tolist()
    assert source[0]["image"].shape == (96, 96, 3)


def test_a_preparing_in_progress_is_left_alone_and_an_abandoned_one_removed(study, tmp_path):
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
        prepared = records.prepare(study(0))
    assert {path.name for path in dataset.iterdir()} == {"busy", "recent", prepared.name}
    assert len(list(dataset.rglob("part"))) == 2


def test_a_broken_preparing_leaves_nothing_that_looks_finished(
    tiny_config, make_kaggle, tmp_path, monkeypatch
):
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    tiny_config.data.raw_dir = str(make_kaggle(tmp_path / "raw", train=6, test=1))
    read = records.kaggle.read

    def interrupted(files, skip, damaged):
        yield from read(files[:3], skip, damaged)
        raise KeyboardInterrupt

    monkeypatch.setattr(records.kaggle, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.prepare(tiny_config)
    assert not list((tmp_path / "records" / "histopathology").iterdir())
    monkeypatch.undo()
    assert len(records.prepare(tiny_config).tables["train"]) == 6


def test_raw_files_may_be_copied_tidied_and_saved_again(tiny_config, make_kaggle, tmp_path, caplog):
    raw = make_kaggle(tmp_path / "raw", train=4, test=1)
    junk = raw / "train" / f"._{next((raw / 'train').iterdir()).name}"
    junk.write_bytes(b"of a Mac")
    tiny_config.data.tfds_dir, tiny_config.data.raw_dir = str(tmp_path / "records"), str(raw)
    before = records.prepare(tiny_config)
    junk.unlink()
    table = pd.read_csv(raw / "train_labels.csv")
    table[::-1].assign(fold=1).to_csv(raw / "train_labels.csv", lineterminator="\r\n")
    tiny_config.data.raw_dir = str(tmp_path / "copy")
    shutil.copytree(raw, tmp_path / "copy", copy_function=shutil.copy)
    logging.getLogger("histo_jax").addHandler(caplog.handler)
    after = records.prepare(tiny_config)
    logging.getLogger("histo_jax").removeHandler(caplog.handler)
    assert after.directory == before.directory
    assert after.tables["train"].equals(before.tables["train"])
    assert "changed" not in caplog.text


def test_one_slide_under_two_spellings_is_on_both_sides(tiny_config, tmp_path):
    """As PatchCamelyon's files, whose validation has the slides of training in other words."""
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
    tables = records.prepare(tiny_config).tables
    assert (
        set(tables["train"]["slide"]) == set(tables["validation"]["slide"]) == {"Slide_01", "s 2"}
    )
    assert not splits.make_subsets(tables, tiny_config).slide_disjoint


def test_newer_files_of_the_same_content_are_said(study, tmp_path, messages, monkeypatch):
    record = records.prepare(study(0)).directory / "prepared.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"times": "earlier"}))
    fingerprint = records._fingerprint
    monkeypatch.setattr(
        records, "_fingerprint", lambda reader: fingerprint(reader) | {"times": "later"}
    )
    records.prepare(study(0))
    assert f"{tmp_path}/raw0 has changed since it was prepared" in messages()


def test_changed_labels_make_other_records(study, tmp_path):
    config, raw = study(0), tmp_path / "raw0"
    before = records.prepare(config)
    labels = raw / "train_labels.csv"
    labels.write_text(labels.read_text().replace(",0\n", ",1\n", 1))
    after = records.prepare(config)
    assert after.directory != before.directory
    assert (after.tables["train"]["label"] != before.tables["train"]["label"]).sum() == 1


KILLED = """
import os, sys
from pathlib import Path
from histo_jax.config import Config
from histo_jax.data import records

config = Config()
config.data.source, config.data.raw_dir, config.data.tfds_dir, where = "kaggle", *sys.argv[1:]
read, write = records.kaggle.read, records.files.write_json
if where.isdigit():
    def dying(files, skip, damaged):
        for number, example in enumerate(read(files, skip, damaged)):
            if number == int(where):
                os.kill(os.getpid(), 9)
            yield example
    records.kaggle.read = dying
elif where == "record":
    records.files.write_json = lambda *_: os.kill(os.getpid(), 9)
records.prepare(config)
"""


def test_killed_preparing_ends_with_the_same_bytes(make_kaggle, tmp_path):
    raw = make_kaggle(tmp_path / "raw", train=30, test=5)

    def prepare(records, where="nowhere"):
        command = [sys.executable, "-c", KILLED, str(raw), str(tmp_path / records), where]
        return subprocess.run(command, check=False, capture_output=True).returncode

    def contents(records):
        (folder,) = (tmp_path / records / "histopathology").iterdir()
        return {
            path.relative_to(folder): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    assert prepare("whole") == 0
    moments = [str(moment) for moment in np.random.default_rng(0).integers(0, 30, 3)]
    for moment in [*moments, "record"]:
        assert prepare("killed", moment) == -9
        assert not list((tmp_path / "killed").rglob("prepared.json"))
    assert prepare("killed") == 0
    assert contents("killed") == contents("whole")


def test_two_processes_prepare_once(make_kaggle, tmp_path):
    raw = make_kaggle(tmp_path / "raw", train=30, test=5)
    command = [sys.executable, "-c", KILLED, str(raw), str(tmp_path / "records"), "nowhere"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("preparing kaggle" in text for text in said) == 1


def test_synthetic_records_lie_apart_by_seed_and_size(tiny_config, tmp_path):
    tiny_config.data.source, tiny_config.data.raw_dir = "synthetic", None
    tiny_config.data.tfds_dir = str(tmp_path)
    tiny_config.data.synthetic_slides = 2
    first = records.prepare(tiny_config)
    tiny_config.seed = 1
    second = records.prepare(tiny_config)
    assert first.directory != second.directory
    assert first.tables["train"]["slide"].nunique() == 2
    assert not set(first.tables["train"]["id"]) & set(second.tables["train"]["id"])
    tiny_config.data.split_seed = 0  # the slides belong to the data's seed
    assert records.prepare(tiny_config).directory == first.directory


def test_records_on_a_file_system_without_locks_are_prepared_with_a_word(
    tiny_config, tmp_path, monkeypatch, caplog
):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(records.log, "propagate", True)
    tiny_config.data.tfds_dir = str(tmp_path)
    directory = records.prepare(tiny_config).directory
    assert f"{directory.parent / 'lock'} cannot be locked" in caplog.text
    caplog.clear()
    assert records.prepare(tiny_config).directory == directory  # which needs no lock
    assert "lock" not in caplog.text


@pytest.mark.parametrize("name", ["prepared.json", "train.csv", "test.csv"])
def test_tables_that_were_cut_short_are_named(tiny_config, tmp_path, name):
    tiny_config.data.tfds_dir = str(tmp_path)
    path = records.prepare(tiny_config).directory / name
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-9], whole[: whole.rindex(b"\n", 0, -1)]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is damaged: remove {path.parent} to"):
            records.prepare(tiny_config)


def test_threads_prepare_one_after_the_other_and_leave_the_process_as_it_was(
    make_tiny_config, tmp_path
):
    before = ExampleSerializer.serialize_example, sys.stdout
    found = []

    def run(name):
        config = make_tiny_config()
        config.data.tfds_dir = str(tmp_path / name)
        found.append(records.prepare(config).directory)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.relative_to(tmp_path).parts[0] for path in found) == ["a", "a", "b"]
    assert (ExampleSerializer.serialize_example, sys.stdout) == before
