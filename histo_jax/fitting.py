"""Training: the loop over steps and epochs."""

import collections
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax.sharding import NamedSharding
from optax import Schedule

from histo_jax import command, provenance
from histo_jax.config import Config
from histo_jax.data import loader, splits
from histo_jax.data.loader import Batch
from histo_jax.data.records import Prepared, prepare
from histo_jax.distributed import consensus, mesh, runtime
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration, binary_scores
from histo_jax.models import create_model
from histo_jax.registry import AUGMENTATIONS, LOSSES
from histo_jax.run import progress, signals
from histo_jax.run.workdir import Workdir
from histo_jax.training import placement
from histo_jax.training import step as steps
from histo_jax.training.augmentation import make_augment, mixup
from histo_jax.training.check import check_parts
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.events import Events, repair
from histo_jax.training.losses import get_loss
from histo_jax.training.optimizer import create_optimizer, learning_rate
from histo_jax.training.placement import TrainingBatch
from histo_jax.training.state import (
    EarlyStopping,
    TrainState,
    abstract_state,
    create_state,
    update,
)

log = logging.getLogger("histo_jax")

HISTORY_COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "validation_loss",
    "validation_auc",
    "learning_rate",
)
# Of TensorBoard. The last two stand in the checkpoint's history only.
_CURVES = (*HISTORY_COLUMNS[2:], "gradient_norm", "weight_norm")
# Steps that may run while the next is prepared. Unbounded, the dispatch runs minutes ahead of a
# slow device, and the waiting batches fill the memory.
_IN_FLIGHT = 2
# Patches along each side of the sheet of training patches.
_SHEET = 6
# How many times as long test-time averaging takes, and the passes of single patches that a report
# takes: 36 patches, 24 gradients each, and a gradient is three passes.
_TTA_COST, _REPORT_COST = 7, 36 * 24 * 3
# What a process can ask for, by weight.
_CONTINUE, _SAVE, _STOP = 0, 1, 2

TrainStep = Callable[[TrainState, TrainingBatch], tuple[TrainState, steps.Metrics]]


def fit(config: Config, workdir: str | os.PathLike[str]) -> pd.DataFrame:
    """Trains the network of `config` in `workdir`; goes on where an earlier call stopped.

    Prepares the data if needed, writes `config.json`, `history.csv`, `status.json`, TensorBoard
    events and `checkpoints/` (the latest two and the one of the lowest validation loss).

    Args:
        config: all settings, see `histo_jax.config`.
        workdir: folder of the run; made if missing.

    Returns:
        One row an epoch: `epoch` and `step` counted from 1, `train_loss` (mean over the epoch's
        steps, with dropout and augmentation) and `validation_loss` (of calibrated probabilities)
        in nats, `validation_auc`, `learning_rate`.

    Raises:
        UserError: a setting, the data or the folder is wrong; the message names the remedy.
        OSError: a file cannot be written.
    """
    with command.start(config, workdir, "fit", lambda _: check(config)) as run:
        return fit_in(run, config)


def check(config: Config) -> None:
    """Refuses what cannot be trained, before the folder changes.

    Raises:
        UserError: names the field.
    """
    if config.predict.checkpoints:
        raise UserError(
            "config.predict.checkpoints names runs to evaluate and to predict with: leave it out "
            "to train"
        )
    mesh.check_batch_size(config.fit.batch_size)
    check_parts(config.model, config.augment, config.fit)


def fit_in(run: Workdir, config: Config, followed_by: Sequence[str] = ()) -> pd.DataFrame:
    """Does the work of `fit` in an open folder.

    Args:
        run: the folder.
        config: settings that `check` accepts.
        followed_by: commands that the caller runs next, such as 'evaluate'; the remaining time that
            is logged includes them.
    """
    folder = run.path
    prepared = prepare(config.data, config.data_seed, folder)
    subsets = splits.make_subsets(prepared.tables, config.data, config.data_seed)
    consensus.check_records(config, prepared.tables)
    _check_subsets(config, prepared, subsets)
    run.acquire(config)
    consensus.check_shared_folder(folder)
    run.update_status(records=prepared.name)
    with Checkpoints(folder) as checkpoints:
        start = _start(config, checkpoints, prepared.tables, subsets)
        _rebuild_derived(run, start)
        if _is_done(config, start.early_stopping, start.history):
            log.info("already complete at step %d", start.state.step)
            return _table(start.history)
        source = provenance.source_hashes(
            type(create_model(config.model)), create_optimizer, steps.make_train_step,
            LOSSES.get(config.fit.loss), *map(AUGMENTATIONS.get, config.augment.extra),
            config_file=config.config_file,
        )  # fmt: skip
        provenance.warn_of_changes(run, source)
        run.save_config(config, source)
        run.update_status(
            finished=[], step=int(start.state.step),
            trained_with=runtime.versions(),
        )  # fmt: skip
        return _table(_train(config, run, checkpoints, start, prepared, subsets, followed_by))


def _rebuild_derived(run: Workdir, start: Checkpoint) -> None:
    """Brings history, status and events in line with a checkpoint: a kill may come between."""
    if not run.is_primary:
        return
    if start.history or (run.path / "history.csv").exists():
        _write_history(run, start.history)
    if "step" in run.status():
        run.update_status(step=int(start.state.step))
    repair(run.path / "events", start.history, _CURVES, int(start.state.step))


def _check_subsets(config: Config, prepared: Prepared, subsets: splits.Subsets) -> None:
    count = len(subsets.train.rows)
    if count < config.fit.batch_size:
        raise UserError(
            f"config.fit.batch_size = {config.fit.batch_size} is more than the {count} training "
            "patches: choose a smaller batch or give more data"
        )
    splits.refuse_leak(prepared.tables, subsets, config.data.allow_leak)
    log.info(
        "%d patches to train, %d to validate, divided %s",
        count, len(subsets.validation.rows), subsets.division,
    )  # fmt: skip
    if not subsets.slide_disjoint:
        log.warning("%s", splits.caveat(subsets.slide_disjoint))


def _is_done(config: Config, early_stopping: EarlyStopping, history: list[dict[str, Any]]) -> bool:
    return early_stopping.should_stop or len(history) >= config.fit.epochs


def _start(
    config: Config,
    checkpoints: Checkpoints,
    tables: dict[str, pd.DataFrame],
    subsets: splits.Subsets,
) -> Checkpoint:
    """The newest checkpoint that is whole, or the state before the first step."""
    fingerprint = splits.fingerprint(tables, subsets, config.seed, config.fit.batch_size)
    place = mesh.replicated(mesh.batch_sharding())
    early_stopping = EarlyStopping.create(config.early_stopping)
    checkpoint = checkpoints.restore_latest(abstract_state(config, place), early_stopping)
    if checkpoint is None:
        mean, std = splits.channel_stats(tables[subsets.train.records], subsets.train.rows)
        model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
        has_ema = config.optimizer.ema_decay > 0

        def create() -> TrainState:
            return create_state(model, optimizer, config.seed, mean, std, has_ema)

        return Checkpoint(
            # On all devices at once: what lies on one of them cannot go to other processes'.
            state=jax.jit(create, out_shardings=place)(),
            early_stopping=early_stopping,
            data={"step": 0, "fingerprint": fingerprint},
            history=[],
        )
    splits.check_fingerprint(checkpoint.data["fingerprint"], fingerprint, config.data.tfds_dir)
    log.info("resumed from step %d", checkpoint.state.step)
    return checkpoint


def _read(values: Any) -> Any:
    """Waits for values that lie on the devices; the loop's only reads of them."""
    return jax.device_get(values)


class _InFlight:
    """Steps that are started and not yet looked at.

    Attributes:
        loss: of the last step that was looked at.
        gradient_norm: likewise.
    """

    def __init__(self, describe: Callable[[int], str]) -> None:
        self._describe = describe
        self.loss = self.gradient_norm = float("nan")
        self._waiting: collections.deque[tuple[int, steps.Metrics]] = collections.deque()

    def add(self, step: int, metrics: steps.Metrics) -> int:
        """Waits for the step before the last two, and looks at it; returns what it requests."""
        self._waiting.append((step, metrics))
        return self._look() if len(self._waiting) > _IN_FLIGHT else _CONTINUE

    def drain(self) -> int:
        """Waits for all of them; returns what they request."""
        return max((self._look() for _ in range(len(self._waiting))), default=_CONTINUE)

    def _look(self) -> int:
        step, metrics = self._waiting.popleft()
        self.loss, finite, self.gradient_norm, request = _read(metrics)
        if not finite:
            raise UserError(
                f"loss or gradient of step {step} is not finite (loss {self.loss}), so "
                "nothing was updated or saved since: lower config.optimizer.learning_rate, or "
                f"look at its patches: {self._describe(step)}"
            )
        return int(request)


class _Run:
    """What moves while a run trains, and how it is saved.

    Attributes:
        state: of the network, on the devices.
        early_stopping: its state.
        history: one row a finished epoch.
        step: how many are started.
        epoch: the one under way, counted from 1.
        gradient_norm: of the last step.
        weight_norm: length of all parameters together, at the end of the last epoch.
    """

    def __init__(
        self,
        config: Config,
        workdir: Workdir,
        checkpoints: Checkpoints,
        start: Checkpoint,
        learning_rate: Schedule,
        batch_sharding: NamedSharding,
    ) -> None:
        self._config, self._workdir, self._checkpoints = config, workdir, checkpoints
        self._learning_rate, self._batched = learning_rate, batch_sharding
        self._fingerprint = start.data["fingerprint"]
        self.state, self.early_stopping = start.state, start.early_stopping
        self.history = list(start.history)
        self.step = int(start.state.step)
        self._saved = time.monotonic()
        self._compiled = False
        self.gradient_norm = start.data.get("gradient_norm", float("nan"))
        self.weight_norm = float("nan")

    @property
    def epoch(self) -> int:
        return len(self.history) + 1

    @property
    def is_done(self) -> bool:
        return _is_done(self._config, self.early_stopping, self.history)

    def train_epoch(
        self,
        train_step: TrainStep,
        batches: Iterator[TrainingBatch],
        steps_per_epoch: int,
        describe: Callable[[int], str],
    ) -> float | None:
        """Takes the epoch's remaining steps, saving when it is time to.

        Returns:
            Images per second, compilation left out; None where only the compiling step was left.

        Raises:
            UserError: a step's loss or gradient is not finite; names its patches.
            Preempted: a signal came; all is saved.
        """
        in_flight, images, timed_from = _InFlight(describe), 0, time.monotonic()
        size = self._config.fit.batch_size
        first = (self.epoch - 1) * steps_per_epoch
        # Closed before anything is said of a step that failed, or of a signal.
        if not self._compiled:
            log.info("compiling the training step")
        with progress.bar(
            f"epoch {self.epoch}/{self._config.fit.epochs}", steps_per_epoch * size,
            unit=" img", leave=False, initial=(self.step - first) * size,
            is_shown=self._workdir.is_primary,
        ) as bar:  # fmt: skip
            while self.step < self.epoch * steps_per_epoch:
                batch = next(batches)
                batch["request"] = mesh.make_global_array(self._request(), self._batched)
                self.state, metrics = train_step(self.state, batch)
                self.step += 1
                requested = in_flight.add(self.step, metrics)
                if not math.isnan(in_flight.loss):
                    bar.set_postfix(step=self.step, loss=f"{in_flight.loss:.4f}", refresh=False)
                bar.update(size)
                if self._compiled:
                    images += size
                else:
                    # The first step of a process compiles, so the rate is measured from its end.
                    metrics.loss.block_until_ready()
                    self._compiled, timed_from = True, time.monotonic()
                if requested:
                    requested = max(requested, in_flight.drain())
                    self.gradient_norm = float(in_flight.gradient_norm)
                    if requested == _STOP:
                        self.leave()
                    self.save()
            requested = in_flight.drain()
        if not math.isnan(in_flight.gradient_norm):  # nan: the epoch's steps were taken before
            self.gradient_norm = float(in_flight.gradient_norm)
        if requested == _STOP:
            self.leave()
        return images / (time.monotonic() - timed_from) if images else None

    def end_epoch(
        self, outputs: tuple[np.ndarray, np.ndarray], steps_per_epoch: int
    ) -> dict[str, Any]:
        """Takes in the validation's logits and labels, saves all, returns the row of history."""
        logits, labels = outputs
        calibration = Calibration.fit(logits, labels)
        # As the run will be scored: otherwise a network that goes on learning to rank, and grows
        # too sure of itself, would be stopped for what the calibration mends.
        scores = binary_scores(calibration.apply(logits), labels)
        decided = [*dataclasses.astuple(calibration), scores["nll"], scores["auc"]]
        *fitted, nll, auc = consensus.broadcast_from_primary(np.array(decided)).tolist()
        calibration = Calibration(*fitted)
        self.early_stopping = update(self.early_stopping, nll)
        norm = jax.jit(optax.tree.norm)(self.state.weights.params)
        loss_sum, self.weight_norm = map(float, _read((self.state.loss_sum, norm)))
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": loss_sum / steps_per_epoch,
            "validation_loss": nll,
            "validation_auc": auc,
            "learning_rate": float(self._learning_rate(self.step - 1)),
            "gradient_norm": self.gradient_norm,
            "weight_norm": self.weight_norm,
        }
        self.history.append(row)
        zero = mesh.make_global_array(np.zeros((), np.float32), mesh.replicated(self._batched))
        self.state = self.state.replace(loss_sum=zero)
        self.save(nll, calibration)
        _write_history(self._workdir, self.history)
        return row

    def _request(self) -> np.ndarray:
        """What this process asks for; the step tells all processes the most that any asks for."""
        is_due = time.monotonic() - self._saved > 60 * self._config.checkpoint.every_minutes
        wanted = _STOP if signals.requested() else _SAVE if is_due else _CONTINUE
        return np.full(jax.local_device_count(), wanted, np.int32)

    def save(
        self, validation_loss: float | None = None, calibration: Calibration | None = None
    ) -> None:
        """Begins to save all of it; loss and calibration are known at an epoch's end only."""
        data: dict[str, Any] = {"step": self.step, "fingerprint": self._fingerprint}
        if not math.isnan(self.gradient_norm):
            data["gradient_norm"] = self.gradient_norm
        if calibration:
            data["calibration"] = dataclasses.asdict(calibration)
        checkpoint = Checkpoint(self.state, self.early_stopping, data, self.history)
        self._checkpoints.save(checkpoint, validation_loss)
        self._workdir.update_status(step=self.step)
        self._saved = time.monotonic()

    def leave(self) -> NoReturn:
        """Saves, waits until that is done, and leaves the process."""
        self.save()
        self._checkpoints.wait()
        raise signals.Preempted(f", saved at step {self.step}")


def _train(
    config: Config,
    workdir: Workdir,
    checkpoints: Checkpoints,
    start: Checkpoint,
    prepared: Prepared,
    subsets: splits.Subsets,
    followed_by: Sequence[str],
) -> list[dict[str, Any]]:
    batch_sharding = mesh.batch_sharding()
    count, batch_size = len(subsets.train.rows), config.fit.batch_size
    steps_per_epoch = config.fit.steps_per_epoch or count // batch_size
    total_steps = config.fit.epochs * steps_per_epoch
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer, total_steps)
    train_step = steps.make_train_step(
        model,
        optimizer,
        batch_sharding,
        make_augment(config.augment),
        get_loss(config.fit.loss),
        config.optimizer.ema_decay,
        config.augment.mixup,
    )
    eval_step = steps.make_eval_step(model, batch_sharding)
    train, validation = placement.place(
        config.data.placement,
        [prepared.records(*side) for side in (subsets.train, subsets.validation)],
        batch_sharding,
    )
    schedule = learning_rate(config.optimizer, total_steps)
    run = _Run(config, workdir, checkpoints, start, schedule, batch_sharding)
    batches = train.training(batch_size, config.seed, first_step=run.step)

    def ids_of(step: int) -> str:
        chosen = subsets.train.rows[loader.training_order(count, batch_size, config.seed)[step - 1]]
        return " ".join(prepared.tables[subsets.train.records]["id"].iloc[chosen])

    with Events(workdir.path / "events", workdir.is_primary) as events:
        if not any((workdir.path / "events").glob("*")):
            records = prepared.records(*subsets.train)
            order = loader.training_order(count, batch_size, config.seed)
            shown = min(count, _SHEET**2)
            rows = np.concatenate([order[k] for k in range(-(-shown // batch_size))])[:shown]
            sheet = _training_sheet(config, records.images(rows))
            events.add_image("training_patches", sheet, 0)
            events.flush()
        while not run.is_done:
            began = time.monotonic()
            rate = run.train_epoch(train_step, batches, steps_per_epoch, ids_of)
            trained = time.monotonic()
            try:
                validating: Iterable[Batch] = validation.eval_batches(batch_size)
                # Several processes stop together, which only the steps of training decide.
                if jax.process_count() == 1:
                    validating = signals.stopping(validating)
                weights = run.state.eval_weights
                total = len(subsets.validation.rows)
                with progress.bar(
                    f"validating epoch {run.epoch}", total, unit=" img", leave=False,
                    is_shown=workdir.is_primary,
                ) as bar:  # fmt: skip
                    counted = progress.counted(bar, validating, batch_size, total)
                    outputs = steps.collect_logits(eval_step, weights, counted)
            except signals.Preempted:
                run.leave()
            row = run.end_epoch(outputs, steps_per_epoch)
            if rate:
                workdir.update_status(images_per_second=round(rate, 1))
            events.add_scalars({name: row[name] for name in _CURVES}, row["step"])
            events.flush()
            # The first epoch of a process compiles, and may be the rest of one.
            whole = steps_per_epoch * batch_size / rate if rate else trained - began
            each = whole + time.monotonic() - trained
            left = (config.fit.epochs - row["epoch"]) * each
            if rate:  # compilation left out, and a training step is about three passes
                left += _patches_after(config, subsets, followed_by) / (3 * rate)
            log.info(
                "epoch %d/%d  loss %.4f  validation loss %.4f  validation AUC %.4f  %s img/s  "
                "at most %s left",
                row["epoch"], config.fit.epochs, row["train_loss"], row["validation_loss"],
                row["validation_auc"], round(rate) if rate else "-",
                _duration(left),
            )  # fmt: skip
    if run.early_stopping.should_stop:
        log.info(
            "stopped early: no better validation loss for %d epochs",
            run.early_stopping.epochs_without_improvement,
        )
    return run.history


def _patches_after(config: Config, subsets: splits.Subsets, commands: Sequence[str]) -> int:
    """How many patches' passes through the network take as long as these commands, about."""
    test = len(subsets.test.rows) if subsets.test else 0
    scored = test if config.evaluate.split == "test" else len(subsets.validation.rows)
    symmetries = _TTA_COST if config.predict.tta else 1
    count = symmetries * (scored * ("evaluate" in commands) + test * ("predict" in commands))
    return count + _REPORT_COST * ("report" in commands)


def _training_sheet(config: Config, images: np.ndarray) -> np.ndarray:
    """Puts patches, augmented as in training, side by side on one sheet, uint8."""
    # Outside the epochs, where users may have JAX refuse what goes to the device unasked.
    with jax.transfer_guard_host_to_device("allow"):
        key, mix_key = jax.random.split(jax.random.key(config.seed))
        seen: Any = make_augment(config.augment)(key, jnp.asarray(images))
        if config.augment.mixup:
            seen, _ = mixup(mix_key, seen, jnp.zeros(len(images)), config.augment.mixup)
        seen = np.asarray(seen).astype(np.uint8)
    side = math.isqrt(len(seen))
    rows = seen[: side * side].reshape(side, side, *seen.shape[1:])
    return rows.swapaxes(1, 2).reshape(side * seen.shape[1], side * seen.shape[2], 3)


def _write_history(run: Workdir, history: list[dict[str, Any]]) -> None:
    run.write_text("history.csv", _table(history).to_csv(index=False))


def _table(history: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(history, columns=list(HISTORY_COLUMNS))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
