"""The command line: `python -m histo_jax.serve --workdir=RUN`.

The console script `histo_jax-serve` is the same.
"""

import argparse
import faulthandler
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from histo_jax import environment, malloc, startup, streams
from histo_jax.config_values import folders
from histo_jax.errors import ConfigError, UserError
from histo_jax.run import files
from histo_jax.serve import access

log = logging.getLogger("histo_jax")

_EXPECTED_FAILURE = 2
_ON_CPU, _ON_ACCELERATOR = 16, 256

_DESCRIPTION = """\
Serves a web page and a JSON interface for trained networks. Research use only: not a medical
device."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line; prints the answer and exits where it asks for help.

    Args:
        argv: the arguments, without the program.

    Raises:
        ConfigError: an argument is wrong.
    """
    parser = _Parser(
        prog="python -m histo_jax.serve", description=_DESCRIPTION, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--workdir",
        metavar="DIR",
        required=True,
        help="folder of a run or of an export; several, separated by commas, are an ensemble",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only)",
    )
    add("--port", type=int, default=8000, help="0 = any that is free (default: %(default)s)")
    add(
        "--token-file",
        metavar="FILE",
        help="a file with a token, which clients then need; required where other machines can "
        "reach the server",
    )
    add(
        "--allow-hosts",
        metavar="NAMES",
        default="",
        help="more names by which clients reach this machine, separated by commas",
    )
    add("--slides", metavar="DIR", help="folder of slides that clients may choose")
    add("--batch-size", type=int, metavar="N",
        help=f"patches in a batch (default: {_ON_CPU} on CPU, {_ON_ACCELERATOR} on accelerators)"
        )  # fmt: skip
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    options.folders = [files.expand(name, "--workdir") for name in folders(options.workdir)]
    if not options.folders:
        raise ConfigError("--workdir is empty: give the folder of a run or of an export")
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port={options.port} must be a number from 0 to 65535")
    if options.batch_size is not None and not 1 <= options.batch_size <= 4096:
        raise ConfigError(f"--batch-size={options.batch_size} must be a number from 1 to 4096")
    for name in ("slides", "token_file"):
        if getattr(options, name) == "":
            raise ConfigError(f"--{name.replace('_', '-')} is empty: name it, or leave it out")
    options.host = access.without_brackets(options.host)
    others = [name.strip() for name in options.allow_hosts.split(",") if name.strip()]
    options.hosts = access.allowed_hosts(options.host, others)
    if options.token_file is None:
        options.token = None
        if not access.is_loopback(options.host):
            raise ConfigError(
                f"--host={options.host} lets other machines use the server: give --token-file, "
                f"a file made by {access.HOW}"
            )
    else:
        options.token = access.read_token(files.expand(options.token_file, "--token-file"))


def cli() -> None:
    """Runs the command line of this process, and exits."""
    streams.make_robust()
    streams.log_to_stderr()
    environment.reset_warnings()
    faulthandler.enable()
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        status = _report(str(error))
    except ImportError as error:
        reason = startup.explain(error)
        if not reason:
            raise
        status = _report(reason)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries would meet an interpreter that shuts down.
    os._exit(status)


def _report(message: str) -> int:
    print(f"histo_jax: {' '.join(message.split())}", file=sys.stderr)
    return _EXPECTED_FAILURE


def main(argv: Sequence[str]) -> int:
    """Serves until a signal; returns the exit status.

    Args:
        argv: the arguments, without the program.

    Raises:
        UserError: an argument or the folder of a run is wrong, or a library is missing.
    """
    options = parse(argv)
    from histo_jax.serve import libraries

    libraries.check()
    malloc.use_one_arena()  # before JAX's threads get arenas, which keep freed memory
    environment.load("histo_jax.distributed.runtime")
    with environment.defaults():
        return _serve(options)


def _serve(options: argparse.Namespace) -> int:
    from histo_jax.serve import application, server
    from histo_jax.serve.limits import Limits

    listener = server.bind(options.host, options.port)
    limits = Limits()
    service = _load(options, limits)

    def on_ready() -> None:
        if service.failure:
            running.should_exit = True
        else:
            malloc.return_freed()  # of loading and compiling
            log.info("ready; Ctrl-C ends the server")
            print(server.url(listener), flush=True)

    app = application.create(service, options.hosts, options.token, on_ready)
    running = server.Server(app, limits.receive_seconds)
    status = running.serve_until_signal(listener)
    if service.failure:
        raise service.failure
    return status


def _load(options: argparse.Namespace, limits: Any) -> Any:
    """Returns the service of the networks."""
    import jax

    from histo_jax.predictor import load
    from histo_jax.serve import model_info
    from histo_jax.serve.service import Service
    from histo_jax.serve.slide_folder import SlideFolder

    slides = SlideFolder(options.slides)
    paths: list[Path] = options.folders
    default = _ON_CPU if jax.default_backend() == "cpu" else _ON_ACCELERATOR
    predictor = load(*paths, batch_size=options.batch_size or default)
    return Service(predictor, model_info.describe(predictor, paths), slides, limits)
