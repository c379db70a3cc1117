"""Scores of the best checkpoint, or of several runs' together."""

import dataclasses
import logging
import os
from typing import Any

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
    logits. Writes `evaluation.json`, `evaluation_<split>.json`, and `predictions_<split>.csv` with
    `id`, `label`, `slide` and the calibrated `logit`.

    Args:
        config: that of the run; lengths, folders and what to evaluate may differ.
        workdir: folder of a run that `fit` has trained; with `predict.checkpoints` any.

    Returns:
        `split`; `count` of examples; the scores of `metrics.weighted_scores` with calibrated
        probabilities, and for each the ends of its 95% interval, `auc_low` and `auc_high` (nan with
        one slide); `interval_over`, 'slides' or 'patches', and how many `resampled`; the
        probabilities of `metrics.operating_points`; `nll_uncalibrated`; `prior`, the share of
        tumour; `tta` as set; `split_by`, 'slide' or 'image'; `honest`, whether the score
        speaks of slides that training has not seen, and a `note`; `checkpoint_step`;
        `calibration_scale` and `calibration_shift`; `members`, for each run of an ensemble its
        scores.

    Raises:
        ExpectedError: no checkpoint, one of another model, a split without labels, or a run of an
            ensemble that has trained on these patches.
        OSError: a file cannot be written.
    """
    validate(config)
    runtime.set_up()
    folder = files.expand(workdir, "--workdir")
    workdirs.check(folder, config)
    with workdirs.tracked(folder, "evaluate"):
        batched = sharding.batch_sharding()
        trained = members.restore(config, folder, sharding.replicated(batched))
        prepared = prepare(config)
        agreement.check_records(config, prepared.tables)
        name = config.evaluate.split
        sides = splits.make_sides(prepared.tables, config)
        side = sides.validation if name == "validation" else sides.test
        if side is None or (prepared.tables[side.records]["label"] == UNLABELLED).any():
            raise ExpectedError(
                f"the test patches of config.data.source = {config.data.source!r} are missing or "
                "have no labels: use --mode=predict, or --config.evaluate.split=validation"
            )
        table = prepared.tables[side.records].iloc[side.rows]
        labels = table["label"].to_numpy(np.float64)
        if len(np.unique(labels)) < 2:
            raise ExpectedError(
                f"the {len(labels)} {name} patches are all labelled {labels[0]:.0f}, and scores "
                "need both classes: use --mode=predict, or --config.evaluate.split=validation"
            )
        if config.predict.checkpoints:
            honest = members.refuse_trained_on(trained, config, prepared, side)
            workdirs.claim(folder, config)
        else:
            splits.check_fingerprint(trained[0].fingerprint, prepared.tables, sides, config)
            train = prepared.tables[sides.train.records].iloc[sides.train.rows]
            honest = sides.honest if name == "validation" else not splits.share(train, table)
        slides = predictions.slides(table)
        log.info("compiling the evaluation step")
        raw = [_logits(config, member, prepared, side) for member in trained]
        calibrated = [m.calibration.apply(z) for m, z in zip(trained, raw, strict=True)]
        logits = np.mean(calibrated, axis=0)
        scores = binary_scores(logits, labels)
        ends = with_intervals(logits, labels, slides, config.seed)
        notes = [splits.OPTIMISTIC] * (not honest) + [_SELECTED] * (name == "validation")
        result: dict[str, Any] = {
            "split": name,
            **scores,
            **{f"{score}_low": low for score, (low, _) in ends.items()},
            **{f"{score}_high": high for score, (_, high) in ends.items()},
            **operating_points(logits, labels),
            "interval_over": "patches" if slides is None else "slides",
            "resampled": len(labels) if slides is None else len(np.unique(slides)),
            "nll_uncalibrated": binary_scores(np.mean(raw, axis=0), labels)["nll"],
            "prior": float(labels.mean()),
            "tta": config.predict.tta,
            "split_by": sides.by,
            "honest": honest,
            "note": "; ".join(notes),
        }
        if config.predict.checkpoints:
            result["members"] = [
                {"run": member.run, "checkpoint_step": member.step, **binary_scores(z, labels)}
                for member, z in zip(trained, calibrated, strict=True)
            ]
        else:
            calibration = dataclasses.asdict(trained[0].calibration)
            result["checkpoint_step"] = trained[0].step
            result |= {f"calibration_{key}": calibration[key] for key in ("scale", "shift")}
        predictions.write(folder, name, table[["id", "label", "slide"]].assign(logit=logits))
        workdirs.write_json(folder / f"evaluation_{name}.json", result)
        workdirs.write_json(folder / "evaluation.json", result)
    log.info(
        "%s: AUC %.4f (95%% %.4f to %.4f, over %s), NLL %.4f, accuracy %.4f on %d patches",
        name, scores["auc"], *ends["auc"], result["interval_over"], scores["nll"],
        scores["accuracy"], scores["count"],
    )  # fmt: skip
    if not honest:
        log.warning("%s", splits.OPTIMISTIC)
    return result


def _logits(
    config: Config, member: members.Member, prepared: Prepared, side: splits.Side
) -> np.ndarray:
    batched = sharding.batch_sharding()
    examples = placement.on_disk(prepared.records(*side), batched)
    size = sharding.round_up(config.fit.batch_size)
    batches = preemption.stopping(examples.one_pass(size))
    eval_step = steps.make_eval_step(member.model, batched, members.averages(config, member))
    count = len(side.rows)
    with progress.bar(
        "evaluating", count, unit=" img", leave=False, is_shown=workdirs.is_writer()
    ) as bar:
        batches = progress.counted(bar, batches, size, count)
        return steps.collect_logits(eval_step, member.weights, batches)[0]
