"""What `evaluate`, `predict` and `compare` compute for one run and for an ensemble."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

import histo_jax
from histo_jax import comparison, ensemble, evaluation, evaluation_files, inference
from histo_jax import report as histo_jax_report
from histo_jax.config import Config
from histo_jax.data import records, splits
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration, binary_scores, confidence_intervals
from histo_jax.preparation import prepare
from histo_jax.report import patches
from histo_jax.settings import load_run_config

PLAIN = {"optimizer_ema_decay": 0.5}
SYMMETRIC = {"model_name": "five_block_p4m"}


@pytest.fixture(scope="module")
def make(synthetic_records):
    """Makes the config of a small network on synthetic slides."""

    def make(**changes):
        config = Config()
        config.data.synthetic_slides = 8
        config.data.samples_per_class = 60
        config.data.validation_fraction = 0.5
        config.data.tfds_dir = synthetic_records
        config.model.features, config.model.dense = (2, 2, 2, 2, 2), 4
        config.fit.batch_size, config.fit.epochs = 8, 1
        config.optimizer.learning_rate = 3e-3
        config.predict.batch_size = 32
        for name, value in changes.items():
            group, field = name.split("_", 1)
            setattr(getattr(config, group), field, value)
        return config

    return make


@pytest.fixture(scope="module")
def runs(make, save_run, tmp_path_factory):
    """A run with a moving average and one of a symmetric network, on the same slides."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(make(**PLAIN), folder / "plain", Calibration(0.5, -0.2, 0.4))
    save_run(make(**SYMMETRIC), folder / "symmetric", Calibration(2.0, 0.3, 0.45))
    return folder


@pytest.fixture(scope="module")
def scores(make, runs):
    """Validation scores of both runs."""
    return {
        "plain": histo_jax.evaluate(make(**PLAIN), runs / "plain"),
        "symmetric": histo_jax.evaluate(make(**SYMMETRIC), runs / "symmetric"),
    }


def predictions(folder, split="validation"):
    path = folder / f"predictions_{split}.csv"
    return pd.read_csv(path, dtype={"id": str, "slide": str})


def test_scores_are_those_of_the_calibrated_predictions(runs, scores):
    scores, table = scores["plain"], predictions(runs / "plain")
    logits, labels = table["logit"].to_numpy(), table["label"].to_numpy(np.float64)
    for name, value in binary_scores(logits, labels).items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name
    slides = table["slide"].to_numpy()
    assert (scores["interval_over"], scores["resampled"]) == ("slides", len(set(slides)))
    for name, (low, high) in confidence_intervals(logits, labels, slides).items():
        assert scores[f"{name}_low"] == pytest.approx(low, rel=1e-6), name
        assert scores[f"{name}_high"] == pytest.approx(high, rel=1e-6), name
    (trained,) = histo_jax.load(runs / "plain").trained
    assert scores["calibration_scale"] == trained.calibration.scale
    assert scores["calibration_bias"] == trained.calibration.bias
    assert scores["checkpoint_step"] == trained.step
    assert scores["prior"] == labels.mean()
    raw = (logits - trained.calibration.bias) / trained.calibration.scale
    assert scores["nll_uncalibrated"] == pytest.approx(binary_scores(raw, labels)["nll"], rel=1e-4)
    assert "selected the checkpoint" in scores["note"]
    assert scores["slide_disjoint"]
    assert scores["patient_disjoint"] is None
    written = json.loads((runs / "plain" / "evaluation_validation.json").read_text())
    assert written == {name: None if value != value else value for name, value in scores.items()}


def test_test_scores_and_submission_are_calibrated_on_validation(make, runs):
    config, folder = make(**PLAIN), runs / "plain"
    scores = histo_jax.evaluate(make(**PLAIN, evaluate_split="test"), folder)
    (trained,) = histo_jax.load(folder).trained
    assert scores["note"] == ""
    assert scores["slide_disjoint"]
    assert scores["calibration_scale"] == trained.calibration.scale
    logits = predictions(folder, "test")["logit"]
    assert len(logits) == scores["count"]
    table = histo_jax.predict(config, folder)
    np.testing.assert_allclose(table["label"], expit(logits), rtol=1e-6)
    rare = histo_jax.predict(make(**PLAIN, predict_prior=0.1), folder)
    np.testing.assert_allclose(
        logit(rare["label"]) - logit(table["label"]),
        logit(0.1) - logit(trained.calibration.prior),
        rtol=1e-4,
    )


def test_batch_size_and_tta_mean_the_same_in_every_command(make, runs, tmp_path, monkeypatch):
    sizes = []

    def ordered_batches(source, rows, batch_size, real=inference.loader.ordered_batches):
        sizes.append(batch_size)
        return real(source, rows, batch_size)

    monkeypatch.setattr(inference.loader, "ordered_batches", ordered_batches)
    folder = shutil.copytree(runs / "plain", tmp_path / "run")
    config = make(**PLAIN, predict_batch_size=28, predict_tta=True, evaluate_split="test")
    assert histo_jax.evaluate(config, folder)["tta"] is True
    logits = predictions(folder, "test")["logit"]
    table = histo_jax.predict(config, folder)
    assert sizes == [28, 28]
    np.testing.assert_allclose(table["label"], expit(logits), rtol=1e-6)
    config.explain.ids = table["id"][0]
    explained = histo_jax_report.explain(config, folder)
    assert explained["tta"].all()
    np.testing.assert_allclose(explained["probability"], table["label"][:1], rtol=1e-5)
    plain = histo_jax.predict(make(**PLAIN), folder)
    assert np.abs(plain["label"] - table["label"]).max() > 1e-6


def test_an_ensemble_is_the_equal_mean_of_its_runs(make, runs, scores, tmp_path, monkeypatch):
    histo_jax.evaluate(make(predict_checkpoints=str(runs / "plain")), tmp_path / "ensemble")
    monkeypatch.chdir(runs)
    config = make(predict_checkpoints="plain, symmetric")
    result = histo_jax.evaluate(config, tmp_path / "ensemble")
    # A later command without settings of its own uses the same runs, from any folder.
    saved = load_run_config(tmp_path / "ensemble").predict.checkpoints
    assert saved == f"{runs / 'plain'},{runs / 'symmetric'}"
    mean = np.mean([predictions(runs / name)["logit"] for name in scores], axis=0)
    np.testing.assert_allclose(predictions(tmp_path / "ensemble")["logit"], mean, rtol=1e-5)
    for run, (name, alone) in zip(result["runs"], scores.items(), strict=True):
        assert run["run"] == str(runs / name)
        assert run["auc"] == pytest.approx(alone["auc"])
        assert run["nll"] == pytest.approx(alone["nll"], rel=1e-5)
    table = histo_jax.predict(config, tmp_path / "ensemble")
    probabilities = [
        histo_jax.predict(make(**changes), runs / name)["label"]
        for name, changes in (("plain", PLAIN), ("symmetric", SYMMETRIC))
    ]
    mean = np.mean([logit(each) for each in probabilities], axis=0)
    np.testing.assert_allclose(logit(table["label"]), mean, rtol=1e-4)


def test_the_folder_of_an_ensembles_run_stays_as_it_is(make, runs, tmp_path):
    """It may be training: a save is unfinished, another is about to be replaced."""
    unfinished = runs / "plain" / "checkpoints" / "99.orbax-checkpoint-tmp"
    replaced = runs / "plain" / "replaced" / "98"
    unfinished.mkdir()
    replaced.mkdir(parents=True)
    config = make(predict_checkpoints=f"{runs / 'plain'},{runs / 'symmetric'}")
    try:
        histo_jax.evaluate(config, tmp_path / "ensemble")
        assert unfinished.exists()
        assert replaced.exists()
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced.parent, ignore_errors=True)


def test_examples_that_have_changed_since_training_are_not_scored(make, runs):
    config = make(**PLAIN)
    tables = Path(config.data.tfds_dir).rglob("train.csv")
    (path,) = [path for path in tables if "seed0-" in str(path)]
    before = path.read_text()
    try:
        path.write_text(before.replace("synthetic-train-000", "synthetic-train-001"))
        with pytest.raises(UserError, match="no longer holds the examples"):
            histo_jax.evaluate(config, runs / "plain")
    finally:
        path.write_text(before)


def test_test_patches_of_one_class_have_no_scores(make, runs, monkeypatch):
    def one_class(*args, **options):
        prepared = records.prepare(*args, **options)
        prepared.tables["test"]["label"] = 0
        return prepared

    monkeypatch.setattr(evaluation, "prepare", one_class)
    with pytest.raises(UserError, match="test patches all have the label 0"):
        histo_jax.evaluate(make(**PLAIN, evaluate_split="test"), runs / "plain")


def test_a_test_split_that_shares_a_slide_and_lacks_a_label(make, runs, tmp_path, monkeypatch):
    def shared(*args, **options):
        prepared = records.prepare(*args, **options)
        prepared.tables["test"]["slide"] = prepared.tables["train"]["slide"].iloc[0]
        prepared.tables["test"].loc[0, "label"] = -1
        return prepared

    monkeypatch.setattr(evaluation, "prepare", shared)
    folder = shutil.copytree(runs / "plain", tmp_path / "run")
    config = make(**PLAIN, evaluate_split="test")
    scores = histo_jax.evaluate(config, folder)
    assert not scores["slide_disjoint"]
    assert "optimistic" in scores["note"]
    prepared = shared(config.data, config.data_seed)
    subsets = splits.make_subsets(prepared.tables, config.data, config.data_seed)
    scored = evaluation_files.subset(prepared, subsets, "test", predictions(folder, "test"))
    assert scored.rows.tolist() == list(range(1, len(prepared.tables["test"])))
    assert scores["count"] == len(scored.rows)


def test_a_folder_that_is_not_a_run_is_named(make, tmp_path):
    with pytest.raises(UserError, match="nowhere is not the folder of a run"):
        histo_jax.predict(make(predict_checkpoints="nowhere"), tmp_path)


def test_compare_pairs_the_runs_patch_by_patch(make, runs, scores, tmp_path):
    config = make(compare_runs=f"{runs / 'plain'},{runs / 'symmetric'}")
    result = comparison.compare(config, tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text()) == result
    assert result["interval_over"] == "slides"
    for name in ("auc", "nll", "accuracy"):
        difference = scores["symmetric"][name] - scores["plain"][name]
        assert result[name]["difference"] == pytest.approx(difference, abs=1e-6)
        low, high = result[name]["interval"]
        assert low <= high
    lines = comparison.table(result).splitlines()
    assert any("accuracy" in line for line in lines)
    assert lines[-1] == f"verdict: {result['verdict']}"
    # Of 4 slides even chance favours one run in all of them, 1 time in 8.
    assert "too few slides to show a difference (4;" in result["verdict"]
    itself = make(compare_runs=f"{runs / 'plain'},{runs / 'plain'}")
    assert comparison.compare(itself, tmp_path)["auc"]["difference"] == 0


@pytest.mark.usefixtures("scores")
def test_compare_refuses_runs_that_cannot_be_paired(make, runs, tmp_path):
    with pytest.raises(UserError, match=r"needs --config\.compare\.runs"):
        comparison.compare(make(), tmp_path)
    with pytest.raises(UserError, match=r"predictions_validation\.csv is missing"):
        comparison.compare(make(compare_runs=f"{runs / 'plain'},{tmp_path}"), tmp_path)
    other = predictions(runs / "plain").iloc[1:]
    (tmp_path / "other").mkdir()
    other.to_csv(tmp_path / "other" / "predictions_validation.csv", index=False)
    with pytest.raises(UserError, match="not evaluated on the same patches"):
        comparison.compare(make(compare_runs=f"{runs / 'plain'},{tmp_path / 'other'}"), tmp_path)


@pytest.fixture(scope="module")
def folds(make, save_run, tmp_path_factory):
    """Two runs of different seeds, each validated on one half of the slides."""
    folder = tmp_path_factory.mktemp("folds")
    for number in (1, 2):
        config = make(data_fold=f"{number}/2", data_split_seed=0)
        config.seed = number
        save_run(config, folder / str(number), Calibration(number, 0.1 * number, 0.5))
        histo_jax.evaluate(config, folder / str(number))
    return folder


def fold_config(make, *runs, **changes):
    return make(predict_checkpoints=",".join(map(str, runs)), **changes)


def mark_by_run(predictor, images):
    """Replaces `attribute`, which compiles for long; the corner has the sign of the one run."""
    (trained,) = predictor.trained
    maps = np.zeros(images.shape[:3], np.float32)
    maps[:, :4, :4] = 1 if trained.run.endswith("1") else -1
    return maps


def test_each_patch_of_a_cross_validation_is_scored_by_the_run_of_its_fold(
    make, folds, tmp_path, monkeypatch
):
    config, folder = fold_config(make, folds / "2", folds / "1"), tmp_path / "together"
    scores = histo_jax.evaluate(config, folder)
    assert scores["out_of_fold"] is True
    assert (scores["count"], scores["split_by"], scores["slide_disjoint"]) == (120, "slide", True)
    alone = {run: predictions(folds / run) for run in ("1", "2")}
    table = predictions(folder)
    both = pd.concat(alone.values()).set_index("id").loc[table["id"]]
    np.testing.assert_allclose(table["logit"], both["logit"], rtol=1e-5)
    labels = table["label"].to_numpy(np.float64)
    for name, value in binary_scores(table["logit"].to_numpy(), labels).items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name
    uncalibrated = 0.0
    for run, name in zip(scores["runs"], ("2", "1"), strict=True):
        own = json.loads((folds / name / "evaluation.json").read_text())
        assert run["run"] == str(folds / name)
        assert (run["count"], run["auc"]) == (own["count"], pytest.approx(own["auc"]))
        assert own["out_of_fold"] is False
        uncalibrated += own["nll_uncalibrated"] * own["count"] / scores["count"]
    assert scores["nll_uncalibrated"] == pytest.approx(uncalibrated, rel=1e-5)
    order = prepare(config).tables["train"]["id"].tolist()
    assert [row for row in order if row in set(table["id"])] == table["id"].tolist()

    monkeypatch.setattr(patches, "attribute", mark_by_run)
    page = histo_jax_report.report(config, folder).read_text()
    assert "Cross-validation with 2 runs, each scored on the patches" in page
    assert "for each run." in page  # how to get an audit
    explained = histo_jax_report.explain(config, folder).set_index("id")["probability"]
    expected = expit(table.set_index("id")["logit"])
    np.testing.assert_allclose(explained, expected.loc[explained.index], rtol=1e-6)
    by_id = make(predict_checkpoints=config.predict.checkpoints, explain_ids=table["id"][0])
    explained = histo_jax_report.explain(by_id, folder).set_index("id")["probability"]
    np.testing.assert_allclose(explained, expected.loc[explained.index], rtol=1e-5)
    itself = make(compare_runs=f"{folder},{folder}")
    assert comparison.compare(itself, tmp_path)["auc"]["difference"] == 0


def test_a_patch_is_explained_by_the_run_that_has_scored_it(make, folds, monkeypatch):
    config = fold_config(make, folds / "1", folds / "2")
    prepared = prepare(config)
    predictor = ensemble.load_predictor(config, folds)
    subsets = ensemble.fold_subsets(predictor.trained, config, prepared)
    rows = np.concatenate([subsets[1].validation.rows[:2], subsets[0].validation.rows[:1]])
    networks, none = (
        patches.scoring_networks(predictor, config, prepared, {"out_of_fold": is_folds}, rows)
        for is_folds in (True, False)
    )
    assert networks.tolist() == [1, 1, 0]
    assert none is None
    monkeypatch.setattr(patches, "attribute", mark_by_run)
    gathered = patches.gather(prepared, "train", rows, predictor, np.zeros(3), networks)
    ids = [patch.id for patch in gathered]
    assert ids == prepared.tables["train"]["id"].iloc[rows].tolist()
    corners = np.stack([patch.attribution[0, 0] for patch in gathered]).astype(int)
    is_orange = corners[:, 0] > corners[:, 2]
    assert is_orange.tolist() == [False, False, True]


def test_folds_score_and_predict_test_patches_by_their_mean(make, folds, tmp_path):
    config = fold_config(make, folds / "1", folds / "2", evaluate_split="test")
    scores = histo_jax.evaluate(config, tmp_path / "ensemble")
    assert (scores["out_of_fold"], scores["slide_disjoint"]) == (False, True)
    assert len({run["count"] for run in scores["runs"]}) == 1
    table = histo_jax.predict(config, tmp_path / "ensemble")
    logits = predictions(tmp_path / "ensemble", "test")["logit"]
    np.testing.assert_allclose(table["label"], expit(logits), rtol=1e-6)


def test_ensembles_that_cannot_be_scored_are_refused(make, folds, runs, tmp_path):
    def refused(message, *names, **changes):
        config = fold_config(make, *names, **changes)
        with pytest.raises(UserError, match=message):
            histo_jax.evaluate(config, tmp_path / "ensemble")
        assert not (tmp_path / "ensemble").exists()

    def copy(name, **changes):
        shutil.copytree(folds / "2", tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / name

    one, two = folds / "1", folds / "2"
    refused(r"has no run with data\.fold = 2/2", one)
    refused(r"checkpoints: duplicate run \S+1; name each run once", one, two, one)
    refused(r"2 and \S+ both validate on fold 2/2", one, two, copy("again"))
    refused(r"runs of 2 and of 3 folds", one, copy("three", **{"data.fold": "2/3"}))
    refused("leave out --config.data.fold", one, two, data_fold="1/2")
    refused(r"other patches than this command.*samples_per_class=\d+", one, two,
            data_samples_per_class=20)  # fmt: skip
    refused(r"2 was trained on \d+ of the 59 patches", runs / "plain", two)


def test_an_ensemble_leaves_a_runs_own_files_alone(make, folds):
    """Its scores and its submission would be replaced by those of the mean."""
    folder = folds / "1"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = fold_config(make, folds / "2", folder, data_fold="1/2", data_split_seed=0)
    config.seed = 1
    modes = (
        histo_jax.evaluate, histo_jax.predict, histo_jax_report.report, histo_jax_report.explain
    )  # fmt: skip
    for mode in modes:
        with pytest.raises(UserError, match=r"itself a trained run.*choose another --workdir"):
            mode(config, folder)
    with pytest.raises(UserError, match=r"predict\.checkpoints .*leave it out to train"):
        histo_jax.fit(config, folder.parent / "new")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
