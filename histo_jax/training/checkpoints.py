"""Checkpoints; the only module that uses Orbax, which is why it is longer than others."""

import dataclasses
import errno
import functools
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint import checkpoint_managers

from histo_jax.config import Config
from histo_jax.errors import CheckpointError, UserError, one_line
from histo_jax.models import create_model
from histo_jax.run import files
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, TrainState, abstract_state

log = logging.getLogger("histo_jax")

_METRIC = "validation_loss"
# Errors that do not depend on the content of a checkpoint.
_UNRELATED_ERRORS = (UserError, MemoryError, jax.errors.JaxRuntimeError)
# Errors about a file: of JSON, of text, of the system.
_FILE_ERRORS = (OSError, json.JSONDecodeError, UnicodeDecodeError)
_UNTOUCHED = (
    "nothing was moved: install the versions that status.json names in trained_with, restore the "
    "folder from a copy, or choose another --workdir"
)
# What Orbax writes besides the arrays, in bytes; about 200 kB were measured.
_OVERHEAD = 500_000


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        state: parameters, BatchNorm statistics, normalisation, optimizer state, step, random key.
        early_stopping: its state.
        data: JSON-able; `fingerprint` of the examples and their order, `image_size` in pixels,
            `gradient_norm` of the last step, and after a validation the `calibration` that was
            fitted on it.
        history: JSON-able; one entry per finished epoch.
    """

    state: TrainState
    early_stopping: EarlyStopping
    data: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def image_size(self) -> int:
        """Height and width of the images that the network was trained on, pixels."""
        return _image_size(self.data)


class _CorruptError(Exception):
    """A file of a checkpoint is missing or empty."""


class Checkpoints:
    """The checkpoints of one run: the latest two and the best are kept.

    Saving is asynchronous; use it as a context, whose end waits for the last save.

    Args:
        workdir: folder of the run.
        read_only: do not change the folder: another process may be saving there.

    Raises:
        CheckpointError: the metrics of a checkpoint are corrupt, and it cannot be quarantined:
            `read_only`, or no other checkpoint is left.
    """

    def __init__(self, workdir: Path, read_only: bool = False) -> None:
        self._directory = (workdir / "checkpoints").absolute()
        self._replaced = self._directory.with_name("replaced")
        if not read_only:
            _in_primary(lambda: self._directory.mkdir(parents=True, exist_ok=True))
        self._literal = files.LiteralFolder(self._directory)
        if not read_only:
            _in_primary(self._restore_replaced)
            corrupt = self._corrupt_metrics()
            multihost_utils.sync_global_devices("histo_jax metrics")
            _in_primary(functools.partial(self._quarantine, corrupt))
        try:
            self._manager = self._open(read_only)
        except ValueError as error:
            if not read_only:
                raise
            raise CheckpointError(
                f"{self._directory} holds a corrupt checkpoint ({self._describe(error)}): rerun "
                "the command of that run, which quarantines it"
            ) from None

    def _open(self, read_only: bool) -> ocp.CheckpointManager:
        latest = checkpoint_managers.LatestN(2)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics[_METRIC],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        return ocp.CheckpointManager(
            self._literal.path,
            # Named here, or the metadata of a folder that this process did not write is empty.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "early_stopping": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "history": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                best_fn=lambda metrics: metrics[_METRIC],
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=False,
                save_interval_steps=int(not read_only),
            ),
        )

    def _restore_replaced(self) -> None:
        """Moves back a checkpoint whose replacement was never completed."""
        for path in self._replaced.glob("*"):
            if not (self._directory / path.name).exists():
                path.rename(self._directory / path.name)

    def _corrupt_metrics(self) -> dict[int, Exception]:
        """Returns the error of each checkpoint whose metrics Orbax could not read when it opens."""
        errors: dict[int, Exception] = {}
        for path in self._directory.glob("*/metrics/metrics"):
            if not path.parents[1].name.isdigit():  # a save that was not finished
                continue
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                errors[int(path.parents[1].name)] = error
        count = sum(path.name.isdigit() for path in self._directory.iterdir())
        if errors and len(errors) == count:
            raise self._all_failed(errors)
        return errors

    def _describe(self, error: Exception) -> str:
        return one_line(error).replace(str(self._literal.path), str(self._directory))

    @classmethod
    def of(cls, workdir: Path, read_only: bool = False) -> "Checkpoints":
        """Opens the checkpoints of a run that has some.

        Raises:
            CheckpointError: there are none.
        """
        if not any((workdir / "checkpoints").glob("*")):
            raise CheckpointError(f"{workdir} holds no checkpoint: run --mode=fit first")
        return cls(workdir, read_only)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with files.naming(self._directory), files.disk_errors(self._directory):
            self._manager.close()

    def save(self, checkpoint: Checkpoint, validation_loss: float | None) -> None:
        """Begins to save under the step of the state; waits only for the previous save.

        Args:
            checkpoint: its content.
            validation_loss: selects the best checkpoint, nats; None within an epoch.

        Raises:
            OSError: the folder cannot be written or the disk is full, now or at the previous save.
        """
        step = int(checkpoint.state.step)
        self.wait()
        is_first = not self._manager.all_steps()
        _in_primary(lambda: shutil.rmtree(self._replaced, ignore_errors=True))
        self._check_space(checkpoint.state)
        if step in self._manager.all_steps():
            if validation_loss is None:
                return  # nothing has changed
            # Saved before the validation of this epoch. The old one is kept until the new one is
            # complete: until then it is the newest.
            _in_primary(lambda: self._keep_replaced(step))
            self._manager.reload()
        with files.naming(self._directory), files.disk_errors(self._directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(checkpoint.state),
                    early_stopping=ocp.args.StandardSave(checkpoint.early_stopping),
                    data=ocp.args.JsonSave(checkpoint.data),
                    history=ocp.args.JsonSave({"epochs": checkpoint.history}),
                ),
                metrics=None if validation_loss is None else {_METRIC: validation_loss},
            )
        if is_first:
            self.wait()
            self._check_readable(checkpoint)

    def _check_space(self, state: TrainState) -> None:
        """Raises before Orbax does, whose message on a full disk is late and long."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
        if shutil.disk_usage(self._directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))

    def _check_readable(self, checkpoint: Checkpoint) -> None:
        """Refuses a folder whose first checkpoint cannot be restored, before hours are spent."""
        try:
            self.restore(int(checkpoint.state.step), checkpoint.state, checkpoint.early_stopping)
        except Exception as error:  # Orbax and TensorStore may raise anything
            if not _may_be_corrupt(error):
                raise
            raise CheckpointError(
                f"{self._directory} cannot hold checkpoints: the first one cannot be restored "
                f"({self._describe(error)}); choose another --workdir"
            ) from None

    def _keep_replaced(self, step: int) -> None:
        self._replaced.mkdir()
        (self._directory / str(step)).rename(self._replaced / str(step))

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            OSError: it could not be written.
        """
        with files.naming(self._directory), files.disk_errors(self._directory):
            self._manager.wait_until_finished()

    def best_step(self) -> int | None:
        """Returns the step with the lowest validation loss, or None if there is none."""
        return self._manager.best_step()

    def restore_latest(self, like: TrainState, early_stopping: EarlyStopping) -> Checkpoint | None:
        """Restores the newest valid checkpoint; moves newer, corrupt ones to `quarantined/`.

        A checkpoint is corrupt only if it fails to restore and an older one does not: otherwise
        the error may come from a library or from this program, and nothing is moved.

        Args:
            like: see `restore`.
            early_stopping: see `restore`.

        Returns:
            None if there is no checkpoint.

        Raises:
            CheckpointError: all checkpoints fail, or two fail with the same error that is not about
                their files; or one is of another network.
        """
        errors: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                checkpoint = self.restore(step, like, early_stopping)
            except Exception as error:  # Orbax and TensorStore may raise anything
                if not _may_be_corrupt(error):
                    raise
                self._refuse_repeated(error, errors.values())
                errors[step] = error
                continue
            _in_primary(functools.partial(self._quarantine, errors))
            self._manager.reload()
            return checkpoint
        if errors:
            raise self._all_failed(errors)
        return None

    def _refuse_repeated(self, error: Exception, earlier: Iterable[Exception]) -> None:
        """Refuses an error that two checkpoints have in common and that names no file of theirs."""
        message = self._describe(error)
        names_files = any(str(p) in str(error) for p in (self._directory, self._literal.path))
        if names_files or isinstance(error, (*_FILE_ERRORS, _CorruptError)):
            return

        def pattern(other: Exception) -> tuple[type, str]:
            return type(other), re.sub(r"\d+", "0", self._describe(other))  # steps differ

        if any(pattern(other) == pattern(error) for other in earlier):
            raise CheckpointError(
                f"two checkpoints in {self._directory} fail to restore with the same error, which "
                f"is not about their files ({type(error).__name__}: {message}); {_UNTOUCHED}"
            ) from error

    def _all_failed(self, errors: Mapping[int, Exception]) -> CheckpointError:
        step = max(errors)
        return CheckpointError(
            f"no checkpoint in {self._directory} can be restored (that of step {step}: "
            f"{type(errors[step]).__name__}: {self._describe(errors[step])}); {_UNTOUCHED}"
        )

    def _quarantine(self, errors: Mapping[int, Exception]) -> None:
        for step, error in errors.items():
            target = self._directory.with_name("quarantined") / f"{step}-{uuid.uuid4().hex[:8]}"
            target.parent.mkdir(exist_ok=True)
            (self._directory / str(step)).rename(target)
            log.warning(
                "checkpoint %d is corrupt and was moved to %s (%s)",
                step,
                target,
                self._describe(error),
            )

    def restore(self, step: int, like: TrainState, early_stopping: EarlyStopping) -> Checkpoint:
        """Restores one checkpoint.

        Args:
            step: of the checkpoint.
            like: arrays, or shapes with dtype and sharding, as the state shall have them.
            early_stopping: provides the settings that are not saved.

        Raises:
            CheckpointError: the checkpoint is of another network or version.
        """
        with files.disk_errors(self._directory / str(step)):
            saved = self._manager.item_metadata(step)["state"]
            if saved is None:
                raise _CorruptError("the metadata of its state is missing")
            self._check_shapes(step, saved.tree, like)
            parts = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like),
                    early_stopping=ocp.args.StandardRestore(early_stopping),
                    data=ocp.args.JsonRestore(),
                    history=ocp.args.JsonRestore(),
                ),
            )
        return Checkpoint(
            parts["state"], parts["early_stopping"], parts["data"], parts["history"]["epochs"]
        )

    def restore_best(self, config: Config, sharding: Sharding) -> Checkpoint:
        """Restores the checkpoint with the lowest validation loss.

        Args:
            config: of the run; `model`, `optimizer` and `early_stopping` are used.
            sharding: of each array.

        Raises:
            CheckpointError: there is no checkpoint, it is corrupt, or it is of another network.
        """
        step = self.best_step()
        if step is None:
            raise CheckpointError(
                f"{self._directory} holds no finished epoch: rerun --mode=fit to finish one"
            )
        model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
        try:
            image_size = _image_size(self._read_data(step))
            has_ema = config.optimizer.ema_decay > 0
            like = abstract_state(model, optimizer, image_size, sharding, has_ema)
            return self.restore(step, like, EarlyStopping.create(config.early_stopping))
        except Exception as error:  # Orbax and TensorStore may raise anything
            if not _may_be_corrupt(error):
                raise
            path = self._directory / str(step)
            if not path.exists():
                raise CheckpointError(
                    f"{path} was replaced by a better checkpoint while it was read: rerun the "
                    "command"
                ) from None
            raise CheckpointError(
                f"{path}, the best checkpoint, cannot be restored ({self._describe(error)}): if "
                "its files are corrupt, restore them from a copy, or remove it to use the next best"
            ) from None

    def _read_data(self, step: int) -> dict[str, Any]:
        with files.disk_errors(self._directory / str(step)):
            only = ocp.args.Composite(data=ocp.args.JsonRestore())
            return self._manager.restore(step, args=only)["data"]

    def _check_shapes(self, step: int, saved: Any, like: TrainState) -> None:
        old, new = _shapes(saved), _shapes(like)
        if "weights.deviation" in old:  # renamed to `std` in 0.2.0
            raise CheckpointError(
                f"{self._directory.parent} was trained by histo_jax 0.1.0, whose checkpoints this "
                "version cannot read: use that version, or choose another --workdir"
            )
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise CheckpointError(
                    f"{self._directory / str(step)} is a checkpoint of another model: {name} is "
                    f"{old.get(name, 'missing')} there and {new.get(name, 'missing')} in "
                    "config.model; use the config of that run or another --workdir"
                )


def _image_size(data: dict[str, Any]) -> int:
    return data.get("image_size", 96)  # the only size up to 0.2.0


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _may_be_corrupt(error: Exception) -> bool:
    """Returns whether an error can come from the content of a checkpoint.

    A missing file can; a full disk, denied access or a limit of the process cannot.
    """
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return not isinstance(error, _UNRELATED_ERRORS)


def _in_primary(change: Callable[[], None]) -> None:
    """Changes the shared folder in the primary process; the others wait."""
    if jax.process_index() == 0:
        change()
    multihost_utils.sync_global_devices("histo_jax checkpoints")
