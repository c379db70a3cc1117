"""Scores of the best checkpoint, or of several runs' together."""

import dataclasses
import logging
import os
from typing import Any, NamedTuple

import numpy as np

from histo_jax import command, ensemble, evaluation_files
from histo_jax.config import Config
from histo_jax.data import splits
from histo_jax.data.example import UNLABELLED
from histo_jax.data.records import Prepared, prepare
from histo_jax.distributed import consensus, mesh
from histo_jax.errors import UserError
from histo_jax.metrics import binary_scores, confidence_intervals, operating_points
from histo_jax.run import progress, signals
from histo_jax.run.workdir import Workdir
from histo_jax.training import placement
from histo_jax.training import step as steps

log = logging.getLogger("histo_jax")

_SELECTED = "these patches chose the checkpoint and fitted its calibration"


def evaluate(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Scores the best checkpoint of `workdir` on `config.evaluate.split`.

    Every example counts once. With `config.predict.tta` its logit is the mean over eight
    symmetries; with `config.predict.checkpoints` it is the equal mean of these runs' calibrated
    logits, or, if these runs are the folds of a cross-validation (`data.fold`), that of the one run
    which has not trained on the patch. Writes `evaluation.json`, `evaluation_<split>.json`, and
    `predictions_<split>.csv` with `id`, `label`, `slide` and the calibrated `logit`.

    Args:
        config: that of the run; lengths, folders and what to evaluate may differ.
        workdir: folder of a run that `fit` has trained; with `predict.checkpoints` any.

    Returns:
        `split`; `count` of examples; the scores of `metrics.weighted_scores` with calibrated
        probabilities, and for each the ends of its 95% interval, `auc_low` and `auc_high` (nan with
        one slide); `interval_over`, 'slides' or 'patches', and how many `resampled`; the
        probabilities of `metrics.operating_points`; `nll_uncalibrated`; `prior`, the share of
        tumour; `tta` as set; `split_by`, 'slide', 'image' or 'official'; `honest`, whether the
        score speaks of slides that training has not seen (None = not known), and a `note`;
        `out_of_fold`, whether each patch was scored by one fold's run; `checkpoint_step`;
        `calibration_scale` and `calibration_bias`; `members`, for each run of an ensemble its
        scores on what it has scored.

    Raises:
        UserError: no checkpoint, one of another model, a split without labels, a run of an
            ensemble that has trained on these patches, or a fold that is missing.
        OSError: a file cannot be written.
    """
    with command.start(config, workdir, "evaluate") as run:
        return evaluate_in(run, config)


def evaluate_in(run: Workdir, config: Config) -> dict[str, Any]:
    """Does the work of `evaluate` in an open folder."""
    folder = run.path
    batch_sharding = mesh.batch_sharding()
    trained = ensemble.restore(config, folder, mesh.replicated(batch_sharding))
    prepared = prepare(config.data, config.data_seed, folder, raw_may_be_gone=True)
    consensus.check_records(config, prepared.tables)
    name = config.evaluate.split
    is_folds = ensemble.are_folds(trained, config)
    chosen = (_out_of_fold if is_folds else _of_split)(trained, config, prepared)
    subset, slide_disjoint = chosen.subset, chosen.slide_disjoint
    table = prepared.tables[subset.records].iloc[subset.rows]
    labels = table["label"].to_numpy(np.float64)
    if config.predict.checkpoints:
        run.acquire(config)
        run.save_config(config)
        run.update_status(records=prepared.name)
    slides = evaluation_files.slides(table)
    log.info("compiling the evaluation step")
    raw = [
        _logits(run, config, member, prepared, subset._replace(rows=subset.rows[places]))
        for member, places in zip(trained, chosen.places, strict=True)
    ]
    calibrated = [m.calibration.apply(z) for m, z in zip(trained, raw, strict=True)]
    logits, uncalibrated = (
        np.concatenate(parts)[np.argsort(np.concatenate(chosen.places))]
        if is_folds
        else np.mean(parts, axis=0)
        for parts in (calibrated, raw)
    )
    scores = binary_scores(logits, labels)
    ends = confidence_intervals(logits, labels, slides, config.seed)
    notes = [splits.caveat(slide_disjoint)] * (not slide_disjoint) + [_SELECTED] * (
        name == "validation"
    )
    result: dict[str, Any] = {
        "split": name,
        **scores,
        **{f"{score}_low": low for score, (low, _) in ends.items()},
        **{f"{score}_high": high for score, (_, high) in ends.items()},
        **operating_points(logits, labels),
        "interval_over": "patches" if slides is None else "slides",
        "resampled": len(labels) if slides is None else len(np.unique(slides)),
        "nll_uncalibrated": binary_scores(uncalibrated, labels)["nll"],
        "prior": float(labels.mean()),
        "tta": config.predict.tta,
        "split_by": chosen.by,
        "slide_disjoint": slide_disjoint,
        "out_of_fold": is_folds,
        "note": "; ".join(notes),
    }
    if config.predict.checkpoints:
        result["members"] = [
            {"run": m.run, "checkpoint_step": m.step, **binary_scores(z, labels[places])}
            for m, z, places in zip(trained, calibrated, chosen.places, strict=True)
        ]
    else:
        calibration = dataclasses.asdict(trained[0].calibration)
        result["checkpoint_step"] = trained[0].step
        result |= {f"calibration_{key}": calibration[key] for key in ("scale", "bias")}
    evaluation_files.write(run, name, table[["id", "label", "slide"]].assign(logit=logits))
    run.write_json(f"evaluation_{name}.json", result)
    run.write_json("evaluation.json", result)
    log.info(
        "%s%s: AUC %.4f (95%% %.4f to %.4f, over %s), NLL %.4f, accuracy %.4f on %d patches",
        name, ", out of fold" if is_folds else "", scores["auc"], *ends["auc"],
        result["interval_over"], scores["nll"], scores["accuracy"], scores["count"],
    )  # fmt: skip
    if not slide_disjoint:
        log.warning("%s", splits.caveat(slide_disjoint))
    return result


class _Chosen(NamedTuple):
    """What is scored.

    Attributes:
        side: its patches.
        places: int64[m] for each network: those of the side's patches that it scores.
        by: see `splits.Sides`.
        honest: see `splits.Sides`.
    """

    subset: splits.Subset
    places: list[np.ndarray]
    by: str
    slide_disjoint: bool | None


def _of_split(trained: list[ensemble.TrainedModel], config: Config, prepared: Prepared) -> _Chosen:
    """Every network scores all patches of `config.evaluate.split`."""
    name = config.evaluate.split
    subsets = splits.make_subsets(prepared.tables, config.data, config.data_seed)
    subset = subsets.validation if name == "validation" else subsets.test
    if subset is None or (prepared.tables[subset.records]["label"] == UNLABELLED).any():
        raise UserError(
            f"the test patches of config.data.source = {config.data.source!r} are missing or "
            "have no labels: use --mode=predict, or --config.evaluate.split=validation"
        )
    labels = prepared.tables[subset.records]["label"].to_numpy()[subset.rows]
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"the {len(labels)} {name} patches are all labelled {labels[0]}, and scores "
            "need both classes: use --mode=predict, or --config.evaluate.split=validation"
        )
    if config.predict.checkpoints:
        slide_disjoint = ensemble.refuse_trained_on(trained, config, prepared, subset)
    else:
        actual = splits.fingerprint(prepared.tables, subsets, config.seed, config.fit.batch_size)
        splits.check_fingerprint(trained[0].fingerprint, actual, config.data.tfds_dir)
        parts = [(prepared.tables[part.records], part.rows) for part in (subsets.train, subset)]
        slide_disjoint = subsets.slide_disjoint if name == "validation" else splits.disjoint(*parts)
    return _Chosen(subset, [np.arange(len(labels))] * len(trained), subsets.by, slide_disjoint)


def _out_of_fold(
    trained: list[ensemble.TrainedModel], config: Config, prepared: Prepared
) -> _Chosen:
    """Each network scores the fold that it has validated on."""
    folds = ensemble.fold_subsets(trained, config, prepared)
    own = trained[0].config
    subset = splits.draw_sample(prepared.tables, own.data, own.data_seed)
    asked = dataclasses.replace(config, data=dataclasses.replace(config.data, fold=own.data.fold))
    # The report draws them by this command's settings, which the workdir keeps.
    sample = splits.draw_sample(prepared.tables, asked.data, asked.data_seed)
    if not np.array_equal(sample.rows, subset.rows):
        raise UserError(
            f"{trained[0].run} was trained on other patches than this command draws: set "
            f"--config.data.samples_per_class={own.data.samples_per_class} and "
            f"--config.data.split_seed={own.data_seed}, as there"
        )
    places = [np.searchsorted(subset.rows, subsets.validation.rows) for subsets in folds]
    return _Chosen(
        subset, places, folds[0].by, splits.combine(subsets.slide_disjoint for subsets in folds)
    )


def _logits(
    run: Workdir,
    config: Config,
    member: ensemble.TrainedModel,
    prepared: Prepared,
    subset: splits.Subset,
) -> np.ndarray:
    batch_sharding = mesh.batch_sharding()
    examples = placement.on_disk(prepared.records(*subset), batch_sharding)
    size = mesh.round_up(config.fit.batch_size)
    batches = signals.stopping(examples.eval_batches(size))
    eval_step = steps.make_eval_step(
        member.model, batch_sharding, ensemble.uses_tta(config, member)
    )
    count = len(subset.rows)
    with progress.bar(
        "evaluating", count, unit=" img", leave=False, is_shown=run.is_primary
    ) as bar:
        batches = progress.counted(bar, batches, size, count)
        return steps.collect_logits(eval_step, member.weights, batches)[0]
