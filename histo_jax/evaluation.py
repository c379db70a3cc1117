"""Scores of a run's best checkpoint, or of an ensemble of runs."""

import dataclasses
import logging
import os
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from histo_jax import command, ensemble, evaluation_files, inference, provenance
from histo_jax.config import Config
from histo_jax.data import overlap, splits
from histo_jax.data.records import Prepared, prepare
from histo_jax.distributed import consensus
from histo_jax.errors import DataError, UserError
from histo_jax.metrics import (
    binary_scores,
    confidence_intervals,
    few_note,
    operating_points,
)
from histo_jax.predictor import Predictor
from histo_jax.run.workdir import Workdir

log = logging.getLogger("histo_jax")

_SELECTION_BIAS = "these patches selected the checkpoint and were used to fit its calibration"


def evaluate(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Scores the best checkpoint of `workdir` on `config.evaluate.split`, or its maps of slides.

    Every example counts exactly once. With `config.predict.tta` its logit is the mean over the
    eight symmetries of the image. With `config.predict.checkpoints` it is the equal mean of the
    calibrated logits of these runs; if the runs are the folds of a cross-validation (`data.fold`),
    it is the logit of the one run that was not trained on the patch. Writes `evaluation.json`,
    `evaluation_<split>.json`, and `predictions_<split>.csv` with `id`, `label`, `slide`, the
    calibrated `logit` and, where known, `patient` and `path`.

    With `config.evaluate.slides` maps of these annotated slides are scored instead, see
    `slide_evaluation.evaluate_slides`.

    Args:
        config: settings of the run; lengths, folders and what is evaluated may differ.
        workdir: folder of a trained run; any folder with `predict.checkpoints`.

    Returns:
        `split`; `count` of examples; the scores of `metrics.weighted_scores` for calibrated
        probabilities, and the ends of the 95% interval of each, such as `auc_low` and `auc_high`
        (nan with a single slide); `interval_over`, 'patients', 'slides' or 'patches', and the
        number `resampled`; the probabilities of `metrics.operating_points`; `nll_uncalibrated`;
        `prior`, the fraction of tumour; `tta`; `split_by`, see `splits.Subsets`; `slide_disjoint`
        and `patient_disjoint`, whether no slide and no patient is shared with training (None = not
        known), and a `note`; `out_of_fold`, whether each patch was scored by the run of its fold;
        `checkpoint_step`, `calibration_scale` and `calibration_bias`, or, for an ensemble, `runs`
        with the scores of each.

    Raises:
        UserError: there is no checkpoint, or one of another model; the split has no labels; a run
            of an ensemble was trained on these patches; or a fold is missing.
        OSError: a file cannot be written.
    """
    if config.evaluate.slides:
        from histo_jax.slide_evaluation import evaluate_slides

        return evaluate_slides(config, workdir)
    with command.start(config, workdir, "evaluate") as run:
        return evaluate_in(run, config)


def evaluate_in(run: Workdir, config: Config) -> dict[str, Any]:
    """Does the work of `evaluate` in an open folder."""
    predictor = ensemble.load_predictor(config, run.path)
    network = type(predictor.trained[0].model)
    provenance.warn_of_changed_network(run, network, config.config_file)
    prepared = prepare(config.data, config.data_seed, run.path, raw_may_be_gone=True)
    ensemble.check_size(predictor, config, prepared)
    consensus.check_records(config, prepared.tables)
    task = _plan(predictor, config, prepared)
    ensemble.acquire(run, config, prepared)
    log.info("compiling the evaluation step")
    logits = _compute_logits(predictor, prepared, task)
    table = prepared.tables[task.subset.records].iloc[task.subset.rows]
    labels = table["label"].to_numpy(np.float64)
    result = _score(table, logits, task, config)
    result |= _describe_networks(predictor, labels, logits, task, config)
    split = config.evaluate.split
    evaluation_files.write(run, split, table.assign(logit=logits.calibrated))
    run.write_json(f"evaluation_{split}.json", result)
    run.write_json("evaluation.json", result)
    _log(result)
    return result


class _Task(NamedTuple):
    """What is scored, and by which networks.

    Attributes:
        subset: the patches.
        positions: for each network int64[m], the positions in `subset` of the patches it scores.
        split_by: see `splits.Subsets`.
        slide_disjoint: see `splits.Subsets`.
        patient_disjoint: see `splits.Subsets`.
        out_of_fold: whether each patch is scored by one network only.
    """

    subset: splits.Subset
    positions: list[np.ndarray]
    split_by: str
    slide_disjoint: bool | None
    patient_disjoint: bool | None
    out_of_fold: bool


class _Logits(NamedTuple):
    """Logits of the patches of a task.

    Attributes:
        calibrated: float64[n].
        raw: float32[n], before calibration.
        by_network: for each network float64[m], the calibrated logits of its `positions`.
    """

    calibrated: np.ndarray
    raw: np.ndarray
    by_network: list[np.ndarray]


def _plan(predictor: Predictor, config: Config, prepared: Prepared) -> _Task:
    if ensemble.are_folds(predictor.trained, config):
        return _plan_out_of_fold(predictor, config, prepared)
    return _plan_split(predictor, config, prepared)


def _plan_split(predictor: Predictor, config: Config, prepared: Prepared) -> _Task:
    """Every network scores all patches of `config.evaluate.split`."""
    name = config.evaluate.split
    subsets = splits.make_subsets(prepared.tables, config.data, config.data_seed)
    every = subsets.validation if name == "validation" else subsets.test
    if every is None or not (subset := splits.labelled(prepared.tables, every)).rows.size:
        raise DataError(
            f"the test patches of config.data.source = {config.data.source!r} are missing or "
            "have no labels: use --mode=predict, or --config.evaluate.split=validation"
        )
    if missing := len(every.rows) - len(subset.rows):
        log.warning("%d %s patches have no label and are not scored", missing, name)
    labels = prepared.tables[subset.records]["label"].to_numpy()[subset.rows]
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"the {len(labels)} {name} patches all have the label {labels[0]}, but scores need "
            "both classes: use --mode=predict, or --config.evaluate.split=validation"
        )
    if config.predict.checkpoints:
        disjoint = ensemble.check_unseen(predictor.trained, config, prepared, subset)
    else:
        fingerprint = splits.fingerprint(
            prepared.tables, subsets, config.seed, config.fit.batch_size
        )
        known = predictor.trained[0].fingerprint
        splits.check_fingerprint(known, fingerprint, config.data.tfds_dir)
        parts = [(prepared.tables[part.records], part.rows) for part in (subsets.train, subset)]
        disjoint = overlap.disjoint(*parts), overlap.disjoint_patients(*parts)
        if name == "validation":
            disjoint = subsets.slide_disjoint, subsets.patient_disjoint
    positions = [np.arange(len(labels))] * len(predictor.trained)
    return _Task(subset, positions, subsets.by, *disjoint, out_of_fold=False)


def _plan_out_of_fold(predictor: Predictor, config: Config, prepared: Prepared) -> _Task:
    """Each network scores the fold that it was validated on."""
    folds = ensemble.fold_subsets(predictor.trained, config, prepared)
    first = predictor.trained[0]
    subset = splits.draw_sample(prepared.tables, first.config.data, first.config.data_seed)
    data = dataclasses.replace(config.data, fold=first.config.data.fold)
    own = splits.draw_sample(prepared.tables, data, config.data_seed)
    # The report draws the sample by this command's settings, which the workdir keeps.
    if not np.array_equal(own.rows, subset.rows):
        raise UserError(
            f"{first.run} was trained on other patches than this command draws: set "
            f"--config.data.samples_per_class={first.config.data.samples_per_class} and "
            f"--config.data.split_seed={first.config.data_seed}, as in that run"
        )
    return _Task(
        subset,
        [np.searchsorted(subset.rows, subsets.validation.rows) for subsets in folds],
        folds[0].by,
        overlap.combine(subsets.slide_disjoint for subsets in folds),
        overlap.combine(subsets.patient_disjoint for subsets in folds),
        out_of_fold=True,
    )


def _compute_logits(predictor: Predictor, prepared: Prepared, task: _Task) -> _Logits:
    source, rows = prepared.source(task.subset.records), task.subset.rows
    if not task.out_of_fold:
        raw = inference.raw_logits(predictor, source, rows, "evaluating")
        calibrated = predictor.calibrate(raw)
        return _Logits(calibrated.mean(0), raw.mean(0), list(calibrated))
    by_network, raw = [], np.empty(len(rows), np.float32)
    all_calibrated = np.empty(len(rows))
    for number, positions in enumerate(task.positions):
        network = predictor.select(number)
        own = inference.raw_logits(network, source, rows[positions], "evaluating")
        by_network.append(network.calibrate(own)[0])
        raw[positions], all_calibrated[positions] = own[0], by_network[-1]
    return _Logits(all_calibrated, raw, by_network)


def _score(table: pd.DataFrame, logits: _Logits, task: _Task, config: Config) -> dict[str, Any]:
    """Returns what `evaluate` returns, without what depends on the networks themselves."""
    labels, (unit, groups) = table["label"].to_numpy(np.float64), evaluation_files.resampled(table)
    scores = binary_scores(logits.calibrated, labels)
    intervals = confidence_intervals(logits.calibrated, labels, groups, config.seed)
    split = config.evaluate.split
    caveat = overlap.caveat(task.slide_disjoint, task.patient_disjoint)
    notes = [caveat, _SELECTION_BIAS * (split == "validation")]
    return {
        "split": split,
        **scores,
        **{f"{score}_low": low for score, (low, _) in intervals.items()},
        **{f"{score}_high": high for score, (_, high) in intervals.items()},
        **operating_points(logits.calibrated, labels),
        "interval_over": unit,
        "resampled": len(labels) if groups is None else len(np.unique(groups)),
        "nll_uncalibrated": binary_scores(logits.raw, labels)["nll"],
        "prior": float(labels.mean()),
        "tta": config.predict.tta,
        "split_by": task.split_by,
        "slide_disjoint": task.slide_disjoint,
        "patient_disjoint": task.patient_disjoint,
        "out_of_fold": task.out_of_fold,
        "note": "; ".join(filter(None, notes)),
    }


def _describe_networks(
    predictor: Predictor, labels: np.ndarray, logits: _Logits, task: _Task, config: Config
) -> dict[str, Any]:
    """Returns step and calibration of a single run, or the scores of each run of an ensemble."""
    if config.predict.checkpoints:
        by_network = zip(predictor.trained, logits.by_network, task.positions, strict=True)
        return {
            "runs": [
                {"run": t.run, "checkpoint_step": t.step, **binary_scores(own, labels[positions])}
                for t, own, positions in by_network
            ]
        }
    (trained,) = predictor.trained
    return {
        "checkpoint_step": trained.step,
        "calibration_scale": trained.calibration.scale,
        "calibration_bias": trained.calibration.bias,
    }


def _log(result: dict[str, Any]) -> None:
    log.info(
        "%s%s: AUC %.4f (95%% %.4f to %.4f, over %s), NLL %.4f, accuracy %.4f on %d patches",
        result["split"], ", out of fold" if result["out_of_fold"] else "", result["auc"],
        result["auc_low"], result["auc_high"], result["interval_over"], result["nll"],
        result["accuracy"], result["count"],
    )  # fmt: skip
    if few := few_note(result["resampled"], result["interval_over"]):
        log.warning("%s", few)
    if caveat := overlap.caveat(result["slide_disjoint"], result["patient_disjoint"]):
        log.warning("%s", caveat)
