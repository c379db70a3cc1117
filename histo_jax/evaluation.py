"""Scores of the best checkpoint."""

import logging
import os
from pathlib import Path
from typing import Any

from histo_jax import files, preemption
from histo_jax import workdir as workdirs
from histo_jax.config import Config, validate
from histo_jax.data import loader, splits
from histo_jax.data.builder import prepare
from histo_jax.data.example import UNLABELLED
from histo_jax.errors import ExpectedError
from histo_jax.metrics import binary_scores
from histo_jax.models import create_model
from histo_jax.training import runtime, sharding
from histo_jax.training import step as steps
from histo_jax.training.checkpoints import Checkpoints

log = logging.getLogger("histo_jax")


def evaluate(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Scores the best checkpoint of `workdir` on `config.evaluate.split`.

    Every example counts once. Writes `evaluation.json` and `evaluation_<split>.json`.

    Args:
        config: that of the run; lengths, folders and what to evaluate may differ.
        workdir: folder of a run that `fit` has trained.

    Returns:
        `split`; `count` of examples; `auc`; `nll` in nats; `accuracy` at probability 0.5;
        `split_by`, 'slide' or 'image'; `honest`, whether the score speaks of slides that training
        has not seen, and a `note` if not; `checkpoint_step`.

    Raises:
        ExpectedError: no checkpoint, one of another model, or a split without labels.
        OSError: a file cannot be written.
    """
    validate(config)
    runtime.set_up()
    folder = Path(workdir)
    workdirs.check(folder, config)
    with workdirs.tracked(folder, "evaluate"):
        batched = sharding.batch_sharding()
        with Checkpoints.of(folder) as checkpoints:
            best = checkpoints.restore_best(config, sharding.replicated(batched))
        prepared = prepare(config)
        name = config.evaluate.split
        sides = splits.make_sides(prepared.tables, config)
        side = sides.validation if name == "validation" else sides.test
        if side is None or (prepared.tables[side.records]["label"] == UNLABELLED).any():
            raise ExpectedError(
                f"the test patches of config.data.source = {config.data.source!r} are missing or "
                "have no labels: use --mode=predict, or --config.evaluate.split=validation"
            )
        batches = preemption.stopping(
            loader.ordered_batches(
                prepared.source(side.records), side.rows, sharding.round_up(config.fit.batch_size)
            )
        )
        eval_step = steps.make_eval_step(create_model(config.model), batched, config.predict.tta)
        scores = binary_scores(
            *steps.collect_logits(eval_step, best.state.best_weights, batches, batched)
        )
        # A test side of its own is not the one that chose the checkpoint.
        honest = sides.honest or name == "test"
        result = {
            "split": name,
            **scores,
            "split_by": sides.by,
            "honest": honest,
            "note": "" if honest else splits.OPTIMISTIC,
            "checkpoint_step": int(best.state.step),
        }
        files.write_json(folder / f"evaluation_{name}.json", result)
        files.write_json(folder / "evaluation.json", result)
    log.info(
        "%s: AUC %.4f, NLL %.4f, accuracy %.4f on %d patches",
        name, scores["auc"], scores["nll"], scores["accuracy"], scores["count"],
    )  # fmt: skip
    if not honest:
        log.warning("%s", splits.OPTIMISTIC)
    return result
