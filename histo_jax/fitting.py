"""Training: the loop over steps and epochs."""

import collections
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd
from tensorboardX import SummaryWriter

from histo_jax import files
from histo_jax import workdir as workdirs
from histo_jax.config import Config, validate
from histo_jax.data import loader, splits
from histo_jax.data.builder import Prepared, prepare
from histo_jax.errors import ExpectedError
from histo_jax.metrics import binary_scores
from histo_jax.models import create_model
from histo_jax.training import sharding
from histo_jax.training import step as steps
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, abstract_state, create_state, update

log = logging.getLogger("histo_jax")

HISTORY_COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "validation_loss",
    "validation_auc",
    "learning_rate",
)
# Steps that may run while the next is prepared. Unbounded, the dispatch runs minutes ahead of a
# slow device, and the waiting batches fill the memory.
_IN_FLIGHT = 2


def fit(config: Config, workdir: str | os.PathLike[str]) -> pd.DataFrame:
    """Trains the network of `config` in `workdir`; goes on where an earlier call stopped.

    Prepares the data if needed, writes `config.json`, `history.csv`, `status.json`, TensorBoard
    events and `checkpoints/` (the latest two and the one of the lowest validation loss).

    Args:
        config: all settings, see `histo_jax.config`.
        workdir: folder of the run; made if missing.

    Returns:
        One row an epoch: `epoch` and `step` counted from 1, `train_loss` (mean over the epoch's
        steps, with dropout and augmentation) and `validation_loss` in nats, `validation_auc`,
        `learning_rate`.

    Raises:
        ExpectedError: a setting, the data or the folder is wrong; the message names the remedy.
        OSError: a file cannot be written.
    """
    validate(config)
    folder = Path(workdir)
    workdirs.check(folder, config)
    sharding.check_batch_size(config.fit.batch_size)
    prepared = prepare(config)
    tables = prepared.tables
    sides = splits.make_sides(tables, config)
    train_rows = sides.train.rows
    if len(train_rows) < config.fit.batch_size:
        raise ExpectedError(
            f"config.fit.batch_size = {config.fit.batch_size} is more than the "
            f"{len(train_rows)} training patches: choose a smaller batch or give more data"
        )
    splits.refuse_leak(tables, sides, config.data.allow_leak)
    log.info(
        "%d patches to train, %d to validate, divided by %s",
        len(train_rows), len(sides.validation.rows), sides.by,
    )  # fmt: skip
    if not sides.honest:
        log.warning("%s", splits.OPTIMISTIC)
    if not (folder / "config.json").exists():
        workdirs.save_config(folder, config)
    with Checkpoints(folder) as checkpoints:
        start = _start(config, checkpoints, tables, sides)
        if start.early_stopping.should_stop or len(start.history) >= config.fit.epochs:
            log.info("already complete at step %d", start.state.step)
            return _table(start.history)
        workdirs.save_config(folder, config)
        with workdirs.tracked(folder, "fit"):
            workdirs.update_status(
                folder, state="running", reason=None, finished=[], step=int(start.state.step)
            )
            return _table(_train(config, folder, checkpoints, start, prepared, sides))


def _start(
    config: Config,
    checkpoints: Checkpoints,
    tables: dict[str, pd.DataFrame],
    sides: splits.Sides,
) -> Checkpoint:
    """The newest checkpoint, or the state before the first step."""
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    place = sharding.replicated(sharding.batch_sharding())
    early_stopping = EarlyStopping.create(config.early_stopping)
    fingerprint = splits.fingerprint(tables, sides, config)
    step = checkpoints.latest_step()
    if step is None:
        mean, deviation = splits.normalisation(tables[sides.train.records], sides.train.rows)
        state = create_state(model, optimizer, config.seed, mean, deviation)
        return Checkpoint(
            state=jax.device_put(state, place),
            early_stopping=early_stopping,
            data={"step": 0, "fingerprint": fingerprint},
            history=[],
        )
    checkpoint = checkpoints.restore(step, abstract_state(model, optimizer, place), early_stopping)
    if checkpoint.data["fingerprint"] != fingerprint:
        raise ExpectedError(
            f"{config.data.tfds_dir} no longer holds the examples that this run began with: "
            "restore them or choose another --workdir"
        )
    log.info("resumed from step %d", step)
    return checkpoint


def _train(
    config: Config,
    folder: Path,
    checkpoints: Checkpoints,
    start: Checkpoint,
    prepared: Prepared,
    sides: splits.Sides,
) -> list[dict[str, Any]]:
    batched = sharding.batch_sharding()
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    train_step = steps.make_train_step(model, optimizer, batched)
    eval_step = steps.make_eval_step(model, batched)
    batch_size = config.fit.batch_size
    steps_per_epoch = config.fit.steps_per_epoch or len(sides.train.rows) // batch_size

    state, early_stopping = start.state, start.early_stopping
    history = list(start.history)
    batches = loader.training_batches(
        prepared.source(sides.train.records),
        sides.train.rows,
        batch_size,
        config.seed,
        first_step=int(state.step),
    )
    with contextlib.closing(SummaryWriter(str(folder / "events"))) as events:
        for epoch in range(len(history) + 1, config.fit.epochs + 1):
            began = time.monotonic()
            in_flight: collections.deque[jax.Array] = collections.deque()
            compiled = began
            for index in range(steps_per_epoch):
                batch = jax.device_put(dict(next(batches)), batched)
                state, loss = train_step(state, batch)
                in_flight.append(loss)
                if index == 0:
                    # The first step of a process compiles, so the rate is measured from its end.
                    loss.block_until_ready()
                    compiled = time.monotonic()
                if len(in_flight) > _IN_FLIGHT:
                    in_flight.popleft().block_until_ready()
            step = int(state.step)
            trained = time.monotonic()

            validation = loader.ordered_batches(
                prepared.source(sides.validation.records),
                sides.validation.rows,
                sharding.round_up(batch_size),
            )
            scores = binary_scores(
                *steps.collect_logits(eval_step, state.weights, validation, batched)
            )
            early_stopping = update(early_stopping, scores["nll"])
            row = {
                "epoch": epoch,
                "step": step,
                "train_loss": float(state.loss_sum) / steps_per_epoch,
                "validation_loss": scores["nll"],
                "validation_auc": scores["auc"],
                "learning_rate": config.optimizer.learning_rate,
            }
            history.append(row)
            state = state.replace(loss_sum=jnp.zeros_like(state.loss_sum))
            data = {"step": step, "fingerprint": start.data["fingerprint"]}
            checkpoints.save(Checkpoint(state, early_stopping, data, history), scores["nll"])

            files.write_text(folder / "history.csv", _table(history).to_csv(index=False))
            rate = (steps_per_epoch - 1) * batch_size / (trained - compiled)
            workdirs.update_status(folder, step=step, images_per_second=round(rate, 1))
            for name in HISTORY_COLUMNS[2:]:
                events.add_scalar(name, row[name], step)
            events.add_scalar("images_per_second", rate, step)
            events.flush()
            log.info(
                "epoch %d/%d  loss %.4f  validation loss %.4f  validation AUC %.4f  %.0f img/s  "
                "at most %s left",
                epoch, config.fit.epochs, row["train_loss"], scores["nll"], scores["auc"], rate,
                _duration((config.fit.epochs - epoch) * (time.monotonic() - began)),
            )  # fmt: skip
            if early_stopping.should_stop:
                log.info(
                    "stopped early: no better validation loss for %d epochs",
                    early_stopping.epochs_without_improvement,
                )
                break
    return history


def _table(history: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(history, columns=list(HISTORY_COLUMNS))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
