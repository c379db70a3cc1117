"""The training loop: steps, epochs and saves."""

import collections
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from histo_jax.distributed import mesh
from histo_jax.errors import UserError
from histo_jax.models.forward import Forward
from histo_jax.run import progress, signals
from histo_jax.run.workdir import Workdir
from histo_jax.training import validation
from histo_jax.training.augmentation import crop_centre
from histo_jax.training.callbacks import CallbackError, CallbackList
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.clock import TrainingClock
from histo_jax.training.epoch_log import log_epoch
from histo_jax.training.placement import Dataset, TrainingBatch
from histo_jax.training.state import EarlyStopping, update
from histo_jax.training.step import Control, Metrics, TrainStep
from histo_jax.training.validation import Validation

log = logging.getLogger("histo_jax")

# Dispatched steps whose metrics are not read yet. Without a limit the host dispatches minutes ahead
# of a slow device, and the pending batches fill the memory.
_MAX_IN_FLIGHT = 2


class Plan(NamedTuple):
    """Lengths of a training.

    Attributes:
        batch_size: of the global batch.
        steps_per_epoch: steps between two validations.
        epochs: at most.
        seed: of the order of examples.
        save_seconds: time between two saves within an epoch.
        follow_up_passes: see `epoch_log`.
        crop_epochs: number of first epochs on the centre of the images.
        crop_size: height and width of the centre in pixels.
    """

    batch_size: int
    steps_per_epoch: int
    epochs: int
    seed: int
    save_seconds: float
    follow_up_passes: int
    crop_epochs: int
    crop_size: int

    def is_done(self, early_stopping: EarlyStopping, history: Sequence[Any]) -> bool:
        """Returns whether nothing is left to train."""
        # Whole images improve the loss again, where epochs on the centre no longer do.
        is_stopped = early_stopping.should_stop and len(history) > self.crop_epochs
        return is_stopped or len(history) >= self.epochs

    def whole_cost(self, epoch: int, image_size: int) -> float:
        """Returns the cost of a whole image, in units of one of this epoch."""
        return (image_size / self.crop_size) ** 2 if epoch <= self.crop_epochs else 1.0

    def cost_left(self, epoch: int, image_size: int) -> float:
        """Returns the cost of all epochs after this one, in units of this one."""
        cropped = max(self.crop_epochs - epoch, 0)
        return cropped + (self.epochs - epoch - cropped) * self.whole_cost(epoch, image_size)


class Components(NamedTuple):
    """What a training consists of.

    Attributes:
        train_step: see `make_train_step`.
        eval_step: see `make_eval_step`.
        schedule: learning rate of each step.
        batch_sharding: shards a batch over the devices.
        train: examples of the training split.
        validation: examples of the validation split.
        describe: returns the ids of the examples of a step, for messages.
    """

    train_step: TrainStep
    eval_step: Forward
    schedule: optax.Schedule
    batch_sharding: NamedSharding
    train: Dataset
    validation: Dataset
    describe: Callable[[int], str]


def _read(values: Any) -> Any:
    """Waits for values on the devices and copies them to the host; the loop reads only here."""
    return jax.device_get(values)


class _InFlight:
    """Dispatched steps whose metrics are not read yet.

    Attributes:
        loss: of the last step that was read.
        gradient_norm: of the same step.
    """

    def __init__(self, describe: Callable[[int], str]) -> None:
        self._describe = describe
        self.loss = self.gradient_norm = float("nan")
        self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()

    def add(self, step: int, metrics: Metrics) -> int:
        """Adds a step and reads the oldest if there are too many; returns its control signal."""
        self._pending.append((step, metrics))
        return self._read_oldest() if len(self._pending) > _MAX_IN_FLIGHT else Control.CONTINUE

    def drain(self) -> int:
        """Reads all of them; returns their largest control signal."""
        controls = [self._read_oldest() for _ in range(len(self._pending))]
        return max(controls, default=Control.CONTINUE)

    def _read_oldest(self) -> int:
        step, metrics = self._pending.popleft()
        self.loss, finite, self.gradient_norm, control = _read(metrics)
        if not finite:
            raise UserError(
                f"loss or gradient of step {step} is not finite (loss {self.loss}); no update was "
                "applied or saved since: lower config.optimizer.learning_rate, or check the "
                f"patches of this step: {self._describe(step)}"
            )
        return int(control)


class Trainer:
    """A training run: its state, and the loop that advances and saves it.

    Args:
        plan: lengths.
        components: compiled steps and data.
        start: where to begin.
        run: folder of the run.
        checkpoints: of the run.
        callbacks: what observes the run.
    """

    def __init__(
        self,
        plan: Plan,
        components: Components,
        start: Checkpoint,
        run: Workdir,
        checkpoints: Checkpoints,
        callbacks: CallbackList,
    ) -> None:
        self._plan, self._components = plan, components
        self._run, self._checkpoints, self._callbacks = run, checkpoints, callbacks
        self._state, self._early_stopping = start.state, start.early_stopping
        self._history = list(start.history)
        self._step = int(start.state.step)
        self._fingerprint, self._image_size = start.data["fingerprint"], start.image_size
        self._gradient_norm = start.data.get("gradient_norm", float("nan"))
        self._last_save = time.monotonic()
        self._compiled: set[bool] = set()  # for cropped images, for whole ones
        self._clock = TrainingClock(run.status().get("minutes_trained", 0) if self._step else 0)

    @property
    def _epoch(self) -> int:
        """The current epoch, counted from 1."""
        return len(self._history) + 1

    @property
    def _is_cropped(self) -> bool:
        """Whether the current epoch trains on the centre of the images."""
        return self._epoch <= self._plan.crop_epochs

    def show_image(self, name: str, draw: Callable[[], np.ndarray]) -> None:
        """Passes an image, uint8[height, width, 3], to the callbacks.

        Raises:
            CallbackError: a callback failed; the run is saved.
        """
        with self._save_on_callback_error():
            self._callbacks.on_images(name, self._step, draw)

    def train(self) -> list[dict[str, Any]]:
        """Trains up to the last epoch, or until early stopping; returns the history.

        Raises:
            UserError: the loss or gradient of a step is not finite, or a callback failed.
            Preempted: a signal came; the run is saved.
        """
        batches = self._components.train.training_batches(
            self._plan.batch_size, self._plan.seed, first_step=self._step
        )
        while not self._plan.is_done(self._early_stopping, self._history):
            self._run_epoch(batches)
        if len(self._history) < self._plan.epochs:
            log.info(
                "early stopping: no better validation loss for %d epochs",
                self._early_stopping.epochs_without_improvement,
            )
        log.info("trained for %.1f minutes, without compilation", self._clock.minutes)
        return self._history

    def _run_epoch(self, batches: Iterator[TrainingBatch]) -> None:
        began = time.monotonic()
        rate = self._train_epoch(batches)
        trained = time.monotonic()
        row = self._end_epoch(self._validate())
        if rate:
            self._run.update_status(images_per_second=round(rate, 1))
        with self._save_on_callback_error():
            self._callbacks.on_epoch_end(row["epoch"], row)
        # The first epoch of a process includes compilation, and may be the rest of an epoch.
        images = self._plan.steps_per_epoch * self._plan.batch_size
        training_seconds = images / rate if rate else trained - began
        epoch_seconds = training_seconds + time.monotonic() - trained
        epoch, size = row["epoch"], self._image_size
        log_epoch(
            row,
            self._plan.epochs,
            rate,
            self._plan.cost_left(epoch, size) * epoch_seconds,
            self._plan.follow_up_passes * self._plan.whole_cost(epoch, size),
        )

    def _train_epoch(self, batches: Iterator[TrainingBatch]) -> float | None:
        """Takes the remaining steps of the epoch, and saves when a save is due.

        Returns:
            Images per second without compilation; None if only the compiling step was left.
        """
        size, steps = self._plan.batch_size, self._plan.steps_per_epoch
        in_flight, images, timed_from = _InFlight(self._components.describe), 0, time.monotonic()
        if self._is_cropped not in self._compiled:
            log.info("compiling the training step")
            self._clock.pause()
        # Closed before the message of a failed step or of a signal.
        with progress.bar(
            f"epoch {self._epoch}/{self._plan.epochs}",
            steps * size,
            unit=" img",
            leave=False,
            initial=(self._step - (self._epoch - 1) * steps) * size,
            is_shown=self._run.is_primary,
        ) as bar:
            while self._step < self._epoch * steps:
                metrics = self._dispatch(next(batches))
                control = in_flight.add(self._step, metrics)
                if not math.isnan(in_flight.loss):
                    bar.set_postfix(step=self._step, loss=f"{in_flight.loss:.4f}", refresh=False)
                bar.update(size)
                if self._is_cropped in self._compiled:
                    images += size
                else:
                    # The first step of each size compiles: the rate is measured from its end.
                    metrics.loss.block_until_ready()
                    self._compiled.add(self._is_cropped)
                    timed_from = time.monotonic()
                    self._clock.start()
                if control != Control.CONTINUE:
                    control = max(control, in_flight.drain())
                    self._obey(control, in_flight)
            control = in_flight.drain()
        self._obey(control if control == Control.STOP else Control.CONTINUE, in_flight)
        return images / (time.monotonic() - timed_from) if images else None

    def _dispatch(self, batch: TrainingBatch) -> Metrics:
        """Starts the next step, and sends this process's control signal with it."""
        is_due = time.monotonic() - self._last_save > self._plan.save_seconds
        control = (
            Control.STOP if signals.requested() else Control.SAVE if is_due else Control.CONTINUE
        )
        if self._is_cropped:
            batch["image"] = crop_centre(batch["image"], self._plan.crop_size)
        values = np.full(jax.local_device_count(), control, np.int32)
        batch["control"] = mesh.make_global_array(values, self._components.batch_sharding)
        self._state, metrics = self._components.train_step(self._state, batch)
        self._step += 1
        return metrics

    def _obey(self, control: int, in_flight: _InFlight) -> None:
        """Saves or stops as all processes have agreed; no step may be in flight."""
        if not math.isnan(in_flight.gradient_norm):  # NaN: no step was left in this epoch
            self._gradient_norm = float(in_flight.gradient_norm)
        if control == Control.STOP:
            self._stop()
        if control == Control.SAVE:
            self._save()

    def _validate(self) -> Validation:
        parts, size = self._components, self._plan.batch_size
        title = f"validating epoch {self._epoch}"
        try:
            logits, labels = validation.predict(
                parts.eval_step,
                self._state.eval_weights,
                parts.validation,
                size,
                title,
                self._run.is_primary,
            )
        except signals.Preempted:
            self._stop()
        return validation.score(logits, labels)

    def _end_epoch(self, result: Validation) -> dict[str, Any]:
        """Updates early stopping and history, saves, and returns the row of the epoch."""
        self._early_stopping = update(self._early_stopping, result.loss)
        norm = jax.jit(optax.tree.norm)(self._state.weights.params)
        loss_sum, weight_norm = map(float, _read((self._state.loss_sum, norm)))
        row = {
            "epoch": self._epoch,
            "step": self._step,
            "train_loss": loss_sum / self._plan.steps_per_epoch,
            "validation_loss": result.loss,
            "validation_auc": result.auc,
            "learning_rate": float(self._components.schedule(self._step - 1)),
            "gradient_norm": self._gradient_norm,
            "weight_norm": weight_norm,
        }
        self._history.append(row)
        replicated = mesh.replicated(self._components.batch_sharding)
        zero = mesh.make_global_array(np.zeros((), np.float32), replicated)
        self._state = self._state.replace(loss_sum=zero)
        self._save(result)
        return row

    def _save(self, result: Validation | None = None) -> None:
        """Begins to save the run; a validation result is known at the end of an epoch only."""
        data: dict[str, Any] = {
            "fingerprint": self._fingerprint,
            "image_size": self._image_size,
        }
        if not math.isnan(self._gradient_norm):
            data["gradient_norm"] = self._gradient_norm
        if result:
            data["calibration"] = dataclasses.asdict(result.calibration)
        checkpoint = Checkpoint(self._state, self._early_stopping, data, self._history)
        self._checkpoints.save(checkpoint, result.loss if result else None)
        self._run.update_status(step=self._step, minutes_trained=round(self._clock.minutes, 4))
        self._last_save = time.monotonic()

    def _stop(self) -> NoReturn:
        """Saves, waits until the save is complete, and leaves the process."""
        self._save()
        self._checkpoints.wait()
        raise signals.Preempted(f", saved at step {self._step}")

    @contextlib.contextmanager
    def _save_on_callback_error(self) -> Iterator[None]:
        try:
            yield
        except CallbackError:
            self._save()
            self._checkpoints.wait()
            raise
