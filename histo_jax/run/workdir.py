"""The folder of one run: whose it is, and what state it is in."""

import contextlib
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from histo_jax.config import NO_URL, Config, flat, folders, is_url, set_field, validate
from histo_jax.errors import UserError
from histo_jax.run import files
from histo_jax.run.signals import EXIT_STATUS, Preempted, watch

log = logging.getLogger("histo_jax")

# A difference in one of these makes another run, which needs another folder. The rest (lengths,
# where things lie, what to evaluate) may change between two starts.
_IDENTITY_PREFIXES = (
    "seed", "data.", "model.", "augment.", "optimizer.", "fit.batch_size", "fit.steps_per_",
    "fit.loss",
)  # fmt: skip
WHERE = ("data.raw_dir", "data.tfds_dir", "data.records", "data.placement")
# Saved as absolute paths, so that a start from another folder means the same files.
_PATHS = ("data.raw_dir", "data.tfds_dir", "data.slide_map")
_LISTS_OF_PATHS = ("predict.checkpoints",)
_SOURCE = "source"  # key in config.json, beside the settings

_is_primary = True
# By real path: the thread that works in a folder, and the lock by which its process holds it.
_tracked: dict[str, int] = {}
_tracked_guard = threading.Lock()
_locks: dict[str, IO[str]] = {}


def set_primary(yes: bool) -> None:
    """Says whether this process writes the run's files: of several only one does."""
    global _is_primary
    _is_primary = yes


def is_primary() -> bool:
    """Whether this process writes the run's files."""
    return _is_primary


def write_text(path: Path, text: str) -> None:
    """Writes a file of the run as `files.write_text` does, if this process is to."""
    if _is_primary:
        files.write_text(path, text)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file of the run as `files.write_json` does, if this process is to."""
    if _is_primary:
        files.write_json(path, values)


def plain(config: Config) -> dict[str, Any]:
    """Returns the settings as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(flat(config)))


def _with_absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with relative paths completed; those below a home stay as they are."""

    def complete(name: str, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        if name in _LISTS_OF_PATHS:
            return ",".join(complete(_PATHS[0], folder) for folder in folders(value))
        is_relative = name in _PATHS and not value.startswith("~")
        return os.path.abspath(value) if is_relative else value

    return {name: complete(name, value) for name, value in values.items()}


def is_saved(workdir: Path, name: str, value: Any) -> bool:
    """Tells whether the `config.json` of a run holds this value of a setting."""
    if not (workdir / "config.json").exists():
        return False
    saved, given = ({name: v} for v in (_read_config(workdir).get(name), value))
    return _with_absolute_paths(saved) == _with_absolute_paths(given)


def _read_config(workdir: Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
        UserError: it is damaged.
    """
    return _read_json(workdir / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        # Some editors put a byte-order mark in front.
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: choose another --workdir") from None
    return values


def load_config(workdir: Path) -> Config:
    """Returns the settings of a run; those that it does not know yet have their default.

    Raises:
        UserError: the folder is no run, or its settings are damaged or of another version.
    """
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is not the folder of a run: it has no config.json")
    return read_settings(workdir / "config.json")


def read_settings(path: Path) -> Config:
    """Returns the settings that a `config.json` holds; those that it lacks have their default.

    Raises:
        UserError: it is damaged, or of another version.
    """
    config = Config()
    known = flat(config)
    for name, value in _read_json(path).items():
        if name == _SOURCE:
            continue
        if name not in known:
            raise UserError(
                f"{path} was written by another version of histo_jax: it holds {name}, which this "
                "one does not know; use that version"
            )
        is_list = isinstance(known[name], tuple) and isinstance(value, list)
        set_field(config, name, tuple(value) if is_list else value)
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def read_source(workdir: Path) -> dict[str, str]:
    """Returns the hashes of source code that `config.json` holds; 0.1.0 wrote none."""
    values = _read_config(workdir).get(_SOURCE)
    return values if isinstance(values, dict) else {}


def check_path(workdir: Path) -> None:
    """Refuses what is no path of this machine, or none that can be worked in; changes nothing.

    Raises:
        UserError: names it and the remedy.
    """
    if is_url(str(workdir)):
        url = re.sub(":/+", "://", str(workdir), count=1)  # two slashes become one in a `Path`
        raise UserError(f"--workdir={url} must be {NO_URL}")
    files.check_name(workdir, "--workdir")


def check_compatible(workdir: Path, config: Config) -> None:
    """Refuses a folder that cannot be written or that belongs to another run; changes nothing.

    Raises:
        UserError: names the folder, and the field with its old and new value.
    """
    check_path(workdir)
    if config.predict.checkpoints and any((workdir / "checkpoints").glob("*")):
        raise UserError(
            f"{workdir} is a run of its own, whose scores and submission the mean of other runs "
            "would replace: choose another --workdir, or leave out --config.predict.checkpoints"
        )
    existing = files.nearest(workdir)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be written: choose a folder that can")
    path = workdir / "config.json"
    if not path.exists():
        if any((workdir / "checkpoints").glob("*")):
            raise UserError(
                f"{workdir} holds checkpoints but no config.json: choose another --workdir"
            )
        return
    # A setting that is newer than the run had its default.
    old = _with_absolute_paths(plain(Config()) | _read_config(workdir))
    for name, value in _with_absolute_paths(plain(config)).items():
        counts = name.startswith(_IDENTITY_PREFIXES) and name not in WHERE
        # A schedule spans all epochs, so another number of them makes another run.
        counts |= name == "fit.epochs" and config.optimizer.schedule != "constant"
        if counts and old[name] != value:
            raise UserError(
                f"{workdir} belongs to another run: {name} was {old[name]!r} there and is "
                f"{value!r} here; choose another --workdir or set --config.{name} back"
            )


def acquire(workdir: Path, config: Config) -> None:
    """Makes the folder this run's own, if it is not yet: takes its lock and saves the config.

    Raises:
        UserError: another process works there, or it has become another run's in the
            meantime.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    held = os.path.realpath(workdir) in _locks
    _lock(workdir)
    try:
        # Another process may have begun and ended a run here since it was looked at.
        check_compatible(workdir, config)
    except UserError:
        if not held:
            _release(workdir)
        raise
    if not (workdir / "config.json").exists():
        save_config(workdir, config)


def save_config(workdir: Path, config: Config, source: Mapping[str, str] | None = None) -> None:
    """Writes `config.json`; to be called in a folder that is claimed.

    Args:
        workdir: folder of the run.
        config: its settings.
        source: hashes of the code that trains it; None keeps those that the file holds.
    """
    path = workdir / "config.json"
    if source is None and path.exists():
        source = read_source(workdir)
    values = _with_absolute_paths(plain(config))
    write_json(path, values | ({_SOURCE: dict(source)} if source else {}))


def _lock(workdir: Path) -> None:
    """Takes the folder for this process; the system lets go of it however the process ends."""
    key = os.path.realpath(workdir)
    if key in _locks or not _is_primary:
        return
    file = files.open_lock(workdir / "lock")
    try:
        if not files.lock(file):
            log.warning(
                "%s is on a file system without locks: see to it that no other process works there",
                workdir,
            )
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{workdir} is in use by {owner}: wait for it, stop it, or choose another --workdir"
        ) from None
    except OSError:
        file.close()
        raise
    if file.writable():
        with files.naming(workdir / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
    _locks[key] = file


def _release(workdir: Path) -> None:
    lock = _locks.pop(os.path.realpath(workdir), None)
    if lock:
        lock.close()


def status(workdir: Path) -> dict[str, Any]:
    """Returns what `status.json` says, or nothing where there is none that can be read."""
    try:
        values = json.loads((workdir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def update_status(workdir: Path, **values: Any) -> None:
    """Changes fields of `status.json` and keeps the others."""
    write_json(workdir / "status.json", status(workdir) | values)


@contextlib.contextmanager
def session(workdir: Path, mode: str) -> Iterator[None]:
    """Holds the folder's lock and keeps `status.json` true while `mode` works.

    Its `state` is running, then complete, preempted or failed. Of nested modes the outermost
    counts, so that `run` is not complete before its last part. A folder that is not yet a run's
    own (no `config.json`) is left alone until `acquire`, so that a mistake in the first command
    leaves nothing behind.

    Raises:
        UserError: another process, or another thread of this one, works there.
    """
    key, thread = os.path.realpath(workdir), threading.get_ident()
    with _tracked_guard:
        owner = _tracked.get(key)
        _tracked.setdefault(key, thread)
    if owner == thread:
        yield
        return
    if owner is not None:
        raise UserError(
            f"{workdir} is in use by another thread of this process: wait for it, or choose "
            "another --workdir"
        )

    def note(**values: Any) -> None:
        # Without its lock the folder is nobody's yet, or another process's.
        if key in _locks:
            update_status(workdir, **values)

    try:
        if (workdir / "config.json").exists():
            _lock(workdir)
            if status(workdir).get("state") == "running":
                log.info("the last process in %s ended without a word", workdir)
        note(state="running", reason=None)
        with watch():
            yield
        note(state="complete", finished=sorted({*status(workdir).get("finished", []), mode}))
    except BaseException as error:
        preempted = isinstance(error, Preempted) and error.code == EXIT_STATUS
        state = "preempted" if preempted else "failed"
        # The error itself matters more than a status that cannot be written any more.
        with contextlib.suppress(OSError):
            note(state=state, reason=str(error) or type(error).__name__)
        raise
    finally:
        _release(workdir)
        _tracked.pop(key, None)


def is_finished(workdir: Path, config: Config, mode: str) -> bool:
    """Tells whether `mode` has finished here with these settings and nothing was trained since."""
    if mode not in status(workdir).get("finished", []):
        return False
    old = _with_absolute_paths(plain(Config()) | _read_config(workdir))
    new = _with_absolute_paths(plain(config))
    return all(old[name] == new[name] for name in new if name not in WHERE)
