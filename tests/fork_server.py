"""Runs Python commands in forks of one process that has imported histo_jax.

Each saves the seconds of the import, for tests in which the start of Python is not what is tested.
A fork has its own environment variables, JAX devices and exit. Tests get it by `fork_server` of
`conftest.py`; as a script this file is the server.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Forked:
    """A started command, with the methods of `subprocess.Popen` that the tests need."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.returncode, self._folder = pid, None, folder

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(FileNotFoundError):
                self.returncode = int((self._folder / "status").read_text())
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Waits for the end; returns stdout and stderr."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self.output())
            time.sleep(0.01)
        return self.output(), self.output("stderr")

    def output(self, name: str = "stdout") -> str:
        """Returns what it has written until now."""
        return (self._folder / name).read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that imports; it starts with the first command."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="histo_jax_forks_"))
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *command, environment=None, cwd=None, merge=False) -> Forked:
        """Starts a command as `python COMMAND...` would: a script, `-m MODULE` or `-c CODE`.

        Args:
            *command: the arguments of Python.
            environment: all environment variables; those of this process if None.
            cwd: working folder; this one if None.
            merge: whether stderr goes to stdout.
        """
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        request = {
            "command": list(map(str, command)),
            "environment": dict(environment or os.environ),
            "cwd": str(cwd or Path.cwd()),
            "folder": str(folder),
            "merge": merge,
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Forked(int(self._server.stdout.readline()), folder)

    def close(self) -> None:
        self._server.communicate(timeout=60)
        for path in sorted(self._folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self._folder.rmdir()


def _reap() -> None:
    """Takes note of the keepers that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(child: int, folder: Path) -> None:
    """Reports the child's number, and its exit status when it ends; this process waits for it."""
    os.write(1, f"{child}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder / "part").write_text(str(status))
    (folder / "part").rename(folder / "status")
    os._exit(0)


def _serve() -> list[str] | None:
    """Returns in each fork, with its command; in the server at the end, with None."""
    for line in sys.stdin:
        _reap()
        request = json.loads(line)
        if os.fork():
            continue
        folder = Path(request["folder"])
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        if child := os.fork():
            _keep(child, folder)
        streams = (os.devnull, folder / "stdout", folder / "stderr")
        for number, stream in enumerate(streams[: 2 if request["merge"] else 3]):
            opened = os.open(stream, os.O_RDWR)
            os.dup2(opened, number)
            os.close(opened)
        if request["merge"]:
            os.dup2(1, 2)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        return request["command"]
    _reap()
    return None


def _run(kind: str, *arguments: str) -> None:
    """Runs a command as Python does; a script is `kind` itself."""
    if kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(kind).parent), [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    import histo_jax

    # Not the modules that take functions of others by name: tests replace those functions.
    for _name in histo_jax.__all__:
        getattr(histo_jax, _name)
    if (_command := _serve()) is not None:
        _run(*_command)
