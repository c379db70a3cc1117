"""The command line: `python -m histo_jax.main --config=FILE --workdir=DIR [--mode=MODE]`.

The console script `histo_jax` is the same.
"""

import faulthandler
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from histo_jax import environment, startup, streams
from histo_jax.errors import ParityError, UserError
from histo_jax.run import files, signals

try:
    from absl import flags
    from absl import logging as absl_logging

    from histo_jax import command_line
except ImportError as error:
    if startup.command() and (reason := startup.explain(error)):
        startup.fail(reason)
    raise

log = logging.getLogger("histo_jax")

# Imported when it is needed, so that --help and mistakes answer at once.
COMMANDS = {
    "run": "histo_jax.pipeline:run",
    "prepare": "histo_jax.preparation:prepare",
    "fit": "histo_jax.fitting:fit",
    "evaluate": "histo_jax.evaluation:evaluate",
    "predict": "histo_jax.prediction:predict",
    "report": "histo_jax.report:report",
    "audit": "histo_jax.auditing:audit",
    "compare": "histo_jax.comparison:compare",
    "explain": "histo_jax.report:explain",
    "export": "histo_jax.export:export",
    "heatmap": "histo_jax.wsi.heatmap:run",
}
_LEAK_FOUND = _NO_PARITY = 1
_EXPECTED_FAILURE = 2
_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def cli() -> None:
    """Runs the command line of this process, and exits."""
    streams.make_robust()
    streams.log_to_stderr()
    environment.reset_warnings()
    faulthandler.enable()
    sys.unraisablehook = _ignore_closed_loops
    absl_logging.use_absl_handler()
    # Orbax, Grain and TFDS log through absl, with tracebacks for what they raise anyway.
    absl_logging.set_verbosity(absl_logging.FATAL)
    flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own
    try:
        try:
            sys.exit(main(sys.argv))
        except ImportError as error:
            if reason := startup.explain(error):
                _fail(reason)
            raise
    except SystemExit as ending:
        lost = streams.flush_stdout()
        if lost and not ending.code:
            print(f"histo_jax: stdout was lost: {lost.strerror}", file=sys.stderr, flush=True)
            os._exit(_EXPECTED_FAILURE)
        # All files are closed. Threads that still read or compile would meet an interpreter that
        # shuts down, and turn the status into a segmentation fault.
        if isinstance(ending.code, int) and ending.code:
            sys.stderr.flush()
            os._exit(ending.code)
        raise


def main(argv: list[str]) -> int:
    """Runs a command; returns the exit status.

    Args:
        argv: the program, then its arguments.

    Raises:
        SystemExit: the command failed as expected, was preempted, or only printed help.
    """
    try:
        options = command_line.parse(argv, COMMANDS)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or '--config'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("histo_jax: interrupted while the config file was read", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    try:
        result = _run(options)
    except signals.Preempted as error:
        print(f"histo_jax: {error}", file=sys.stderr)
        raise
    except Exception as error:
        _exit_where_expected(error, options)
        raise
    return _show(options, result)


def _run(options: command_line.Options) -> Any:
    """Runs the mode's function and returns its result."""
    environment.load("histo_jax.distributed.runtime")
    if options.multihost:
        from histo_jax.distributed import consensus, processes

        processes.initialize(
            options.multihost, options.coordinator, options.process_count, options.process_index
        )
        # JAX aborts where another process is lost; stacks of all threads would hide its message.
        faulthandler.disable()
        consensus.check_options(options.config, options.mode)
    for note in options.notes:
        log.info("%s", note)
    workdir = options.workdir and files.expand(options.workdir, "--workdir")
    with environment.defaults(), signals.watch(ctrl_c=True):
        _check_typed_data(options, workdir)
        function = load_command(options.mode)
        if options.mode == "prepare":
            return function(options.config)
        return function(options.config, workdir)


def load_command(mode: str) -> Any:
    """Returns the function of a mode."""
    module, _, name = COMMANDS[mode].partition(":")
    return getattr(environment.load(module), name)


def _show(options: command_line.Options, result: Any) -> int:
    """Prints the results that no file holds; returns the exit status."""
    mode = options.mode
    if mode == "prepare":
        print(f"prepared records: {result.directory}")
    elif mode == "compare":
        from histo_jax import comparison

        print(comparison.table(result))
    elif mode == "audit":
        from histo_jax.data import leakage, source_adapter

        print(leakage.table(result, source_adapter.class_names(options.config.data)))
        return _LEAK_FOUND if leakage.has_leak(result) else 0
    return 0


def _check_typed_data(options: command_line.Options, workdir: Path | None) -> None:
    """Refuses raw data that this command line names and that the run was not trained on.

    Where only `config.json` names it, modes that read work without it.
    """
    reads_records = (
        options.mode in command_line.settings.READING_MODES and not options.config.predict.images
    )
    if reads_records and "data.raw_dir" in options.typed:
        from histo_jax.data.records import prepare

        prepare(options.config.data, options.config.data_seed, workdir)


def _exit_where_expected(error: Exception, options: command_line.Options) -> None:
    """Exits with one line where an error is no bug; returns where it may be one."""
    config, summary = options.config, " ".join(str(error).split())[:200]
    if isinstance(error, UserError):
        _fail(str(error))
    if isinstance(error, ParityError):
        _fail(str(error), _NO_PARITY)
    if isinstance(error, OSError):
        # A full disk or a folder without permission; a bug has another type.
        folders = (options.workdir or Path(), Path(os.path.expanduser(config.data.tfds_dir)))
        _fail(files.describe(error, folders))
    if "can't start new thread" in summary:
        _fail(f"{error}: raise the limit (ulimit -u, or the container's) and rerun the command")
    if "RESOURCE_EXHAUSTED" in str(error):
        _fail(
            "out of device memory: lower config.fit.batch_size or config.predict.batch_size, or "
            f"set --config.data.placement=host ({summary})"
        )
    if not options.multihost:
        return
    from histo_jax.distributed import processes, restarts

    if processes.is_process_loss(error):
        restarts.exit_after_loss(error, files.expand(options.workdir or Path(), "--workdir"))


def _ignore_closed_loops(unraisable: Any) -> None:
    """Drops what TensorStore's threads report to Orbax's loop after a save has failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _fail(message: str, status: int = _EXPECTED_FAILURE) -> NoReturn:
    print(f"histo_jax: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    cli()
