"""The command line: `python -m histo_jax.main --config=FILE --workdir=DIR [--mode=MODE]`."""

import collections
import faulthandler
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from histo_jax import environment, settings, startup, streams
from histo_jax.config import Config, describe, likely_field, names, unknown_field, validate
from histo_jax.errors import UserError, closest
from histo_jax.run import files, signals
from histo_jax.version import VERSION

try:
    from absl import app, flags
    from absl import logging as absl_logging
    from ml_collections import config_flags
except ImportError as error:
    if __name__ == "__main__":
        startup.fail(startup.explain(error))
    raise

log = logging.getLogger("histo_jax")

MODES = ("run", "prepare", "fit", "evaluate", "predict", "report", "audit", "compare", "explain")
HOSTS = ("auto", "slurm", "tpu", "manual")
_LEAK_FOUND = 1
_EXPECTED_FAILURE = 2
_INTERRUPTED = 130  # as shells have it: 128 + SIGINT

_USAGE = """\
usage: python -m histo_jax.main --config=FILE --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...]
       python -m histo_jax.main --workdir=DIR --mode=MODE [--config.FIELD=VALUE ...]

  --config=FILE    a Python file with get_config(), such as configs/kaggle.py; FILE:TEXT for
                   get_config(TEXT); the name of a recipe, such as kaggle; or a run's config.json.
                   May be left out where DIR has a config.json, which then gives all settings.
                   evaluate, predict, report, audit and explain take from FILE only folders and
                   what to evaluate, predict and explain; the rest from the run
  --workdir=DIR    folder of the run: checkpoints, history, scores, submission; compare needs none
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
  --flagfile=FILE  a file with more of these options, one a line
  --version        the version

Fields, each with its default (the config file may set another):
"""


_EXAMPLE = "--config=configs/quickstart.py --workdir=runs/quickstart"
_FOLDERS = ("data.raw_dir", "data.tfds_dir", "data.slide_map")


def _whole_number(text: str) -> int:
    """Returns the number; 64.0 and 1e3, as some tools write them, are whole numbers, too."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer() or abs(number) > 2**53:
            raise ValueError from None
        return int(number)


def _true_or_false(text: str) -> bool:
    return bool(flags.BooleanParser().parse(text))


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole_number(number) for number in re.split(r"[,\s]+", text.strip("()[], ")))


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


class _Parser(flags.ArgumentParser):
    """Parses a field's value, and `None`, which optional fields take; errors in words."""

    def __init__(self, convert: Callable[[str], Any], wanted: str) -> None:
        self._convert, self._wanted = convert, wanted

    def parse(self, argument: Any) -> Any:
        if argument in ("None", "none"):
            return None
        if not isinstance(argument, str):  # a default
            return argument
        try:
            return self._convert(argument)
        except (ValueError, OverflowError):
            raise ValueError(f"must be {self._wanted}") from None


class _ChoiceParser(flags.ArgumentParser):
    """Parses one of a few words."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self._choices = choices

    def parse(self, argument: Any) -> Any:
        if argument in self._choices:
            return argument
        match = closest(argument, self._choices)
        hint = f"; did you mean {match}?" if match else ""
        raise ValueError(f"must be one of {', '.join(self._choices)}{hint}")


_INTEGER = _Parser(_whole_number, "a whole number")


def _define_flags() -> None:
    for kind, parser in (
        (bool, _Parser(_true_or_false, "true or false")),
        (int, _INTEGER),
        (float, _Parser(float, "a number")),
        (str, _Parser(str, "text")),
        (dict, _Parser(_json_object, 'a JSON object such as {"width": 32}')),
        (tuple, _Parser(_whole_numbers, "five whole numbers such as 32,64,128,256,512")),
    ):
        config_flags.register_flag_parser_for_type(kind, parser)
    flags.DEFINE_string("workdir", None, "folder of the run")
    flags.DEFINE(_ChoiceParser(MODES), "mode", "run", "what to do")
    flags.DEFINE(_ChoiceParser(HOSTS), "multihost", None, "how to find the run's other processes")
    flags.DEFINE_string("coordinator", None, "host:port of the first process")
    flags.DEFINE(_INTEGER, "process_count", None, "processes of the run")
    flags.DEFINE(_INTEGER, "process_index", None, "this one's number, from 0")


_OWN_FLAGS = (
    "config", "workdir", "mode", "multihost", "coordinator", "process_count", "process_index",
    "flagfile", "help", "version",
)  # fmt: skip


def _fail(message: str) -> NoReturn:
    print(f"histo_jax: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_EXPECTED_FAILURE)


def _answer_questions(argv: list[str]) -> None:
    """Ends with status 0 where the command line only asks for help or for the version."""
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv[1:]):
        fields = (
            f"  --config.{name}={default}\n      {text}\n" for name, default, text in describe()
        )
        sys.stdout.write(_USAGE + "".join(fields))
        sys.exit(0)
    if {"--version", "-version"} & set(argv[1:]):
        print(f"histo_jax {VERSION}")
        sys.exit(0)


def _split(argv: list[str]) -> tuple[list[str], str | None, list[str], dict[str, str]]:
    """Takes the settings out of a command line; fails at a field that does not exist.

    Returns:
        The rest; the last value of `--config`; each `--config.FIELD`, as one argument; the values
        of these as typed, by dotted name.
    """
    defaults = {name: default for name, default, _ in describe()}
    rest, given, fields, typed = [argv[0]], None, [], {}
    following = collections.deque(argv[1:])
    while following and following[0] != "--":
        argument = following.popleft()
        name, equals, value = argument.lstrip("-").partition("=")
        match = re.fullmatch(r"config|(?:no)?config\.(.*)", name)
        if not argument.startswith("-") or not match:
            rest.append(argument)
            continue
        field = match[1]
        if field is not None and field not in defaults:
            _fail(unknown_field(field))
        takes_value = not isinstance(defaults.get(field or ""), bool)
        if takes_value and name.startswith("no"):
            _fail(f"--{name}: only a field of true or false has such an option (see --help)")
        if not equals and takes_value and following and not following[0].startswith("--"):
            equals, value = "=", following.popleft()
        if field is not None:
            fields.append(f"--{name}{equals}{value}")
            typed[field] = value
        elif equals:
            given = value
        else:
            _fail("--config has no value: write --config=FILE (see --help)")
    return [*rest, *following], given, fields, typed


def _check_path(option: str, text: str) -> None:
    """Fails at a path that the shell has left with what it usually replaces or removes."""
    path = os.path.expanduser(text)
    if os.path.lexists(path):
        return
    if text.startswith("--"):
        _fail(f"{option} has no value before {text}: write {option}=DIR")
    if path.startswith("~"):
        _fail(f"{option}={text}: there is no such home folder; write the whole path")
    if text[0] == text[-1] and text[0] in "'\"":
        _fail(f"{option}={text} has quotes around it: leave them out")
    if os.path.expandvars(text) != text:
        _fail(f"{option}={text} was not replaced by the shell: write {os.path.expandvars(text)}")


def _explain_error(error: flags.Error) -> str:
    """The library's message in our words."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        match = closest(name, _OWN_FLAGS)
        field = None if match else likely_field(name)
        hint = f"; did you mean --{match or f'config.{field}'}?" if match or field else ""
        return f"unknown option --{name}{hint}"
    text = re.sub(r"ERROR:: Unable to open flagfile: (\[Errno \d+\] )?", "--flagfile: ", str(error))
    return text.removeprefix("flag ").replace(": must be", " must be")


def _workdir(mode: str) -> Path | None:
    """Returns the folder of the run; fails where one is needed and missing."""
    text = flags.FLAGS.workdir
    if text:
        _check_path("--workdir", text)
        return Path(os.path.expanduser(text))
    if text is not None or mode != "compare":
        what = "is missing" if text is None else "is empty"
        _fail(f"--workdir {what}: give the folder of the run, as in {_EXAMPLE} (see --help)")
    return None


def _parse(argv: list[str]) -> list[str]:
    """Parses options first, then settings: which they are depends on the workdir and the mode."""
    argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:])]
    if not argv[1:]:
        _fail(f"nothing to do: try {_EXAMPLE} (see --help)")
    options, given, fields, typed = _split(argv)
    rest = flags.FLAGS(options)
    if len(rest) > 1:
        hint = f"; did you mean --mode={rest[1]}?" if rest[1] in MODES else ""
        _fail(f"unexpected argument {rest[1]!r}{hint} (see --help)")
    workdir = _workdir(flags.FLAGS.mode)
    for name in _FOLDERS:
        if typed.get(name):
            _check_path(f"--config.{name}", typed[name])
    config, notes = settings.resolve(given, workdir, flags.FLAGS.mode, typed)
    if "augment.extra" in typed:  # the parser of tuples takes numbers alone
        config.augment.extra = tuple(names(typed["augment.extra"]))
        fields = [field for field in fields if not field.startswith("--config.augment.extra=")]
    config_flags.DEFINE_config_dataclass("config", config, sys_argv=[argv[0], *fields])
    flags.FLAGS([argv[0], *fields])
    validate(flags.FLAGS.config, typed)
    return [argv[0], *notes]


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses, and turns every mistake on the command line into one line and status 2.

    Returns:
        The name of the program, then lines to log about where the settings come from.
    """
    _answer_questions(argv)
    try:
        return _parse(argv)
    except flags.Error as error:
        _fail(f"{_explain_error(error)} (see --help)")
    except UnicodeDecodeError:
        _fail("--flagfile is no text file: give one with an option in each line")
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or '--config'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("histo_jax: interrupted while the config file was read", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _prepare(config: Config, workdir: Path) -> None:
    from histo_jax.data.records import prepare

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

    print(table(compare(config, workdir if flags.FLAGS.workdir else None)))


def _explain(config: Config, workdir: Path) -> None:
    from histo_jax.report import explain

    explain(config, workdir)


def _audit(config: Config, workdir: Path) -> None:
    from histo_jax.auditing import audit
    from histo_jax.data.leakage import has_leak, table

    report = audit(config, workdir)
    print(table(report))
    if has_leak(report):
        sys.exit(_LEAK_FOUND)


def _run(config: Config, workdir: Path) -> None:
    from histo_jax import command, fitting
    from histo_jax.evaluation import evaluate_in
    from histo_jax.prediction import NoTestPatchesError, predict_in
    from histo_jax.report.reporting import report_in

    if command.open_workdir(config, workdir).is_finished(config, "run"):
        print(f"{workdir} is already complete; for another run choose another --workdir")
        return
    with command.start(config, workdir, "run", lambda _: fitting.check(config)) as run:
        fitting.fit_in(run, config, followed_by=("evaluate", "predict", "report"))
        evaluate_in(run, config)
        try:
            predict_in(run, config)
        except NoTestPatchesError as error:
            print(f"no submission.csv: {error}")
        report_in(run, config)
        # What only evaluation and prediction depend on may be other than `fit` has saved.
        run.save_config(config)


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


def main(parsed: list[str]) -> None:
    """Runs the chosen verb; expected failures become one line and status 2.

    Args:
        parsed: what `_parse_flags` returns.
    """
    # Orbax, Grain and TFDS log through absl, with tracebacks for what they raise anyway.
    absl_logging.set_verbosity(absl_logging.FATAL)
    sys.unraisablehook = _quiet_threads
    config, workdir = flags.FLAGS.config, Path(flags.FLAGS.workdir or ".")
    try:
        workdir = files.expand(workdir, "--workdir")
        validate(config)
        environment.load("histo_jax.distributed.runtime")
        if flags.FLAGS.multihost:
            from histo_jax.distributed import consensus, processes

            flag = flags.FLAGS
            processes.initialize(
                flag.multihost, flag.coordinator, flag.process_count, flag.process_index
            )
            # JAX aborts where another process is lost; stacks of all threads would hide its words.
            faulthandler.disable()
            consensus.check_options(config, flag.mode)
        for note in parsed[1:]:
            log.info("%s", note)
        with environment.defaults(), signals.watch(ctrl_c=True):
            _check_typed_data(config, workdir)
            _VERBS[flags.FLAGS.mode](config, workdir)
    except signals.Preempted as error:
        print(f"histo_jax: {error}", file=sys.stderr)
        raise
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        # A full disk or a folder without permission; a bug has another type.
        _fail(files.describe(error, (workdir, Path(os.path.expanduser(config.data.tfds_dir)))))
    except Exception as error:
        if "can't start new thread" in str(error):
            _fail(f"{error}: raise the limit (ulimit -u, or the container's) and start again")
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(
                "the memory of a device is full: lower config.fit.batch_size or "
                "config.predict.batch_size, or set --config.data.placement=host "
                f"({' '.join(str(error).split())[:200]})"
            )
        if not flags.FLAGS.multihost:
            raise
        from histo_jax.distributed import processes

        if not processes.is_process_loss(error):
            raise
        print(
            "histo_jax: another process of the run has ended, see what it says; start all of them "
            f"again, they go on from the newest save ({' '.join(str(error).split())[:200]})",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        # At once: whatever waits for the lost process would wait for ever.
        os._exit(signals.EXIT_STATUS)


def _check_typed_data(config: Config, workdir: Path) -> None:
    """Refuses raw data that this command line names and that the run was not trained on.

    Where only `config.json` names it, modes that read go on without.
    """
    if flags.FLAGS.mode in settings.READING_MODES and "config.data.raw_dir" in flags.FLAGS:
        from histo_jax.data.records import prepare

        prepare(config, workdir)


def _run_app() -> None:
    try:
        app.run(main, flags_parser=_parse_flags)
    except ImportError as error:
        if why := startup.explain(error):
            _fail(why)
        raise


if __name__ == "__main__":
    streams.make_robust()
    environment.reset_warnings()
    try:
        _define_flags()
    except flags.Error as error:  # a --flagfile that cannot be read
        _fail(str(error))
    try:
        _run_app()
    except SystemExit as ending:
        lost = streams.flush_stdout()
        if lost and not ending.code:
            print(f"histo_jax: stdout was lost: {lost.strerror}", file=sys.stderr, flush=True)
            os._exit(_EXPECTED_FAILURE)
        # What had to be closed is closed. Threads that still read or compile would meet an
        # interpreter that is being taken down, and turn the status into a segmentation fault.
        if isinstance(ending.code, int) and ending.code:
            sys.stderr.flush()
            os._exit(ending.code)
        raise
