"""The command `fit`: builds what a training consists of, and hands it to the loop."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from jax.sharding import NamedSharding

from histo_jax import command, provenance
from histo_jax.config import Config, FitConfig
from histo_jax.data import loader, source_adapter, splits
from histo_jax.data.records import Prepared, prepare
from histo_jax.distributed import consensus, mesh, runtime
from histo_jax.errors import ConfigError, DataError
from histo_jax.registry import AUGMENTATIONS, LOSSES
from histo_jax.run.workdir import Workdir
from histo_jax.training import placement
from histo_jax.training import step as steps
from histo_jax.training.callbacks import (
    CallbackList,
    HistoryFile,
    check_callbacks,
    history_table,
)
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.epoch_log import follow_up_passes
from histo_jax.training.events import TensorBoard
from histo_jax.training.loop import Components, Plan, Trainer
from histo_jax.training.optimizer import create_optimizer, create_schedule
from histo_jax.training.parts import Parts, build_parts, check_parts
from histo_jax.training.patch_sheet import draw_patch_sheet
from histo_jax.training.state import EarlyStopping, TrainState, abstract_state, create_state

log = logging.getLogger("histo_jax")


def fit(
    config: Config, workdir: str | os.PathLike[str], callbacks: Iterable[Any] = ()
) -> pd.DataFrame:
    """Trains the network of `config` in `workdir`, or resumes an interrupted training.

    Prepares the data if needed; writes `config.json`, `history.csv`, `status.json`, TensorBoard
    events and `checkpoints/` (the latest two and the one with the lowest validation loss).

    Args:
        config: all settings, see `histo_jax.config`.
        workdir: folder of the run; created if missing.
        callbacks: objects that observe the run, see `histo_jax.Callback`.

    Returns:
        One row per epoch: `epoch` and `step` counted from 1, `train_loss` (mean over the steps of
        the epoch, with dropout and augmentation) and `validation_loss` (of calibrated
        probabilities) in nats, `validation_auc`, `learning_rate`.

    Raises:
        UserError: a setting, the data, the folder or a callback is wrong; names the fix.
        OSError: a file cannot be written.
    """
    observers = check_callbacks(callbacks)
    with command.start(config, workdir, "fit", lambda _: check(config)) as run:
        return fit_in(run, config, observers)


def check(config: Config) -> None:
    """Refuses settings that `fit` cannot use, before the folder changes.

    Raises:
        ConfigError: names the field.
    """
    if config.predict.checkpoints:
        raise ConfigError(
            "config.predict.checkpoints names trained runs for evaluate and predict: leave it out "
            "to train"
        )
    mesh.check_batch_size(config.fit.batch_size)


def fit_in(
    run: Workdir,
    config: Config,
    callbacks: Sequence[Any] = (),
    followed_by: Sequence[str] = (),
) -> pd.DataFrame:
    """Does the work of `fit` in an open folder.

    Args:
        run: folder of the run, in a session.
        config: settings that `check` accepts.
        callbacks: see `fit`.
        followed_by: commands that the caller runs next, such as 'evaluate'; the logged estimate of
            the remaining time includes them.
    """
    setup = _set_up(run, config)
    plan = _make_plan(config, setup.subsets, followed_by)
    with Checkpoints(run.path) as checkpoints, _built_in_callbacks(run) as built_in:
        start = _restore(setup, checkpoints)
        _rebuild_derived(run, start, *built_in)
        if plan.is_done(start.early_stopping, start.history):
            log.info("already complete at step %d", start.state.step)
            return history_table(start.history)
        _record_start(run, setup, start)
        observers = CallbackList(built_in, callbacks, run.is_primary)
        trainer = Trainer(plan, _make_components(setup), start, run, checkpoints, observers)
        if start.state.step == 0:
            trainer.show_image("training_patches", lambda: _draw_patch_sheet(setup))
        return history_table(trainer.train())


class _Setup(NamedTuple):
    """What one `fit` builds before its loop.

    Attributes:
        config: all settings.
        parts: network, augmentation and loss.
        schedule: learning rate of each step.
        optimizer: follows the schedule.
        batch_sharding: over all devices.
        prepared: the records.
        subsets: the training, validation and test splits.
    """

    config: Config
    parts: Parts
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    batch_sharding: NamedSharding
    prepared: Prepared
    subsets: splits.Subsets


def _set_up(run: Workdir, config: Config) -> _Setup:
    """Builds and checks what does not depend on checkpoints, and acquires the folder."""
    parts = build_parts(config.model, config.augment, config.fit)
    known_size = source_adapter.known_size(config.data)
    if known_size:  # a mistake shows before the data is read
        check_parts(parts, config.model, config.augment, config.fit, known_size)
    prepared = prepare(config.data, config.data_seed, run.path)
    if prepared.image_size != known_size:
        check_parts(parts, config.model, config.augment, config.fit, prepared.image_size)
    subsets = splits.make_subsets(prepared.tables, config.data, config.data_seed)
    consensus.check_records(config, prepared.tables)
    _check_subsets(config, prepared, subsets)
    run.acquire(config)
    consensus.check_shared_folder(run.path)
    run.update_status(records=prepared.name)
    schedule = create_schedule(
        config.optimizer, config.fit.epochs * _steps_per_epoch(config.fit, subsets)
    )
    optimizer = create_optimizer(config.optimizer, schedule)
    return _Setup(config, parts, schedule, optimizer, mesh.batch_sharding(), prepared, subsets)


def _steps_per_epoch(fit: FitConfig, subsets: splits.Subsets) -> int:
    return fit.steps_per_epoch or len(subsets.train.rows) // fit.batch_size


@contextlib.contextmanager
def _built_in_callbacks(run: Workdir) -> Iterator[tuple[HistoryFile, TensorBoard]]:
    with TensorBoard(run.path / "events") as tensorboard:
        yield HistoryFile(run.path / "history.csv"), tensorboard


def _rebuild_derived(
    run: Workdir, start: Checkpoint, history_file: HistoryFile, tensorboard: TensorBoard
) -> None:
    """Makes history, events and status agree with a checkpoint: a kill may leave them different."""
    if not run.is_primary:
        return
    step = int(start.state.step)
    history_file.restore(start.history)
    if "step" in run.status():
        run.update_status(step=step)
    tensorboard.restore(start.history, step)


def _check_subsets(config: Config, prepared: Prepared, subsets: splits.Subsets) -> None:
    count = len(subsets.train.rows)
    if count < config.fit.batch_size:
        raise DataError(
            f"config.fit.batch_size = {config.fit.batch_size} is more than the {count} training "
            "patches: choose a smaller batch or add data"
        )
    splits.refuse_leak(prepared.tables, subsets, config.data.allow_leak)
    log.info(
        "%d training and %d validation patches, split %s",
        count,
        len(subsets.validation.rows),
        subsets.division,
    )
    if config.data.slide_map is None and (missing := splits.left_out(prepared.tables, config.data)):
        log.warning("%s", missing)
    if subsets.caveat:
        log.warning("%s", subsets.caveat)


def _make_plan(config: Config, subsets: splits.Subsets, followed_by: Sequence[str]) -> Plan:
    test_count = len(subsets.test.rows) if subsets.test else 0
    is_test = config.evaluate.split == "test"
    return Plan(
        batch_size=config.fit.batch_size,
        steps_per_epoch=_steps_per_epoch(config.fit, subsets),
        epochs=config.fit.epochs,
        seed=config.seed,
        save_seconds=60 * config.checkpoint.every_minutes,
        follow_up_passes=follow_up_passes(
            followed_by,
            test_count if is_test else len(subsets.validation.rows),
            test_count,
            config.predict.tta,
        ),
        crop_epochs=config.fit.crop_epochs,
        crop_size=config.fit.crop_size,
    )


def _restore(setup: _Setup, checkpoints: Checkpoints) -> Checkpoint:
    """Returns the newest valid checkpoint, or the state before the first step."""
    config, parts, optimizer = setup.config, setup.parts, setup.optimizer
    tables, subsets = setup.prepared.tables, setup.subsets
    image_size = setup.prepared.image_size
    replicated = mesh.replicated(setup.batch_sharding)
    early_stopping = EarlyStopping.create(config.early_stopping)
    has_ema = config.optimizer.ema_decay > 0
    shapes = abstract_state(parts.model, optimizer, image_size, replicated, has_ema)
    checkpoint = checkpoints.restore_latest(shapes, early_stopping)
    fingerprint = splits.fingerprint(tables, subsets, config.seed, config.fit.batch_size)
    if checkpoint is not None:
        splits.check_fingerprint(checkpoint.data["fingerprint"], fingerprint, config.data.tfds_dir)
        splits.check_size(checkpoint.image_size, image_size, config.data.tfds_dir)
        log.info("resumed from step %d", checkpoint.state.step)
        return checkpoint
    mean, std = splits.channel_stats(tables[subsets.train.records], subsets.train.rows)

    def create(seed: Any, mean: Any, std: Any) -> TrainState:
        return create_state(parts.model, optimizer, seed, mean, std, image_size, has_ema)

    data = {"fingerprint": fingerprint, "image_size": image_size}
    # On all devices at once: a process cannot copy its arrays to the devices of others. Seed and
    # statistics are arguments, so that runs that differ in them share the compiled program.
    state = jax.jit(create, out_shardings=replicated)(config.seed, mean, std)
    return Checkpoint(state, early_stopping, data, [])


def _record_start(run: Workdir, setup: _Setup, start: Checkpoint) -> None:
    """Records in `config.json` and `status.json` what trains from here on."""
    config = setup.config
    source = provenance.source_hashes(
        type(setup.parts.model),
        create_optimizer,
        steps.make_train_step,
        LOSSES.get(config.fit.loss),
        *map(AUGMENTATIONS.get, config.augment.extra),
        config_file=config.config_file,
    )
    provenance.warn_of_changes(run, source)
    run.save_config(config, source)
    run.update_status(finished=[], step=int(start.state.step), trained_with=runtime.versions())


def _draw_patch_sheet(setup: _Setup) -> np.ndarray:
    config, records = setup.config, setup.prepared.records(*setup.subsets.train)
    return draw_patch_sheet(
        records, config.fit.batch_size, setup.parts.augment, config.augment.mixup, config.seed
    )


def _make_components(setup: _Setup) -> Components:
    """Compiles nothing yet; places the pixels."""
    config, parts, subsets = setup.config, setup.parts, setup.subsets
    train_step = steps.make_train_step(
        parts.model,
        setup.optimizer,
        setup.batch_sharding,
        parts.augment,
        parts.loss,
        config.optimizer.ema_decay,
        config.augment.mixup,
    )
    train, validation = placement.place(
        config.data.placement,
        [setup.prepared.records(*subset) for subset in (subsets.train, subsets.validation)],
        setup.prepared.image_size,
        setup.batch_sharding,
    )
    order = loader.training_order(len(subsets.train.rows), config.fit.batch_size, config.seed)
    ids = setup.prepared.tables[subsets.train.records]["id"].to_numpy()

    def describe(step: int) -> str:
        return " ".join(ids[subsets.train.rows[order[step - 1]]])

    return Components(
        train_step,
        steps.make_eval_step(parts.model, setup.batch_sharding),
        setup.schedule,
        setup.batch_sharding,
        train,
        validation,
        describe,
    )
