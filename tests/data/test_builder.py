import shutil

import numpy as np
import pandas as pd
import pytest

from histo_jax.data import builder
from histo_jax.errors import ExpectedError


def test_records_follow_the_csv_and_the_tables(tiny_config, kaggle_dir):
    prepared = builder.prepare(tiny_config)
    labels = pd.read_csv(kaggle_dir / "train_labels.csv")
    table = prepared.tables["train"]
    assert table["id"].tolist() == labels["id"].tolist()
    assert table["label"].tolist() == labels["label"].tolist()
    assert (table["slide"] == "").all()
    records = prepared.source("train").__getitems__(list(range(len(table))))
    assert [r["id"].decode() for r in records] == table["id"].tolist()
    assert [r["label"] for r in records] == table["label"].tolist()
    pixels = np.stack([r["image"] for r in records]).reshape(len(records), -1, 3).astype(np.int64)
    np.testing.assert_array_equal(table[list(builder.SUMS)], pixels.sum(1))
    np.testing.assert_array_equal(table[list(builder.SQUARES)], (pixels**2).sum(1))


def test_test_records_keep_the_submission_order_and_hide_labels(tiny_config, kaggle_dir):
    table = builder.prepare(tiny_config).tables["test"]
    wanted = pd.read_csv(kaggle_dir / "sample_submission.csv")["id"]
    assert table["id"].tolist() == wanted.tolist()
    assert (table["label"] == -1).all()


def test_prepared_records_need_no_raw_files(tiny_config):
    builder.prepare(tiny_config)
    tiny_config.data.raw_dir = None
    assert len(builder.prepare(tiny_config).tables["train"]) == 40


def test_records_of_other_raw_files_are_refused(tiny_config, make_kaggle, tmp_path):
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    tiny_config.data.raw_dir = str(make_kaggle(tmp_path / "one", train=4, test=1))
    builder.prepare(tiny_config)
    tiny_config.data.raw_dir = str(make_kaggle(tmp_path / "two", train=4, test=1, seed=1))
    with pytest.raises(ExpectedError, match="prepared from other files"):
        builder.prepare(tiny_config)
    shutil.rmtree(tmp_path / "records")
    builder.prepare(tiny_config)


def test_a_broken_preparing_leaves_nothing_that_looks_finished(
    tiny_config, make_kaggle, tmp_path, monkeypatch
):
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    tiny_config.data.raw_dir = str(make_kaggle(tmp_path / "raw", train=6, test=1))
    read = builder.kaggle.read

    def interrupted(files):
        yield from read(files[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(builder.kaggle, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builder.prepare(tiny_config)
    assert not list((tmp_path / "records").rglob("*.array_record*"))
    monkeypatch.undo()
    assert len(builder.prepare(tiny_config).tables["train"]) == 6


def test_synthetic_records_lie_apart_by_seed_and_size(tiny_config, tmp_path):
    tiny_config.data.source = "synthetic"
    tiny_config.data.tfds_dir = str(tmp_path)
    tiny_config.data.synthetic_slides = 2
    first = builder.prepare(tiny_config)
    tiny_config.seed = 1
    second = builder.prepare(tiny_config)
    assert first.directory != second.directory
    assert first.tables["train"]["slide"].nunique() == 2
    assert not set(first.tables["train"]["id"]) & set(second.tables["train"]["id"])
