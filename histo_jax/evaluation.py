"""Scores of the best checkpoint."""

import logging
import os
from pathlib import Path
from typing import Any

from histo_jax import files
from histo_jax import workdir as workdirs
from histo_jax.config import Config, validate
from histo_jax.data import loader, splits
from histo_jax.data.builder import prepare
from histo_jax.data.example import UNLABELLED
from histo_jax.errors import ExpectedError
from histo_jax.metrics import binary_scores
from histo_jax.models import create_model
from histo_jax.training import sharding
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
        `split_by`, 'slide' or 'image'; `checkpoint_step`.

    Raises:
        ExpectedError: no checkpoint, one of another model, or a split without labels.
        OSError: a file cannot be written.
    """
    validate(config)
    folder = Path(workdir)
    workdirs.check(folder, config)
    batched = sharding.batch_sharding()
    with Checkpoints.of(folder) as checkpoints:
        best = checkpoints.restore_best(config, sharding.replicated(batched))
    prepared = prepare(config)
    name = config.evaluate.split
    split = splits.make_split(prepared.tables["train"], config)
    table_name, rows = ("train", split.validation) if name == "validation" else ("test", None)
    table = prepared.tables[table_name]
    if rows is None:
        rows = table.index.to_numpy()
        if (table["label"] == UNLABELLED).any():
            raise ExpectedError(
                f"the test patches of config.data.source = {config.data.source!r} have no labels: "
                "use --mode=predict, or --config.evaluate.split=validation"
            )
    batches = loader.ordered_batches(
        prepared.source(table_name), rows, sharding.round_up(config.fit.batch_size)
    )
    with workdirs.tracked(folder, "evaluate"):
        eval_step = steps.make_eval_step(create_model(config.model), batched)
        scores = binary_scores(
            *steps.collect_logits(eval_step, best.state.weights, batches, batched)
        )
        result = {
            "split": name,
            **scores,
            "split_by": split.by,
            "checkpoint_step": int(best.state.step),
        }
        files.write_json(folder / f"evaluation_{name}.json", result)
        files.write_json(folder / "evaluation.json", result)
    log.info(
        "%s: AUC %.4f, NLL %.4f, accuracy %.4f on %d patches",
        name, scores["auc"], scores["nll"], scores["accuracy"], scores["count"],
    )  # fmt: skip
    return result
