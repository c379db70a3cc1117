"""The folder of one run: its lock, its status and its files."""

import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from histo_jax.config import Config
from histo_jax.config_values import NO_URL, is_url
from histo_jax.errors import UserError
from histo_jax.run import files
from histo_jax.run.saved_config import LOCATIONS, SavedConfig, is_identity, plain
from histo_jax.run.signals import EXIT_STATUS, Preempted, watch

log = logging.getLogger("histo_jax")

CONFIG_NAME, _STATUS_NAME, _LOCK_NAME = "config.json", "status.json", "lock"


class Workdir:
    """The folder of a run.

    Args:
        path: the folder; it may not exist yet.
        is_primary: whether this process writes the run's files; of several processes one does.

    Attributes:
        path: see above.
        is_primary: see above.
        previous_state: the `state` that `status.json` had when the session began, if any. 'running'
            means that the last process was killed.
    """

    def __init__(self, path: str | os.PathLike[str], is_primary: bool = True) -> None:
        self.path = Path(path)
        self.is_primary = is_primary
        self.previous_state: str | None = None
        self._lock: IO[str] | None = None

    def __str__(self) -> str:
        return str(self.path)

    def write_text(self, name: str, text: str) -> None:
        """Writes a file of the run as `files.write_text` does; only the primary process does.

        Args:
            name: of the file, relative to this folder.
            text: its content.
        """
        if self.is_primary:
            files.write_text(self.path / name, text)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a file of the run as `files.write_json` does; only the primary process does."""
        if self.is_primary:
            files.write_json(self.path / name, values)

    def status(self) -> dict[str, Any]:
        """Returns the content of `status.json`, empty where it is missing or corrupt."""
        try:
            values = json.loads((self.path / _STATUS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def update_status(self, **values: Any) -> None:
        """Sets fields of `status.json` and keeps the others."""
        self.write_json(_STATUS_NAME, self.status() | values)

    def saved_config(self) -> SavedConfig | None:
        """Returns what `config.json` holds, None where there is none.

        Raises:
            UserError: it is corrupt, or of version 0.1.0.
        """
        path = self.path / CONFIG_NAME
        return SavedConfig.read(path) if path.exists() else None

    def save_config(self, config: Config, source: Mapping[str, str] | None = None) -> None:
        """Writes `config.json`; to be called in an acquired folder.

        Args:
            config: settings of the run.
            source: hashes of the code that trains it; None keeps those that the file holds.
        """
        saved = self.saved_config()
        if source is None:
            source = saved.source if saved else {}
        config_file = config.config_file or (saved.config_file if saved else None)
        content = SavedConfig(
            self.path / CONFIG_NAME, plain(config), dict(source), config_file
        ).to_json()
        self.write_json(CONFIG_NAME, content)

    def check_path(self) -> None:
        """Refuses what is not a path of this machine, or not one to work in; changes nothing.

        Raises:
            UserError: names it and the fix.
        """
        if is_url(str(self.path)):
            # Two slashes become one in a `Path`.
            url = re.sub(":/+", "://", str(self.path), count=1)
            raise UserError(f"--workdir={url} must be {NO_URL}")
        files.check_name(self.path, "--workdir")

    def check_compatible(self, config: Config) -> None:
        """Refuses a folder that cannot be written or that belongs to another run; changes nothing.

        Raises:
            UserError: names the folder, and the field with its old and new value.
        """
        self.check_path()
        has_checkpoints = any((self.path / "checkpoints").glob("*"))
        if config.predict.checkpoints and has_checkpoints:
            raise UserError(
                f"{self} is itself a trained run, and an ensemble of other runs would replace its "
                "scores and submission: choose another --workdir, or leave out "
                "--config.predict.checkpoints"
            )
        existing = files.nearest(self.path)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"--workdir={self} cannot be written: choose a folder that can")
        saved = self.saved_config()
        if saved is None:
            if has_checkpoints:
                raise UserError(
                    f"{self} holds checkpoints but no config.json: choose another --workdir"
                )
            return
        for name, (old, new) in saved.differences(config).items():
            if is_identity(name, config):
                raise UserError(
                    f"{self} belongs to another run: {name} was {old!r} there and is {new!r} "
                    f"here; choose another --workdir or set --config.{name} back"
                )

    def is_finished(self, config: Config, mode: str) -> bool:
        """Returns whether `mode` finished here with these settings and no training came after."""
        saved = self.saved_config()
        if saved is None or mode not in self.status().get("finished", []):
            return False
        return not saved.differences(config).keys() - set(LOCATIONS)

    @contextlib.contextmanager
    def session(self, mode: str) -> Iterator["Workdir"]:
        """Holds the folder's lock and keeps `status.json` up to date while `mode` works.

        Its `state` is running, then complete, preempted or failed. A folder that is not yet a
        run's (no `config.json`) is left alone until `acquire`, so that a mistake in the first
        command leaves nothing behind. Signals are handled as `signals.watch` describes.

        Raises:
            UserError: another process, or another thread of this one, works there.
        """
        with watch():
            try:
                if (self.path / CONFIG_NAME).exists():
                    self._acquire_lock()
                    self.previous_state = self.status().get("state")
                    if self.previous_state == "running":
                        log.info("the last process in %s was killed or crashed", self)
                self._set_state("running")
                yield self
                finished = sorted({*self.status().get("finished", []), mode})
                self._set_state("complete", finished=finished)
            except BaseException as error:
                # After Ctrl-C nothing restarts the command by itself.
                is_preempted = isinstance(error, Preempted) and error.code == EXIT_STATUS
                state = "preempted" if is_preempted else "failed"
                # The error itself matters more than a status that cannot be written any more.
                with contextlib.suppress(OSError):
                    self._set_state(state, reason=str(error) or type(error).__name__)
                raise
            finally:
                self._release_lock()

    def acquire(self, config: Config) -> None:
        """Makes the folder this run's own if it is not yet; to be called in a session.

        Raises:
            UserError: another process works there, or made it another run's in the meantime.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        was_locked = self._lock is not None
        self._acquire_lock()
        try:
            # Another process may have begun and ended a run here since the first check.
            self.check_compatible(config)
        except UserError:
            if not was_locked:
                self._release_lock()
            raise
        if not (self.path / CONFIG_NAME).exists():
            self.save_config(config)
        self._set_state("running")

    def _set_state(self, state: str, reason: str | None = None, **values: Any) -> None:
        # Without the lock the folder is not a run's yet, or another process's.
        if self._lock:
            self.update_status(state=state, reason=reason, **values)

    def _acquire_lock(self) -> None:
        """Locks the folder for this object; the system unlocks it however the process ends."""
        if self._lock or not self.is_primary:
            return
        file = files.open_lock(self.path / _LOCK_NAME)
        own_name = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            if not files.lock(file):
                log.warning(
                    "%s is on a file system without locks: make sure that no other process uses it",
                    self,
                )
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if owner == own_name:
                owner = "another command of this process"
            raise UserError(
                f"{self} is in use by {owner}: wait for it, stop it, or choose another --workdir"
            ) from None
        except OSError:
            file.close()
            raise
        if file.writable():
            with files.naming(self.path / _LOCK_NAME):
                file.truncate(0)
                file.write(f"{own_name}\n")
                file.flush()
        self._lock = file

    def _release_lock(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None
