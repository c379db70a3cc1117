"""What `evaluate`, `predict` and `compare` make of one run and of several."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

import histo_jax
from histo_jax import comparison, ensemble, evaluation
from histo_jax import report as histo_jax_report
from histo_jax.config import Config
from histo_jax.data import records
from histo_jax.distributed import mesh
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration, binary_scores, confidence_intervals
from histo_jax.report import patches
from histo_jax.settings import load_run_config
from histo_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes the config of a small network on drawn slides."""
    folder = tmp_path_factory.mktemp("records")

    def make(**changes):
        config = Config()
        config.data.synthetic_slides = 8
        config.data.samples_per_class = 60
        config.data.validation_fraction = 0.5
        config.data.tfds_dir = str(folder)
        config.model.features, config.model.dense = (2, 2, 2, 2, 2), 4
        config.fit.batch_size, config.fit.epochs = 8, 1
        config.optimizer.learning_rate = 3e-3
        for name, value in changes.items():
            group, field = name.split("_", 1)
            setattr(getattr(config, group), field, value)
        return config

    return make


@pytest.fixture(scope="module")
def runs(make, tmp_path_factory):
    """A plain run with a moving average and a symmetric one, on the same slides."""
    folder = tmp_path_factory.mktemp("runs")
    histo_jax.fit(make(optimizer_ema_decay=0.5), folder / "plain")
    histo_jax.fit(make(model_name="five_block_p4m"), folder / "symmetric")
    return folder


def predictions(folder, split="validation"):
    path = folder / f"predictions_{split}.csv"
    return pd.read_csv(path, dtype={"id": str, "slide": str})


def calibration_of(config, folder):
    with Checkpoints(folder) as checkpoints:
        best = checkpoints.restore_best(config, mesh.replicated(mesh.batch_sharding()))
    return Calibration(**best.data["calibration"])


def test_scores_are_those_of_the_calibrated_predictions(make, runs):
    config, folder = make(optimizer_ema_decay=0.5), runs / "plain"
    scores = histo_jax.evaluate(config, folder)
    table = predictions(folder)
    logits, labels = table["logit"].to_numpy(), table["label"].to_numpy(np.float64)
    for name, value in binary_scores(logits, labels).items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name
    slides = table["slide"].to_numpy()
    assert (scores["interval_over"], scores["resampled"]) == ("slides", len(set(slides)))
    for name, (low, high) in confidence_intervals(logits, labels, slides).items():
        assert scores[f"{name}_low"] == pytest.approx(low, rel=1e-6), name
        assert scores[f"{name}_high"] == pytest.approx(high, rel=1e-6), name
    calibration = calibration_of(config, folder)
    assert scores["calibration_scale"] == calibration.scale
    assert scores["prior"] == calibration.prior == labels.mean()
    raw = (logits - calibration.bias) / calibration.scale
    assert scores["nll_uncalibrated"] == pytest.approx(binary_scores(raw, labels)["nll"], rel=1e-4)
    assert scores["nll"] <= scores["nll_uncalibrated"]
    assert "chose the checkpoint" in scores["note"]
    assert scores["slide_disjoint"]


def test_the_test_side_is_scored_with_the_validations_calibration(make, runs):
    config, folder = make(optimizer_ema_decay=0.5, evaluate_split="test"), runs / "plain"
    scores = histo_jax.evaluate(config, folder)
    assert scores["note"] == ""
    assert scores["calibration_scale"] == calibration_of(config, folder).scale
    assert len(predictions(folder, "test")) == scores["count"]


def test_the_submission_is_calibrated_and_moves_with_the_prior(make, runs):
    config, folder = make(optimizer_ema_decay=0.5), runs / "plain"
    evaluated = make(optimizer_ema_decay=0.5, evaluate_split="test")
    histo_jax.evaluate(evaluated, folder)
    table = histo_jax.predict(config, folder)
    np.testing.assert_allclose(
        table["label"], expit(predictions(folder, "test")["logit"]), rtol=1e-4
    )
    rare = histo_jax.predict(make(optimizer_ema_decay=0.5, predict_prior=0.1), folder)
    prior = calibration_of(config, folder).prior
    np.testing.assert_allclose(
        logit(rare["label"]) - logit(table["label"]), logit(0.1) - logit(prior), rtol=1e-4
    )


def test_averaging_changes_a_plain_network_and_not_a_symmetric_one(make, runs):
    for name, differs in (("plain", True), ("symmetric", False)):
        changes = {"optimizer_ema_decay": 0.5} if differs else {"model_name": "five_block_p4m"}
        plain = histo_jax.predict(make(**changes), runs / name)
        averaged = histo_jax.predict(make(**changes, predict_tta=True), runs / name)
        assert (np.abs(plain["label"] - averaged["label"]).max() > 1e-6) == differs


def test_an_ensemble_is_the_equal_mean_of_its_members(make, runs, tmp_path, monkeypatch):
    histo_jax.evaluate(make(predict_checkpoints=str(runs / "plain")), tmp_path / "ensemble")
    monkeypatch.chdir(runs)
    together = make(predict_checkpoints="plain, symmetric")
    scores = histo_jax.evaluate(together, tmp_path / "ensemble")
    # What was last asked for is what a command without settings of its own means, from anywhere.
    kept = load_run_config(tmp_path / "ensemble").predict.checkpoints
    assert kept == f"{runs / 'plain'},{runs / 'symmetric'}"
    each = {
        "plain": histo_jax.evaluate(make(optimizer_ema_decay=0.5), runs / "plain"),
        "symmetric": histo_jax.evaluate(make(model_name="five_block_p4m"), runs / "symmetric"),
    }
    mean = np.mean([predictions(runs / name)["logit"] for name in each], axis=0)
    np.testing.assert_allclose(predictions(tmp_path / "ensemble")["logit"], mean, rtol=1e-5)
    for member, (name, alone) in zip(scores["members"], each.items(), strict=True):
        assert member["run"] == str(runs / name)
        assert member["auc"] == pytest.approx(alone["auc"])
        assert member["nll"] == pytest.approx(alone["nll"], rel=1e-5)
    table = histo_jax.predict(together, tmp_path / "ensemble")
    probabilities = [
        logit(histo_jax.predict(config, runs / name)["label"])
        for name, config in (
            ("plain", make(optimizer_ema_decay=0.5)),
            ("symmetric", make(model_name="five_block_p4m")),
        )
    ]
    np.testing.assert_allclose(logit(table["label"]), np.mean(probabilities, axis=0), rtol=1e-4)


def test_a_member_that_has_trained_on_the_scored_patches_is_refused(make, runs, tmp_path):
    other = make()
    other.seed = 1  # divides the slides otherwise
    histo_jax.fit(other, tmp_path / "other")
    together = make(predict_checkpoints=f"{runs / 'plain'},{tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"other has trained on \d+ of the 59 patches"):
        histo_jax.evaluate(together, tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


def test_the_folder_of_a_member_is_left_as_it_is(make, runs, tmp_path):
    """It may be training: a save is half done, another is about to be replaced."""
    begun = runs / "plain" / "checkpoints" / "99.orbax-checkpoint-tmp"
    replaced = runs / "plain" / "replaced" / "98"
    begun.mkdir()
    replaced.mkdir(parents=True)
    together = make(predict_checkpoints=f"{runs / 'plain'},{runs / 'symmetric'}")
    try:
        histo_jax.evaluate(together, tmp_path / "ensemble")
        assert begun.exists()
        assert replaced.exists()
    finally:
        shutil.rmtree(begun, ignore_errors=True)
        shutil.rmtree(replaced.parent, ignore_errors=True)


def test_examples_that_have_changed_since_are_not_scored(make, tmp_path):
    config = make(data_samples_per_class=30)
    histo_jax.fit(config, tmp_path)
    table = Path(config.data.tfds_dir).rglob("train.csv")
    (path,) = [path for path in table if "seed0-" in str(path)]
    before = path.read_text()
    try:
        path.write_text(before.replace("synthetic-train-000", "synthetic-train-001"))
        with pytest.raises(UserError, match="no longer holds the examples"):
            histo_jax.evaluate(config, tmp_path)
    finally:
        path.write_text(before)


def test_test_patches_of_one_class_have_no_scores(make, runs, monkeypatch):
    def one_class(*args, **options):
        prepared = records.prepare(*args, **options)
        prepared.tables["test"]["label"] = 0
        return prepared

    monkeypatch.setattr(evaluation, "prepare", one_class)
    with pytest.raises(UserError, match="test patches are all labelled 0"):
        histo_jax.evaluate(make(optimizer_ema_decay=0.5, evaluate_split="test"), runs / "plain")


def test_a_test_side_that_shares_a_slide_with_training_is_not_honest(make, runs, monkeypatch):
    def shared(*args, **options):
        prepared = records.prepare(*args, **options)
        prepared.tables["test"]["slide"] = prepared.tables["train"]["slide"].iloc[0]
        return prepared

    config = make(optimizer_ema_decay=0.5, evaluate_split="test")
    assert histo_jax.evaluate(config, runs / "plain")["slide_disjoint"]
    monkeypatch.setattr(evaluation, "prepare", shared)
    scores = histo_jax.evaluate(
        make(optimizer_ema_decay=0.5, evaluate_split="test"), runs / "plain"
    )
    assert not scores["slide_disjoint"]
    assert "optimistic" in scores["note"]


def test_a_member_that_is_no_run_is_named(make, tmp_path):
    with pytest.raises(UserError, match="nowhere is not the folder of a run"):
        histo_jax.predict(make(predict_checkpoints="nowhere"), tmp_path)


def test_compare_pairs_the_runs_patch_by_patch(make, runs, tmp_path):
    first = histo_jax.evaluate(make(optimizer_ema_decay=0.5), runs / "plain")
    second = histo_jax.evaluate(make(model_name="five_block_p4m"), runs / "symmetric")
    config = make(compare_runs=f"{runs / 'plain'},{runs / 'symmetric'}")
    result = comparison.compare(config, tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text()) == result
    assert result["interval_over"] == "slides"
    for name in ("auc", "nll", "accuracy"):
        wanted = second[name] - first[name]
        assert result[name]["difference"] == pytest.approx(wanted, abs=1e-6)
        low, high = result[name]["interval"]
        assert low <= high
    lines = comparison.table(result).splitlines()
    assert any("accuracy" in line for line in lines)
    assert lines[-1] == f"verdict: {result['verdict']}"
    # Of 4 slides even chance favours one run in all of them, 1 time in 8.
    assert result["verdict"] == (
        "no difference can be shown with so few slides (4; at least 6 are needed)"
    )
    itself = make(compare_runs=f"{runs / 'plain'},{runs / 'plain'}")
    assert comparison.compare(itself, tmp_path)["auc"]["difference"] == 0


def test_compare_refuses_what_it_cannot_pair(make, runs, tmp_path):
    histo_jax.evaluate(make(optimizer_ema_decay=0.5), runs / "plain")
    with pytest.raises(UserError, match=r"needs --config\.compare\.runs"):
        comparison.compare(make(), tmp_path)
    with pytest.raises(UserError, match=r"predictions_validation\.csv is missing"):
        comparison.compare(make(compare_runs=f"{runs / 'plain'},{tmp_path}"), tmp_path)
    other = predictions(runs / "plain").iloc[1:]
    (tmp_path / "other").mkdir()
    other.to_csv(tmp_path / "other" / "predictions_validation.csv", index=False)
    with pytest.raises(UserError, match="not scored on the same patches"):
        comparison.compare(make(compare_runs=f"{runs / 'plain'},{tmp_path / 'other'}"), tmp_path)


@pytest.fixture(scope="module")
def folds(make, tmp_path_factory):
    """Two runs of other seeds, each validated on one half of the slides."""
    folder = tmp_path_factory.mktemp("folds")
    for number in (1, 2):
        config = make(data_fold=f"{number}/2", data_split_seed=0)
        config.seed = number
        histo_jax.fit(config, folder / str(number))
        histo_jax.evaluate(config, folder / str(number))
    return folder


def fold_config(make, *runs, **changes):
    return make(predict_checkpoints=",".join(map(str, runs)), **changes)


def by_the_only_one(trained, images):
    """Stands in for the minutes of compiling of `patches.look`; marks the pixels by the run."""
    (member,) = trained
    heat = np.zeros(images.shape[:3], np.float32)
    heat[:, :4, :4] = 1 if member.run.endswith("1") else -1
    return np.zeros(len(images)), heat


def test_folds_are_scored_each_patch_by_the_run_that_has_not_trained_on_it(
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
    for member, run in zip(scores["members"], ("2", "1"), strict=True):
        own = json.loads((folds / run / "evaluation.json").read_text())
        assert member["run"] == str(folds / run)
        assert (member["count"], member["auc"]) == (own["count"], pytest.approx(own["auc"]))
        assert own["out_of_fold"] is False
    order = histo_jax.prepare(config).tables["train"]["id"].tolist()
    assert [row for row in order if row in set(table["id"])] == table["id"].tolist()

    monkeypatch.setattr(patches, "look", by_the_only_one)
    page = histo_jax_report.report(config, folder).read_text()
    assert "scored by the one of 2 runs that has not trained on it" in page
    assert "of each run." in page  # where an audit is to be had
    by_id = make(predict_checkpoints=config.predict.checkpoints, explain_ids=table["id"][0])
    histo_jax_report.explain(by_id, folder)  # by one run alone, or the stand-in complains
    shown = histo_jax_report.explain(config, folder).set_index("id")["probability"]
    wanted = table.set_index("id")["logit"].loc[shown.index]
    np.testing.assert_allclose(shown, expit(wanted), rtol=1e-6)
    itself = make(compare_runs=f"{folder},{folder}")
    assert comparison.compare(itself, tmp_path)["auc"]["difference"] == 0


def test_what_explains_a_patch_is_the_run_that_has_scored_it(make, folds, monkeypatch):
    config = fold_config(make, folds / "1", folds / "2")
    prepared = histo_jax.prepare(config)
    trained = ensemble.restore(config, folds, mesh.replicated(mesh.batch_sharding()))
    subsets = ensemble.fold_subsets(trained, config, prepared)
    rows = np.concatenate([subsets[1].validation.rows[:2], subsets[0].validation.rows[:1]])
    owners = patches.owners(trained, config, prepared, {"out_of_fold": True}, rows)
    assert owners.tolist() == [1, 1, 0]
    assert patches.owners(trained, config, prepared, {"out_of_fold": False}, rows) is None
    monkeypatch.setattr(patches, "look", by_the_only_one)
    found = patches.gather(prepared, "train", rows, trained, np.zeros(3), owners)
    assert [p.id for p in found] == prepared.tables["train"]["id"].iloc[rows].tolist()
    corners = np.stack([p.saliency[0, 0] for p in found]).astype(int)
    is_orange = corners[:, 0] > corners[:, 2]
    assert is_orange.tolist() == [False, False, True]


def test_folds_score_and_predict_test_patches_as_the_mean_of_all(make, folds, tmp_path):
    config = fold_config(make, folds / "1", folds / "2", evaluate_split="test")
    scores = histo_jax.evaluate(config, tmp_path / "ensemble")
    assert (scores["out_of_fold"], scores["slide_disjoint"]) == (False, True)
    assert len({member["count"] for member in scores["members"]}) == 1
    table = histo_jax.predict(config, tmp_path / "ensemble")
    np.testing.assert_allclose(
        logit(table["label"]), predictions(tmp_path / "ensemble", "test")["logit"], rtol=1e-3
    )


def test_folds_that_do_not_make_a_whole_are_refused(make, folds, runs, tmp_path):
    def refused(words, *names, **changes):
        config = fold_config(make, *names, **changes)
        with pytest.raises(UserError, match=words):
            histo_jax.evaluate(config, tmp_path / "ensemble")
        assert not (tmp_path / "ensemble").exists()

    def copy(name, **changes):
        shutil.copytree(folds / "2", tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / name

    one, two = folds / "1", folds / "2"
    refused(r"names no run with data\.fold = 2/2", one)
    refused(r"1 twice, which would count double", one, two, one)
    refused(r"2 and \S+ both validate on fold 2/2", one, two, copy("again"))
    refused(r"runs of 2 and of 3 folds", one, copy("three", **{"data.fold": "2/3"}))
    refused("leave out --config.data.fold", one, two, data_fold="1/2")
    refused(r"other patches than this command.*samples_per_class=\d+", one, two,
            data_samples_per_class=20)  # fmt: skip
    refused(r"has trained on", one, two, runs / "symmetric")


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
        with pytest.raises(UserError, match=r"a run of its own.*choose another --workdir"):
            mode(config, folder)
    with pytest.raises(UserError, match=r"predict\.checkpoints .*leave it out to train"):
        histo_jax.fit(config, folder.parent / "new")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
