"""Config files: Python files with `get_config()`, found by path or by a recipe's name."""

import ast
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from histo_jax import recipes
from histo_jax.config import Config, ConfigFile
from histo_jax.config_checks import check_types
from histo_jax.errors import ConfigError, UserError, closest, one_line

MODULE = "histo_jax_config_file"  # a config file becomes a module of this name and a hash


def execute(path: Path, argument: str | None = None) -> Config:
    """Executes a config file and returns what its `get_config` returns.

    Args:
        path: of the file.
        argument: passed to `get_config`; None passes none.

    Raises:
        ConfigError: the file cannot be used; names it, and the line.
        OSError: it cannot be read.
    """
    config, source = _execute(path, [] if argument is None else [argument])
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path}: get_config() must return histo_jax.Config, not {type(config).__name__}"
        )
    try:
        check_types(config)
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from None
    recipe = path.stem if recipes.path(path.stem) == path else None
    config.config_file = ConfigFile(str(path.absolute()), recipe, argument, _hash_code(source))
    return config


def find(given: str) -> tuple[Path, str | None]:
    """Returns the file that `--config` names, and the argument of its `get_config`.

    Args:
        given: path of a file, `FILE:ARGUMENT`, or the name of a recipe.

    Raises:
        ConfigError: there is no such file.
    """
    colons = [index for index, letter in enumerate(given) if letter == ":"]
    # An existing file wins, whatever its name; the longest name comes first.
    parts: list[tuple[str, str | None]] = [(given, None)]
    parts += [(given[:index], given[index + 1 :]) for index in reversed(colons)]
    for name, argument in parts:
        path = Path(os.path.expanduser(name))
        if name and path.exists() and not path.is_dir():
            return path, argument
    for name, argument in parts:
        recipe = recipes.path(name) if name else None
        if recipe:
            return recipe, argument
    folder = Path(os.path.expanduser(given))
    if given and (folder / "config.json").is_file():
        raise ConfigError(
            f"--config={given} is a run's folder: give --config={folder / 'config.json'}, or "
            f"leave --config out and set --workdir={given}"
        )
    what = " is a folder, not a file" if given and folder.is_dir() else ": no such file or recipe"
    raise ConfigError(f"--config={given}{what}; {_similar_file(folder)}")


def _similar_file(path: Path) -> str:
    """Returns what to try instead of a config file that does not exist."""
    unquoted = os.path.expandvars(str(path).strip("'\""))
    if unquoted != str(path) and Path(unquoted).is_file():
        return f"did you mean {unquoted}?"
    folder = path if path.is_dir() else path.parent
    choices = {name: name for name in recipes.names()}
    if folder.is_dir():
        choices |= {file.name: str(file) for file in folder.glob("*.py") if file.is_file()}
    match = closest(path.name, choices)
    return f"did you mean {choices[match]}?" if match else "try --config=configs/quickstart.py"


def module_name(path: Path) -> str:
    """Returns the name of the module that a config file becomes; `inspect` finds code by it."""
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
    return f"{MODULE}_{digest[:12]}"


def _execute(path: Path, arguments: list[str]) -> tuple[Any, str]:
    """Returns what the file's `get_config` returns, and the file's source."""
    # Read once: it may be a pipe. An import would use cached bytecode, which misses a change of
    # the same size within one second.
    try:
        source = importlib.util.decode_source(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    module = types.ModuleType(module_name(path))
    module.__file__ = str(path.absolute())
    sys.modules[module.__name__] = module
    # Files beside it can be imported from any current folder; installed packages come first.
    if str(path.absolute().parent) not in sys.path:
        sys.path.append(str(path.absolute().parent))
    try:
        exec(compile(source, str(path.absolute()), "exec", dont_inherit=True), vars(module))
        get_config = vars(module).get("get_config")
        if not callable(get_config):
            what = "is missing" if get_config is None else "is not a function"
            raise ConfigError(f"{path}: get_config() {what}; define it to return histo_jax.Config")
        _check_arguments(path, get_config, arguments)
        config = get_config(*arguments)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ConfigError(_describe_failure(path, error)) from None
    return config, source


def _check_arguments(path: Path, get_config: Any, arguments: list[str]) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise ConfigError(
                f"{path}: get_config() takes no argument: leave out :{arguments[0]}"
            ) from None
        raise ConfigError(
            f"{path}: get_config() needs an argument: give --config={path}:ARGUMENT"
        ) from None


def _describe_failure(path: Path, error: BaseException) -> str:
    """Returns what a config file has raised, and in which line."""
    lines: list[int | None] = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path.absolute())
    ]
    message = f": {one_line(error)}" if str(error) else ""
    if isinstance(error, SyntaxError) and error.filename == str(path.absolute()):
        lines, message = [error.lineno], f": {error.msg}"
    at = f", line {lines[-1]}" if lines and lines[-1] else ""
    is_relative = isinstance(error, FileNotFoundError) and not os.path.isabs(error.filename or "/")
    where = f", relative to {Path.cwd()}" if is_relative else ""
    return f"{path}{at}: the config file failed: {type(error).__name__}{message}{where}"


def _hash_code(source: str) -> str:
    """Returns the SHA-256 of a config file's code, '' without any.

    Code is what is outside `get_config` and defines or changes something, such as a network's
    class.
    """
    statements = [
        node
        for node in ast.parse(source).body
        if not _is_docstring(node) and not _is_settings(node)
    ]
    if all(_is_name(node) for node in statements):
        return ""
    segments = [ast.get_source_segment(source, node) or "" for node in statements]
    return hashlib.sha256("\n".join(segments).encode()).hexdigest()


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_settings(node: ast.stmt) -> bool:
    """Returns whether a statement is `get_config` and defines nothing inside."""
    if not isinstance(node, ast.FunctionDef) or node.name != "get_config":
        return False
    inner = (part for part in ast.walk(node) if part is not node)
    return not any(isinstance(p, ast.FunctionDef | ast.ClassDef | ast.Lambda) for p in inner)


def _is_name(node: ast.stmt) -> bool:
    """Returns whether a statement gives names to values and changes nothing elsewhere."""
    if isinstance(node, ast.Assign):
        is_code = any(isinstance(part, ast.Call | ast.Lambda) for part in ast.walk(node.value))
        return not is_code and all(isinstance(target, ast.Name) for target in node.targets)
    return isinstance(node, ast.Import | ast.ImportFrom)
