"""Parses the command line: options first, then settings, whose source depends on both."""

import collections
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from histo_jax import settings
from histo_jax.config import Config, describe
from histo_jax.config_checks import likely_field, unknown_field, validate
from histo_jax.config_values import names
from histo_jax.errors import ConfigError, closest, did_you_mean
from histo_jax.version import VERSION

_USAGE = """\
usage: python -m histo_jax.main --config=FILE --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...]
       python -m histo_jax.main --workdir=DIR --mode=MODE [--config.FIELD=VALUE ...]
       (histo_jax is a short name for python -m histo_jax.main)

  --config=FILE    a Python file with get_config(), such as configs/kaggle.py; FILE:TEXT for
                   get_config(TEXT); the name of a recipe, such as kaggle; or a run's config.json.
                   Optional where DIR has a config.json, which then gives all settings.
                   evaluate, predict, report, audit, explain, export and heatmap take all other
                   settings from the run, and from FILE only folders and evaluate., predict.,
                   explain., export. and heatmap. fields
  --workdir=DIR    folder of the run: checkpoints, history, scores, submission; optional for compare
  --mode=MODE      run (default): prepare, fit, evaluate, predict and report, in this order
                   prepare: write the records
                   fit:     train, or resume training
                   evaluate: score the best checkpoint, or its maps of the annotated slides of
                            config.evaluate.slides
                   predict: write submission.csv with the best checkpoint, or predictions.csv for
                            the images of config.predict.images
                   report:  write report.html from the results of evaluate
                   audit:   check whether splits share patches or slides (status 1: they do)
                   compare: test whether the two runs of config.compare.runs differ
                   explain: write attribution maps of the patches of config.explain.ids
                   export:  write the trained network for other programs, into DIR/export
                   heatmap: write maps of the slides of config.heatmap.slides
  --multihost=HOW  train with several processes: auto, slurm or tpu detect the cluster; manual
                   needs --coordinator=HOST:PORT (the same for all), --process_count=N and
                   --process_index=I, from 0
  --flagfile=FILE  a file with more of these options, one per line
  --version        print the version

Fields and their defaults (a config file may set others):
"""
EXAMPLE = "--config=configs/quickstart.py --workdir=runs/quickstart"
_HOSTS = ("auto", "slurm", "tpu", "manual")
_PATH_FIELDS = (
    "data.raw_dir", "data.tfds_dir", "data.slide_map", "evaluate.slides", "predict.images",
    "heatmap.tissue",
)  # fmt: skip
_OPTIONS = (
    "config", "workdir", "mode", "multihost", "coordinator", "process_count", "process_index",
    "flagfile", "help", "version",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """A parsed command line.

    Attributes:
        config: all settings of the command.
        workdir: folder of the run; None where `compare` has none.
        mode: the command.
        typed: dotted names of the fields that the command line sets itself.
        notes: lines to log about where the settings come from.
        multihost: how the processes find each other; None with one process.
        coordinator: 'host:port' of the first process, for multihost 'manual'.
        process_count: likewise.
        process_index: likewise.
    """

    config: Config
    workdir: Path | None
    mode: str
    typed: Collection[str] = ()
    notes: Sequence[str] = ()
    multihost: str | None = None
    coordinator: str | None = None
    process_count: int | None = None
    process_index: int | None = None


def parse(argv: list[str], modes: Collection[str]) -> Options:
    """Parses a command line; prints the answer and exits where it asks for help or the version.

    Args:
        argv: the program, then its arguments.
        modes: what `--mode` may be; the first is the default.

    Raises:
        UserError: an argument is wrong; the message names it and the fix.
        OSError: a config file cannot be read.
    """
    _answer_questions(argv)
    try:
        return _parse(argv, modes)
    except flags.Error as error:
        raise ConfigError(f"{_explain(error)} (see --help)") from None
    except UnicodeDecodeError:
        raise ConfigError("--flagfile is not a text file: give one option per line") from None


def _parse(argv: list[str], modes: Collection[str]) -> Options:
    values = _define_flags(modes)
    argv = [argv[0], *values.read_flags_from_files(argv[1:])]
    if not argv[1:]:
        raise ConfigError(f"nothing to do: try {EXAMPLE} (see --help)")
    options, given, fields, typed = _split(argv)
    rest = values(options)
    if len(rest) > 1:
        hint = f"; did you mean --mode={rest[1]}?" if rest[1] in modes else ""
        raise ConfigError(f"unexpected argument {rest[1]!r}{hint} (see --help)")
    workdir = _workdir(values.workdir, values.mode)
    for name in _PATH_FIELDS:
        if typed.get(name):
            _check_path(f"--config.{name}", typed[name])
    config, notes = settings.resolve(given, workdir, values.mode, typed)
    if "augment.extra" in typed:  # the parser of tuples takes only numbers
        config.augment.extra = tuple(names(typed["augment.extra"]))
        fields = [field for field in fields if not field.startswith("--config.augment.extra=")]
    overridden = _override(config, [argv[0], *fields])
    validate(overridden, typed)
    return Options(
        overridden, workdir, values.mode, frozenset(typed), notes, values.multihost,
        values.coordinator, values.process_count, values.process_index,
    )  # fmt: skip


def _answer_questions(argv: list[str]) -> None:
    """Exits with status 0 where the command line asks for help or for the version."""
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv[1:]):
        fields = (
            f"  --config.{name}={default}\n      {text}\n" for name, default, text in describe()
        )
        sys.stdout.write(_USAGE + "".join(fields))
        sys.exit(0)
    if {"--version", "-version"} & set(argv[1:]):
        print(f"histo_jax {VERSION}")
        sys.exit(0)


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
    """Parses a field's value, or `None`, which optional fields take.

    Args:
        convert: text to value; raises ValueError.
        expected: what the value must be, for the message.
    """

    def __init__(self, convert: Callable[[str], Any], expected: str) -> None:
        self._convert, self._expected = convert, expected

    def parse(self, argument: Any) -> Any:
        if argument in ("None", "none"):
            return None
        if not isinstance(argument, str):  # a default
            return argument
        try:
            return self._convert(argument)
        except (ValueError, OverflowError):
            raise ValueError(f"must be {self._expected}") from None


class _ChoiceParser(flags.ArgumentParser):
    """Parses one of a few words."""

    def __init__(self, choices: Collection[str]) -> None:
        self._choices = choices

    def parse(self, argument: Any) -> Any:
        if argument in self._choices:
            return argument
        hint = did_you_mean(argument, self._choices)
        raise ValueError(f"must be one of {', '.join(self._choices)}{hint}")


_INTEGER = _Parser(_whole_number, "a whole number")
for _kind, _parser in (
    (bool, _Parser(_true_or_false, "true or false")),
    (int, _INTEGER),
    (float, _Parser(float, "a number")),
    (str, _Parser(str, "text")),
    (dict, _Parser(_json_object, 'a JSON object such as {"width": 32}')),
    (tuple, _Parser(_whole_numbers, "five whole numbers such as 32,64,128,256,512")),
):
    config_flags.register_flag_parser_for_type(_kind, _parser)


def _define_flags(modes: Collection[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    first = next(iter(modes))
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE(_ChoiceParser(modes), "mode", first, "the command", flag_values=values)
    flags.DEFINE(_ChoiceParser(_HOSTS), "multihost", None, "how processes meet", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=values)
    flags.DEFINE(_INTEGER, "process_count", None, "number of processes", flag_values=values)
    flags.DEFINE(_INTEGER, "process_index", None, "index of this one", flag_values=values)
    return values


def _override(config: Config, argv: list[str]) -> Config:
    """Returns the config with the fields that a command line sets."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    overridden: Config = values.config
    return overridden


def _split(argv: list[str]) -> tuple[list[str], str | None, list[str], dict[str, str]]:
    """Takes the settings out of a command line.

    Returns:
        The rest; the last value of `--config`; each `--config.FIELD`, as one argument; the values
        of these as typed, by dotted name.

    Raises:
        ConfigError: a field does not exist, or a value is missing.
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
            raise ConfigError(unknown_field(field))
        takes_value = not isinstance(defaults.get(field or ""), bool)
        if takes_value and name.startswith("no"):
            raise ConfigError(
                f"--{name}: only a field of true or false has such an option (see --help)"
            )
        if not equals and takes_value and following and not following[0].startswith("--"):
            equals, value = "=", following.popleft()
        if field is not None:
            fields.append(f"--{name}{equals}{value}")
            typed[field] = value
        elif equals:
            given = value
        else:
            raise ConfigError("--config has no value: write --config=FILE (see --help)")
    return [*rest, *following], given, fields, typed


def _workdir(text: str | None, mode: str) -> Path | None:
    """Returns the folder of the run; None where `compare` is given none."""
    if text:
        _check_path("--workdir", text)
        return Path(os.path.expanduser(text))
    if text is None and mode == "compare":
        return None
    what = "is missing" if text is None else "is empty"
    raise ConfigError(f"--workdir {what}: give the folder of the run, as in {EXAMPLE} (see --help)")


def _check_path(option: str, text: str) -> None:
    """Refuses a path that contains what the shell usually replaces or removes."""
    path = os.path.expanduser(text)
    if os.path.lexists(path):
        return
    if text.startswith("--"):
        raise ConfigError(f"{option} has no value before {text}: write {option}=DIR")
    if path.startswith("~"):
        raise ConfigError(f"{option}={text}: there is no such home folder; write the whole path")
    if text[0] == text[-1] and text[0] in "'\"":
        raise ConfigError(f"{option}={text} is in quotes: remove them")
    if os.path.expandvars(text) != text:
        raise ConfigError(
            f"{option}={text} was not expanded by the shell: write {os.path.expandvars(text)}"
        )


def _explain(error: flags.Error) -> str:
    """Returns the library's message in the words of this package."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        match = closest(name, _OPTIONS)
        field = None if match else likely_field(name)
        hint = f"; did you mean --{match or f'config.{field}'}?" if match or field else ""
        return f"unknown option --{name}{hint}"
    text = re.sub(r"ERROR:: Unable to open flagfile: (\[Errno \d+\] )?", "--flagfile: ", str(error))
    return text.removeprefix("flag ").replace(": must be", " must be")
