"""Where a command's settings come from: a config file, a recipe, or the run's own `config.json`."""

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

from histo_jax import recipes
from histo_jax.config import Config, check_types, flat, set_field
from histo_jax.errors import UserError, closest, one_line
from histo_jax.run import workdir as workdirs

# Modes that use a trained run and change nothing of it.
READING_MODES = ("evaluate", "predict", "report", "audit", "explain")
# What these modes take from the config file also where the run has settings of its own...
_OF_THE_COMMAND = ("evaluate.", "predict.", "explain.")
# ... and what only if the file sets it: saying nothing of a folder does not mean the default one.
_IF_SET = (*workdirs.WHERE, "predict.checkpoints")
CONFIG_FILE_MODULE = "histo_jax_config_file"

_code: dict[str, str] = {}


def config_file_code() -> dict[str, str]:
    """Returns the SHA-256 of the code in this process's config file, by the file's name.

    Code is what stands outside `get_config` and defines or changes something, such as a network's
    class; a file without any is not listed.
    """
    return dict(_code)


def resolve(
    given: str | None, workdir: Path | None, mode: str, typed: Collection[str]
) -> tuple[Config, list[str]]:
    """Returns a command's settings, before those on its command line, and what to log of them.

    Args:
        given: value of `--config`, see `load`; None takes the settings of the run in `workdir`.
        workdir: folder of the run, if one is named.
        mode: of the command.
        typed: dotted names of the fields that the command line sets itself.

    Raises:
        UserError: there are no settings, or they cannot be used.
        OSError: a file cannot be read.
    """
    if workdir:
        workdirs.check_path(workdir)
    own = workdir and workdir / "config.json"
    if own is None or not own.exists():
        if given is not None:
            return load(given), []
        if mode == "compare":
            return Config(), []
        raise UserError(
            f"--config is missing, and --workdir={workdir} is not the folder of a run (it has no "
            "config.json): give --config=FILE, or another --workdir"
        )
    if given is None:
        code = [name for name in workdirs.read_source(own.parent) if name.endswith(".py")]
        notes = [f"{workdir} was trained with code in {name}; --config brings it" for name in code]
        return workdirs.read_settings(own), notes if mode in READING_MODES else []
    if mode not in READING_MODES:
        return load(given), []
    file = load(given)  # first: it may register what the run's settings name
    return _merge(workdirs.read_settings(own), file, given, own, typed)


def _merge(
    own: Config, file: Config, given: str, path: Path, typed: Collection[str]
) -> tuple[Config, list[str]]:
    """The run's settings, with the file's about where things lie and what is to be done."""
    values, wanted, defaults = flat(own), flat(file), flat(Config())
    differing = []
    for name, value in wanted.items():
        if name in _IF_SET:
            set_field(own, name, values[name] if value == defaults[name] else value)
        elif name.startswith(_OF_THE_COMMAND):
            set_field(own, name, value)
        elif name not in typed and not _is_same(name, value, values[name]):
            differing.append(name)
    if "data.source" in differing:
        raise UserError(
            f"--config={given} is about other data than the run: data.source is "
            f"{wanted['data.source']!r} and {values['data.source']!r} in {path}; choose another "
            "--workdir, or leave --config out"
        )
    if not differing:
        return own, []
    fields = ", ".join(differing)
    return own, [f"settings are those of {path}; {given} differs from them in {fields}"]


def _is_same(name: str, one: Any, other: Any) -> bool:
    if name == "data.slide_map" and one and other:
        one, other = os.path.abspath(one), os.path.abspath(other)
    if name == "model.kwargs":  # the run's are from JSON, which knows no tuples
        one, other = (json.loads(json.dumps(value)) for value in (one, other))
    return bool(one == other)


def load(given: str) -> Config:
    """Returns the settings that `--config` names; a config file is executed once.

    Args:
        given: path of a Python file with `get_config()`, `FILE:ARGUMENT` for
            `get_config(ARGUMENT)`, the name of a recipe, or path of a run's `config.json`.

    Raises:
        UserError: there is no such file, or it cannot be used; names it, and the line.
        OSError: it cannot be read.
    """
    path, arguments = _find(given)
    if path.suffix == ".json":
        return workdirs.read_settings(path)
    config = _execute(path, arguments)
    if not isinstance(config, Config):
        raise UserError(
            f"{path}: get_config() must return histo_jax.Config, not {type(config).__name__}"
        )
    try:
        check_types(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def _find(given: str) -> tuple[Path, list[str]]:
    colons = [place for place, letter in enumerate(given) if letter == ":"]
    # A file that exists is one, whatever its name; the longest comes first.
    parts = [(given, []), *((given[:i], [given[i + 1 :]]) for i in reversed(colons))]
    for name, arguments in parts:
        path = Path(os.path.expanduser(name))
        if name and path.exists() and not path.is_dir():
            return path, arguments
    for name, arguments in parts:
        recipe = recipes.path(name) if name else None
        if recipe:
            return recipe, arguments
    folder = Path(os.path.expanduser(given))
    if given and (folder / "config.json").is_file():
        raise UserError(
            f"--config={given} is a run's folder: give --config={folder / 'config.json'}, or "
            f"leave --config out and set --workdir={given}"
        )
    what = " is a folder, not a file" if given and folder.is_dir() else ": no such file or recipe"
    raise UserError(f"--config={given}{what}; {_similar_file(folder)}")


def _similar_file(path: Path) -> str:
    """What to try instead of a config file that is not there."""
    unquoted = os.path.expandvars(str(path).strip("'\""))
    if unquoted != str(path) and Path(unquoted).is_file():
        return f"did you mean {unquoted}?"
    folder = path if path.is_dir() else path.parent
    choices = {name: name for name in recipes.names()}
    if folder.is_dir():
        choices |= {file.name: str(file) for file in folder.glob("*.py") if file.is_file()}
    match = closest(path.name, choices)
    return f"did you mean {choices[match]}?" if match else "try --config=configs/quickstart.py"


def _execute(path: Path, arguments: list[str]) -> Any:
    """Returns what the config file's `get_config` returns."""
    # Read here, and only once: it may be a pipe. Importing would use a cached compilation, which
    # misses a change of the same size within one second.
    try:
        source = importlib.util.decode_source(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError):
        raise UserError(f"{path} is no text in UTF-8: save it as such") from None
    module = types.ModuleType(CONFIG_FILE_MODULE)
    module.__file__ = str(path.absolute())
    sys.modules[CONFIG_FILE_MODULE] = module
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
        get_config = vars(module).get("get_config")
        if not callable(get_config):
            what = "is missing" if get_config is None else "is no function"
            raise UserError(f"{path}: get_config() {what}; define it to return histo_jax.Config")
        _check_arguments(path, get_config, arguments)
        config = get_config(*arguments)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(_broken(path, error)) from None
    _note_code(path, source)
    return config


def _check_arguments(path: Path, get_config: Any, arguments: list[str]) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise UserError(
                f"{path}: get_config() takes no argument: leave out :{arguments[0]}"
            ) from None
        raise UserError(
            f"{path}: get_config() needs an argument: give --config={path}:ARGUMENT"
        ) from None


def _broken(path: Path, error: BaseException) -> str:
    """What a config file has raised, and where in it."""
    lines: list[int | None] = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    said = f": {one_line(error)}" if str(error) else ""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, said = [error.lineno], f": {error.msg}"
    at = f", line {lines[-1]}" if lines and lines[-1] else ""
    is_relative = isinstance(error, FileNotFoundError) and not os.path.isabs(error.filename or "/")
    where = f", looked for from {Path.cwd()}" if is_relative else ""
    return f"{path}{at}: the config file is broken: {type(error).__name__}{said}{where}"


def _note_code(path: Path, source: str) -> None:
    """Keeps the hash of the file's code, see `config_file_code`."""
    statements = [
        node
        for node in ast.parse(source).body
        if not _is_docstring(node) and not _is_settings(node)
    ]
    _code.clear()
    if all(_only_names(node) for node in statements):
        return
    segments = [ast.get_source_segment(source, node) or "" for node in statements]
    _code[path.name] = hashlib.sha256("\n".join(segments).encode()).hexdigest()


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_settings(node: ast.stmt) -> bool:
    """Whether a statement is `get_config` and defines nothing inside."""
    if not isinstance(node, ast.FunctionDef) or node.name != "get_config":
        return False
    inner = (part for part in ast.walk(node) if part is not node)
    return not any(isinstance(p, ast.FunctionDef | ast.ClassDef | ast.Lambda) for p in inner)


def _only_names(node: ast.stmt) -> bool:
    """Whether a statement gives names to values and changes nothing elsewhere."""
    if isinstance(node, ast.Assign):
        is_code = any(isinstance(part, ast.Call | ast.Lambda) for part in ast.walk(node.value))
        return not is_code and all(isinstance(target, ast.Name) for target in node.targets)
    return isinstance(node, ast.Import | ast.ImportFrom)
