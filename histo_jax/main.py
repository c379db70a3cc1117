"""The command line: `python -m histo_jax.main --config=FILE --workdir=DIR [--mode=MODE]`."""

import faulthandler
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from histo_jax import preemption, startup
from histo_jax.config import Config, describe, validate
from histo_jax.errors import ExpectedError

try:
    from absl import app, flags
    from absl import logging as absl_logging
    from ml_collections import config_flags
except ImportError as error:
    if __name__ == "__main__":
        startup.fail(startup.explain(error))
    raise

MODES = ("run", "prepare", "fit", "evaluate", "predict", "report", "audit", "compare", "explain")
HOSTS = ("auto", "slurm", "tpu", "manual")
_LEAK_FOUND = 1
_EXPECTED_FAILURE = 2

_USAGE = """\
usage: python -m histo_jax.main --config=FILE --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...]

  --config=FILE    a Python file with get_config(), such as configs/kaggle.py
  --workdir=DIR    folder of the run: checkpoints, history, scores, submission
  --mode=MODE      run (default): all of the following up to report, in order
                   prepare: write the records; fit: train, or go on; evaluate: score the best
                   checkpoint; predict: write submission.csv with it; report: write report.html
                   from what evaluate has written.
                   audit, alone: does a patch or a slide stand on two sides? (status 1: yes)
                   compare, alone: do the two runs of config.compare.runs differ?
                   explain, alone: what in a patch spoke for tumour? pictures of config.explain.ids
  --multihost=HOW  one of several processes that work on one run: auto, slurm or tpu find each
                   other; manual needs --coordinator=HOST:PORT, the same everywhere,
                   --process_count=N and --process_index=I, from 0

Fields, each with its default (the config file may set another):
"""


class _OrNone(flags.ArgumentParser):
    """Parses as another parser does, and `None` as None, which optional fields need."""

    def __init__(self, parser: flags.ArgumentParser) -> None:
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument in (None, "None", "none") else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


class _Bool(flags.BooleanParser):
    """Says in words what the library says as a tuple."""

    def parse(self, argument: Any) -> bool:
        try:
            return bool(super().parse(argument))
        except ValueError:
            raise ValueError("must be true or false") from None


def _define_flags() -> None:
    config_flags.register_flag_parser_for_type(bool, _Bool())
    config_flags.register_flag_parser_for_type(int, _OrNone(flags.IntegerParser()))
    config_flags.register_flag_parser_for_type(float, _OrNone(flags.FloatParser()))
    config_flags.register_flag_parser_for_type(str, _OrNone(flags.ArgumentParser()))
    config_flags.DEFINE_config_file("config", None, "config file", lock_config=False)
    flags.DEFINE_string("workdir", None, "folder of the run")
    flags.DEFINE_enum("mode", "run", MODES, "what to do")
    flags.DEFINE_enum("multihost", None, HOSTS, "how to find the other processes of the run")
    flags.DEFINE_string("coordinator", None, "host:port of the first process")
    flags.DEFINE_integer("process_count", None, "processes of the run")
    flags.DEFINE_integer("process_index", None, "this one's number, from 0")


def _fail(message: str) -> NoReturn:
    print(f"histo_jax: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_EXPECTED_FAILURE)


def _check_config_file(value: str) -> None:
    """Executes the file once beforehand: the library hides or garbles what it raises."""
    path, *argument = value.split(":", 1)
    if not Path(path).is_file():
        _fail(f"--config={path}: no such file; try --config=configs/quickstart.py")
    try:
        config = runpy.run_path(path)["get_config"](*argument)
    except (Exception, SystemExit) as error:
        _fail(f"{path}: the config file is broken: {type(error).__name__}: {error}")
    if not isinstance(config, Config):
        _fail(f"{path}: get_config() must return histo_jax.Config, not {type(config).__name__}")


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses, and turns every mistake on the command line into one line and status 2."""
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv[1:]):
        fields = (
            f"  --config.{name}={default}\n      {text}\n" for name, default, text in describe()
        )
        sys.stdout.write(_USAGE + "".join(fields))
        sys.exit(0)
    known = {f"config.{name}" for name, _, _ in describe()}
    config_given = False
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            _check_config_file(value if equals else following)
            config_given = True
        elif argument.startswith("-") and name.startswith("config.") and name not in known:
            _fail(f"unknown config field: {name} (see --help)")
    if not config_given:
        _fail("--config is missing (see --help)")
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(f"{error} (see --help)")
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r} (see --help)")
    if not flags.FLAGS.workdir:
        _fail("--workdir is missing (see --help)")
    return rest


def _prepare(config: Config, workdir: Path) -> None:
    from histo_jax.data.builder import prepare

    directory = prepare(config).directory
    print(f"prepared records: {directory}")


def _fit(config: Config, workdir: Path) -> None:
    from histo_jax.fitting import fit

    fit(config, workdir)


def _evaluate(config: Config, workdir: Path) -> None:
    from histo_jax.evaluation import evaluate

    evaluate(config, workdir)


def _predict(config: Config, workdir: Path) -> None:
    from histo_jax.prediction import predict

    predict(config, workdir)


def _report(config: Config, workdir: Path) -> None:
    from histo_jax.report import report

    report(config, workdir)


def _compare(config: Config, workdir: Path) -> None:
    from histo_jax.comparison import compare, table

    print(table(compare(config, workdir)))


def _explain(config: Config, workdir: Path) -> None:
    from histo_jax.report import explain

    explain(config, workdir)


def _audit(config: Config, workdir: Path) -> None:
    from histo_jax import workdir as workdirs
    from histo_jax.data.audit import audit, has_leak, table
    from histo_jax.data.builder import prepare
    from histo_jax.data.splits import make_sides

    workdirs.check(workdir, config)
    prepared = prepare(config)
    report = audit(prepared, make_sides(prepared.tables, config), config.seed)
    workdir.mkdir(parents=True, exist_ok=True)
    workdirs.write_json(workdir / "audit.json", report)
    print(table(report))
    if has_leak(report):
        sys.exit(_LEAK_FOUND)


def _run(config: Config, workdir: Path) -> None:
    from histo_jax import workdir as workdirs

    workdirs.check(workdir, config)
    if workdirs.is_finished(workdir, config, "run"):
        print(f"{workdir} is already complete; for another run choose another --workdir")
        return
    with workdirs.tracked(workdir, "run"):
        _fit(config, workdir)
        _evaluate(config, workdir)
        from histo_jax.prediction import NoTestPatchesError

        try:
            _predict(config, workdir)
        except NoTestPatchesError as error:
            print(f"no submission.csv: {error}")
        _report(config, workdir)
        # What only evaluation and prediction depend on may be other than `fit` has saved.
        workdirs.save_config(workdir, config)


# Each verb imports what it needs, so that --help and mistakes answer at once.
_VERBS: dict[str, Callable[[Config, Path], None]] = {
    "run": _run,
    "prepare": _prepare,
    "fit": _fit,
    "evaluate": _evaluate,
    "predict": _predict,
    "audit": _audit,
    "compare": _compare,
    "report": _report,
    "explain": _explain,
}


def _quiet_threads(unraisable: Any) -> None:
    """Drops what TensorStore's threads report to Orbax's loop after a save has failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def main(_: list[str]) -> None:
    """Runs the chosen verb; expected failures become one line and status 2."""
    # Orbax, Grain and TFDS log through absl, with tracebacks for what they raise anyway.
    absl_logging.set_verbosity(absl_logging.FATAL)
    sys.unraisablehook = _quiet_threads
    config, workdir = flags.FLAGS.config, Path(flags.FLAGS.workdir).expanduser()
    try:
        validate(config)
        if flags.FLAGS.multihost:
            from histo_jax.training import agreement, hosts

            flag = flags.FLAGS
            hosts.join(flag.multihost, flag.coordinator, flag.process_count, flag.process_index)
            # JAX aborts where another process is lost; stacks of all threads would hide its words.
            faulthandler.disable()
            agreement.check_options(config, flag.mode)
        with preemption.watch(ctrl_c=True):
            _VERBS[flags.FLAGS.mode](config, workdir)
    except preemption.Preempted as error:
        print(f"histo_jax: {error}", file=sys.stderr)
        raise
    except ExpectedError as error:
        _fail(str(error))
    except OSError as error:
        # A full disk or a folder without permission; a bug has another type.
        _fail(f"{error.filename or workdir}: {error.strerror or error}; mend that and start again")
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(
                "the memory of a device is full: lower config.fit.batch_size or "
                "config.predict.batch_size, or set --config.data.placement=host "
                f"({' '.join(str(error).split())[:200]})"
            )
        if not flags.FLAGS.multihost:
            raise
        from histo_jax.training import hosts

        if not hosts.is_loss(error):
            raise
        print(
            "histo_jax: another process of the run has ended, see what it says; start all of them "
            f"again, they go on from the newest save ({' '.join(str(error).split())[:200]})",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        # At once: whatever waits for the lost process would wait for ever.
        os._exit(preemption.EXIT_STATUS)


def _run_app() -> None:
    try:
        app.run(main, flags_parser=_parse_flags)
    except ImportError as error:
        if why := startup.explain(error):
            _fail(why)
        raise


if __name__ == "__main__":
    try:
        _define_flags()
    except flags.Error as error:  # a --flagfile that cannot be read
        _fail(str(error))
    try:
        _run_app()
    except SystemExit as ending:
        # What had to be closed is closed. Threads that still read or compile would meet an
        # interpreter that is being taken down, and turn the status into a segmentation fault.
        if isinstance(ending.code, int) and ending.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ending.code)
        raise
