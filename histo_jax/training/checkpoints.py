"""Checkpoints, by Orbax; no other room knows it."""

import dataclasses
import errno
import functools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint import checkpoint_managers

from histo_jax.config import Config
from histo_jax.errors import UserError, one_line
from histo_jax.run import files
from histo_jax.training.state import EarlyStopping, TrainState, abstract_state

log = logging.getLogger("histo_jax")

_METRIC = "validation_loss"
# Errors that say nothing of a checkpoint: it may be whole.
_NO_DAMAGE = (UserError, MemoryError, jax.errors.JaxRuntimeError)
# What Orbax writes beside the arrays, bytes; about 200 kB were measured.
_OVERHEAD = 500_000


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One save.

    Attributes:
        state: parameters, BatchNorm statistics, normalisation, optimizer state, step, random key.
        early_stopping: its state.
        data: JSON-able; where the order of examples stands, the fingerprint of that order, the
            gradient norm of the last step, and after a validation the calibration that was fitted
            on it.
        history: JSON-able; one entry a finished epoch.
    """

    state: TrainState
    early_stopping: EarlyStopping
    data: dict[str, Any]
    history: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run: the latest two and the best are kept.

    Saving is asynchronous; use it as a context, whose end waits for the last save.

    Args:
        workdir: folder of the run.
        read_only: leave the folder as it is: another process may be saving there.

    Raises:
        UserError: `read_only`, and a checkpoint is damaged that would be put aside otherwise.
    """

    def __init__(self, workdir: Path, read_only: bool = False) -> None:
        self._directory = (workdir / "checkpoints").absolute()
        self._replaced = self._directory.with_name("replaced")
        if not read_only:
            _once(lambda: self._directory.mkdir(parents=True, exist_ok=True))
        self._literal = files.LiteralFolder(self._directory)
        if not read_only:
            _once(self._tidy_up)
        try:
            self._manager = self._open(read_only)
        except ValueError as error:
            if not read_only:
                raise
            raise UserError(
                f"{self._directory} holds a damaged checkpoint ({self._said(error)}): start that "
                "run again, which puts it aside"
            ) from None

    def _open(self, read_only: bool) -> ocp.CheckpointManager:
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
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(2),
                        checkpoint_managers.BestN(
                            get_metric_fn=lambda metrics: metrics[_METRIC],
                            reverse=True,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=False,
                save_interval_steps=int(not read_only),
            ),
        )

    def _tidy_up(self) -> None:
        for path in self._replaced.glob("*"):
            if not (self._directory / path.name).exists():
                path.rename(self._directory / path.name)  # the one in its place was never whole
        # Orbax reads all metrics when it opens the folder, and fails on one that is damaged.
        for path in self._directory.glob("*/metrics/metrics"):
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                _put_aside(path.parents[1], self._said(error))

    def _said(self, error: Exception) -> str:
        return one_line(error).replace(str(self._literal.path), str(self._directory))

    @classmethod
    def of(cls, workdir: Path, read_only: bool = False) -> "Checkpoints":
        """Opens the checkpoints of a run that has some.

        Raises:
            UserError: there are none.
        """
        if not any((workdir / "checkpoints").glob("*")):
            raise UserError(f"{workdir} holds no checkpoint: run --mode=fit first")
        return cls(workdir, read_only)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with files.naming(self._directory), files.disk_errors(self._directory):
            self._manager.close()

    def save(self, checkpoint: Checkpoint, validation_loss: float | None) -> None:
        """Starts to save under the state's step; waits only for the save before.

        Args:
            checkpoint: what is saved.
            validation_loss: decides which is the best, nats; None in the middle of an epoch.

        Raises:
            OSError: the folder cannot be written or the disk is full, here or at the last save.
        """
        step = int(checkpoint.state.step)
        self.wait()
        is_first = not self._manager.all_steps()
        _once(lambda: shutil.rmtree(self._replaced, ignore_errors=True))
        # Orbax notices a full disk late and says so at length.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.state)) + _OVERHEAD
        if shutil.disk_usage(self._directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
        if step in self._manager.all_steps():
            if validation_loss is None:
                return  # nothing is new
            # Saved before this epoch's validation, which is now known. Kept until the new one is
            # whole: until then it is the newest.
            _once(lambda: self._replace(step))
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
            self._read_back(checkpoint)

    def _read_back(self, checkpoint: Checkpoint) -> None:
        """Refuses a folder from which what was saved does not come back, before hours are spent."""
        try:
            self.restore(int(checkpoint.state.step), checkpoint.state, checkpoint.early_stopping)
        except Exception as error:  # whatever Orbax and TensorStore find wrong
            if not _is_damage(error):
                raise
            raise UserError(
                f"{self._directory} cannot hold checkpoints: the first one cannot be read back "
                f"({self._said(error)}); choose another --workdir"
            ) from None

    def _replace(self, step: int) -> None:
        self._replaced.mkdir()
        (self._directory / str(step)).rename(self._replaced / str(step))

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
            OSError: it could not be written.
        """
        with files.naming(self._directory), files.disk_errors(self._directory):
            self._manager.wait_until_finished()

    def best_step(self) -> int | None:
        """Returns the step of the lowest validation loss, or None where there is none."""
        return self._manager.best_step()

    def restore_latest(self, like: TrainState, early_stopping: EarlyStopping) -> Checkpoint | None:
        """Reads the newest checkpoint that is whole; damaged ones are put aside into `damaged/`.

        Args:
            like: see `restore`.
            early_stopping: see `restore`.

        Returns:
            None where no checkpoint is left.

        Raises:
            UserError: the checkpoint holds the state of another model.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                checkpoint = self.restore(step, like, early_stopping)
                self._manager.reload()
                return checkpoint
            except Exception as error:  # whatever Orbax and TensorStore find wrong
                if not _is_damage(error):
                    raise
                damaged = self._directory / str(step)
                _once(functools.partial(_put_aside, damaged, self._said(error)))
        self._manager.reload()
        return None

    def restore(self, step: int, like: TrainState, early_stopping: EarlyStopping) -> Checkpoint:
        """Reads one checkpoint.

        Args:
            step: which one.
            like: arrays or shapes with dtype and sharding that the state is to have.
            early_stopping: gives the settings that are not saved.

        Raises:
            UserError: the checkpoint holds the state of another model.
        """
        with files.disk_errors(self._directory / str(step)):
            saved = self._manager.item_metadata(step)["state"]
            if saved is None:
                raise ValueError("the metadata of its state is missing")
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

    def restore_best(self, config: Config, place: Sharding) -> Checkpoint:
        """Reads the checkpoint of the lowest validation loss.

        Args:
            config: `model` and `optimizer` must be those of the run.
            place: where each array is to lie.

        Raises:
            UserError: there is no checkpoint, it is damaged, or it is one of another model.
        """
        step = self.best_step()
        if step is None:
            raise UserError(f"{self._directory} holds no finished epoch: run --mode=fit further")
        early_stopping = EarlyStopping.create(config.early_stopping)
        try:
            return self.restore(step, abstract_state(config, place), early_stopping)
        except Exception as error:  # whatever Orbax and TensorStore find wrong
            if not _is_damage(error):
                raise
            path = self._directory / str(step)
            if not path.exists():
                raise UserError(
                    f"{path} was replaced by a better one while it was read: start again"
                ) from None
            raise UserError(
                f"{path}, the best checkpoint, is damaged "
                f"({self._said(error)}): restore it, or remove it to take the next best"
            ) from None

    def _check_shapes(self, step: int, saved: Any, like: TrainState) -> None:
        def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
            leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
            return {
                jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
                for path, leaf in leaves
            }

        there, here = shapes(saved), shapes(like)
        if "weights.deviation" in there:  # which is `std` since
            raise UserError(
                f"{self._directory.parent} was trained by histo_jax 0.1.0, whose checkpoints this "
                "version cannot read: use that version, or choose another --workdir"
            )
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise UserError(
                    f"{self._directory / str(step)} is a checkpoint of another model: {name} is "
                    f"{there.get(name, 'missing')} there and {here.get(name, 'missing')} in "
                    "config.model; give the config of that run or another --workdir"
                )


def _is_damage(error: Exception) -> bool:
    """Whether it speaks of what is in a checkpoint: a missing part does, a forbidden one not."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return not isinstance(error, _NO_DAMAGE)


def _once(change: Callable[[], None]) -> None:
    """Changes the folder, which all processes see, in the first; the others wait."""
    if jax.process_index() == 0:
        change()
    multihost_utils.sync_global_devices("histo_jax checkpoints")


def _put_aside(path: Path, reason: str) -> None:
    place = path.parents[1] / "damaged" / f"{path.name}-{uuid.uuid4().hex[:8]}"
    place.parent.mkdir(exist_ok=True)
    path.rename(place)
    log.warning("checkpoint %s is damaged and was put aside as %s (%s)", path.name, place, reason)
