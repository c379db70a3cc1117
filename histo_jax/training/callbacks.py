"""Callbacks: objects that observe a training run, and the writer of `history.csv`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histo_jax.distributed import consensus
from histo_jax.errors import UserError, one_line
from histo_jax.run import files

HISTORY_COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "validation_loss",
    "validation_auc",
    "learning_rate",
)


class Callback:
    """Base class of callbacks; each method does nothing.

    `fit` takes any object: subclassing is optional, and methods that an object lacks are not
    called. Only the primary process of a run calls them. If a method raises an exception, the run
    saves a checkpoint and stops with an error that names the callback.

    Example:
        class PrintAuc(histo_jax.Callback):
            def on_epoch_end(self, epoch, logs):
                print(epoch, logs["validation_auc"])

        histo_jax.fit(config, workdir, callbacks=[PrintAuc()])
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        """Called after each epoch, when its checkpoint is being saved.

        A run that is killed between the save and this call resumes after that epoch: the call is
        not made up for.

        Args:
            epoch: number of the epoch, counted from 1.
            logs: the columns of `history.csv`: `epoch`, `step`, `train_loss`, `validation_loss`,
                `validation_auc`, `learning_rate`; besides `gradient_norm` of the last step and
                `weight_norm`. The callback may change its copy.
        """

    def on_images(self, name: str, step: int, image: np.ndarray) -> None:
        """Called with each image that a run shows.

        Args:
            name: what it shows. 'training_patches', shown once before the first step: augmented
                patches of the first batches.
            step: training step.
            image: uint8[height, width, 3].
        """


_METHODS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class CallbackError(UserError):
    """A method of a callback raised an exception."""


class CallbackList:
    """Calls the methods of several callbacks in order, in the primary process.

    All processes must make the same calls: they learn whether one failed.

    Args:
        built_in: callbacks of the package; their exceptions are not wrapped.
        callbacks: those of the user.
        is_primary: whether this process calls them.
    """

    def __init__(
        self, built_in: Sequence[Callback], callbacks: Sequence[Any], is_primary: bool
    ) -> None:
        self._built_in, self._callbacks, self._is_primary = built_in, callbacks, is_primary

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Calls `on_epoch_end` of each with its own copy of `logs`.

        Raises:
            CallbackError: a callback of the user failed.
        """
        self._call("on_epoch_end", lambda: (epoch, dict(logs)))

    def on_images(self, name: str, step: int, draw: Callable[[], np.ndarray]) -> None:
        """Calls `on_images` of each.

        Args:
            name: see `Callback.on_images`.
            step: likewise.
            draw: returns the image; called in the primary process only.

        Raises:
            CallbackError: a callback of the user failed.
        """
        image = draw() if self._is_primary else None
        self._call("on_images", lambda: (name, step, image))

    def _call(self, method: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
        error = None
        if self._is_primary:
            for callback in self._built_in:
                getattr(callback, method)(*arguments())
            error = self._call_users(method, arguments)
        # All processes stop together: those that did not call would wait for this one.
        if consensus.broadcast_from_primary(np.array([error is not None]))[0]:
            raise error or CallbackError("a callback failed in process 0, see its message")

    def _call_users(
        self, method: str, arguments: Callable[[], tuple[Any, ...]]
    ) -> CallbackError | None:
        for callback in self._callbacks:
            try:
                function = getattr(callback, method, None)
                if function is not None:
                    function(*arguments())
            except (Exception, SystemExit) as error:  # user code may raise anything
                failed = CallbackError(
                    f"callback {type(callback).__name__}.{method} failed: {type(error).__name__}: "
                    f"{one_line(error)}; the run is saved: fix the callback and rerun to resume"
                )
                failed.__cause__ = error
                return failed
        return None


def check_callbacks(callbacks: Any) -> list[Any]:
    """Returns the callbacks as a list.

    Raises:
        UserError: it is not iterable, or an item is a class or has no method of a callback.
    """
    try:
        items = list(callbacks)
    except TypeError:
        name = type(callbacks).__name__
        raise UserError(
            f"callbacks is a {name}; it must be a list of callbacks, [{name}()]"
        ) from None
    for index, callback in enumerate(items):
        name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
        if isinstance(callback, type):
            raise UserError(f"callbacks[{index}] is the class {name}: pass an object, {name}()")
        if not any(hasattr(callback, method) for method in _METHODS):
            raise UserError(
                f"callbacks[{index}] ({name}) has none of the methods {', '.join(_METHODS)}: "
                "define one, or leave the callback out"
            )
    return items


class HistoryFile(Callback):
    """Writes `history.csv`: one row per epoch, the whole file replaced atomically.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Mapping[str, Any]] = []

    def restore(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Rewrites the file from the history of a checkpoint: a kill may leave it out of date."""
        self._rows = list(history)
        if self._rows or self._path.exists():
            self._write()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        """Adds a row."""
        self._rows.append(logs)
        self._write()

    def _write(self) -> None:
        files.write_text(self._path, history_table(self._rows).to_csv(index=False))


def history_table(history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns the rows of `history.csv`."""
    return pd.DataFrame(list(history), columns=list(HISTORY_COLUMNS))
