"""What every command does at its start: check the settings, set up JAX, open the run's folder."""

import contextlib
import os
from collections.abc import Callable, Iterator

from histo_jax import environment, settings
from histo_jax.config import Config
from histo_jax.config_checks import validate
from histo_jax.distributed import processes, restarts, runtime
from histo_jax.run import files, progress, signals
from histo_jax.run.workdir import Workdir


@contextlib.contextmanager
def start(
    config: Config,
    workdir: str | os.PathLike[str],
    mode: str,
    check: Callable[[Workdir], None] | None = None,
) -> Iterator[Workdir]:
    """Opens the folder of a run for a command that computes, and closes it at its end.

    Inside, JAX and other libraries have their default settings, signals are handled, the folder is
    locked (from `Workdir.acquire` on where it is not yet a run's), and `status.json` follows.

    Args:
        config: settings of the command.
        workdir: folder of the run.
        mode: name of the command.
        check: refuses what cannot work, by a `UserError`, before the folder's status changes.

    Yields:
        The open folder, to be handed to what the command consists of.

    Raises:
        UserError: a setting or the folder is wrong, or another process works there; the message
            names the fix.
    """
    with environment.defaults(), runtime.jax_defaults(), progress.working(mode):
        run = open_workdir(config, workdir)
        runtime.set_up()
        run.is_primary = processes.is_primary()
        if check:
            check(run)
        with run.session(mode), restarts.track(run):
            yield run


@contextlib.contextmanager
def read_only(config: Config, workdir: str | os.PathLike[str], mode: str) -> Iterator[Workdir]:
    """Opens the folder of a run as `start` does, without its lock and its `status.json`.

    For a command that reads checkpoints and writes files of its own: what a finished run holds
    stays as it is, and another process may be training there.
    """
    with (
        environment.defaults(), runtime.jax_defaults(), progress.working(mode), signals.watch()
    ):  # fmt: skip
        run = open_workdir(config, workdir)
        runtime.set_up()
        run.is_primary = processes.is_primary()
        yield run


def open_workdir(config: Config, workdir: str | os.PathLike[str]) -> Workdir:
    """Returns the folder of a run, neither locked nor changed; starts no device.

    Loads the run's config file where it registers what `config` names.

    Raises:
        UserError: a setting is wrong, or the folder belongs to another run; names the fix.
    """
    run = Workdir(files.expand(workdir, "--workdir"), processes.is_primary())
    settings.register_missing(config, run)
    validate(config)
    run.check_compatible(config)
    return run
