"""Scores of the best checkpoint, or of several runs' together."""

import dataclasses
import logging
import os
from typing import Any, NamedTuple

import numpy as np

from histo_jax import files, members, predictions, preemption, progress
from histo_jax import workdir as workdirs
from histo_jax.config import Config, validate
from histo_jax.data import splits
from histo_jax.data.builder import Prepared, prepare
from histo_jax.data.example import UNLABELLED
from histo_jax.errors import ExpectedError
from histo_jax.metrics import binary_scores, operating_points, with_intervals
from histo_jax.training import agreement, placement, runtime, sharding
from histo_jax.training import step as steps

log = logging.getLogger("histo_jax")

_SELECTED = "these patches chose the checkpoint and fitted its calibration"


@runtime.session
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
        `calibration_scale` and `calibration_shift`; `members`, for each run of an ensemble its
        scores on what it has scored.

    Raises:
        ExpectedError: no checkpoint, one of another model, a split without labels, a run of an
            ensemble that has trained on these patches, or a fold that is missing.
        OSError: a file cannot be written.
    """
    validate(config)
    runtime.set_up()
    folder = files.expand(workdir, "--workdir")
    workdirs.check(folder, config)
    with workdirs.tracked(folder, "evaluate"):
        batched = sharding.batch_sharding()
        trained = members.restore(config, folder, sharding.replicated(batched))
        prepared = prepare(config, folder, raw_may_be_gone=True)
        agreement.check_records(config, prepared.tables)
        name = config.evaluate.split
        is_folds = members.are_folds(trained, config)
        chosen = (_out_of_fold if is_folds else _of_split)(trained, config, prepared)
        side, honest = chosen.side, chosen.honest
        table = prepared.tables[side.records].iloc[side.rows]
        labels = table["label"].to_numpy(np.float64)
        if config.predict.checkpoints:
            workdirs.claim(folder, config)
            workdirs.save_config(folder, config)
            workdirs.update_status(folder, records=prepared.name)
        slides = predictions.slides(table)
        log.info("compiling the evaluation step")
        raw = [
            _logits(config, member, prepared, side._replace(rows=side.rows[places]))
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
        ends = with_intervals(logits, labels, slides, config.seed)
        notes = [splits.caveat(honest)] * (not honest) + [_SELECTED] * (name == "validation")
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
            "honest": honest,
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
            result |= {f"calibration_{key}": calibration[key] for key in ("scale", "shift")}
        predictions.write(folder, name, table[["id", "label", "slide"]].assign(logit=logits))
        workdirs.write_json(folder / f"evaluation_{name}.json", result)
        workdirs.write_json(folder / "evaluation.json", result)
    log.info(
        "%s%s: AUC %.4f (95%% %.4f to %.4f, over %s), NLL %.4f, accuracy %.4f on %d patches",
        name, ", out of fold" if is_folds else "", scores["auc"], *ends["auc"],
        result["interval_over"], scores["nll"], scores["accuracy"], scores["count"],
    )  # fmt: skip
    if not honest:
        log.warning("%s", splits.caveat(honest))
    return result


class _Chosen(NamedTuple):
    """What is scored.

    Attributes:
        side: its patches.
        places: int64[m] for each network: those of the side's patches that it scores.
        by: see `splits.Sides`.
        honest: see `splits.Sides`.
    """

    side: splits.Side
    places: list[np.ndarray]
    by: str
    honest: bool | None


def _of_split(trained: list[members.Member], config: Config, prepared: Prepared) -> _Chosen:
    """Every network scores all patches of `config.evaluate.split`."""
    name = config.evaluate.split
    sides = splits.make_sides(prepared.tables, config)
    side = sides.validation if name == "validation" else sides.test
    if side is None or (prepared.tables[side.records]["label"] == UNLABELLED).any():
        raise ExpectedError(
            f"the test patches of config.data.source = {config.data.source!r} are missing or "
            "have no labels: use --mode=predict, or --config.evaluate.split=validation"
        )
    labels = prepared.tables[side.records]["label"].to_numpy()[side.rows]
    if len(np.unique(labels)) < 2:
        raise ExpectedError(
            f"the {len(labels)} {name} patches are all labelled {labels[0]}, and scores "
            "need both classes: use --mode=predict, or --config.evaluate.split=validation"
        )
    if config.predict.checkpoints:
        honest = members.refuse_trained_on(trained, config, prepared, side)
    else:
        splits.check_fingerprint(trained[0].fingerprint, prepared.tables, sides, config)
        parts = [(prepared.tables[part.records], part.rows) for part in (sides.train, side)]
        honest = sides.honest if name == "validation" else splits.disjoint(*parts)
    return _Chosen(side, [np.arange(len(labels))] * len(trained), sides.by, honest)


def _out_of_fold(trained: list[members.Member], config: Config, prepared: Prepared) -> _Chosen:
    """Each network scores the fold that it has validated on."""
    folds = members.fold_sides(trained, config, prepared)
    own = trained[0].config
    side = splits.draw_sample(prepared.tables, own)
    asked = dataclasses.replace(config, data=dataclasses.replace(config.data, fold=own.data.fold))
    # The report draws them by this command's settings, which the workdir keeps.
    if not np.array_equal(splits.draw_sample(prepared.tables, asked).rows, side.rows):
        raise ExpectedError(
            f"{trained[0].run} was trained on other patches than this command draws: set "
            f"--config.data.samples_per_class={own.data.samples_per_class} and "
            f"--config.data.split_seed={own.data_seed}, as there"
        )
    places = [np.searchsorted(side.rows, sides.validation.rows) for sides in folds]
    return _Chosen(side, places, folds[0].by, splits.combine(sides.honest for sides in folds))


def _logits(
    config: Config, member: members.Member, prepared: Prepared, side: splits.Side
) -> np.ndarray:
    batched = sharding.batch_sharding()
    examples = placement.on_disk(prepared.records(*side), batched)
    size = sharding.round_up(config.fit.batch_size)
    batches = preemption.stopping(examples.one_pass(size))
    eval_step = steps.make_eval_step(member.model, batched, members.uses_tta(config, member))
    count = len(side.rows)
    with progress.bar(
        "evaluating", count, unit=" img", leave=False, is_shown=workdirs.is_writer()
    ) as bar:
        batches = progress.counted(bar, batches, size, count)
        return steps.collect_logits(eval_step, member.weights, batches)[0]
