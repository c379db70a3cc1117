"""The main job on real patches."""

import json

import pandas as pd

import histo_jax
from histo_jax.preparation import prepare


def test_a_small_network_learns_from_real_tiffs(sample, make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.data.raw_dir = str(sample / "kaggle_sample")
    config.data.tfds_dir = str(tmp_path / "records")
    config.data.validation_fraction = 0.2
    config.data.samples_per_class = 400
    config.fit.epochs = 2
    histo_jax.fit(config, tmp_path / "run")
    scores = histo_jax.evaluate(config, tmp_path / "run")
    assert scores["count"] == 160
    assert scores["auc"] > 0.7
    histo_jax.predict(config, tmp_path / "run")
    submission = pd.read_csv(tmp_path / "run" / "submission.csv")
    sample_submission = pd.read_csv(sample / "kaggle_sample" / "sample_submission.csv")
    assert submission["id"].tolist() == sample_submission["id"].tolist()
    assert submission["id"].is_unique
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
    assert len(prepare(config).tables["train"]) == 2500
