"""Standard streams that are closed, full, gone, or lack characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import contextlib, faulthandler, os, sys
from histo_jax import streams
streams.make_robust()
file = open(sys.argv[1], "wb")
print("to stdout \\u00e4 \\udcff")
print("to stderr \\u00e4", file=sys.stderr)
streams.write_stderr(b"by hand\\n")
with contextlib.suppress(OSError):
    os.write(2, b"by a library\\n")
faulthandler.enable()
sys.stdin.read(1)
lost = streams.flush_stdout()
sys.exit(3 if lost else 0)
"""


def shell(line, *arguments, **variables):
    return subprocess.run(
        ["bash", "-c", line, "-", sys.executable, *map(str, arguments)],
        cwd=ROOT, env=os.environ | variables, capture_output=True, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        ("2>&-", 0),
        (">&-", 0),
        ("<&-", 0),
        ("<&- >&- 2>&-", 0),
        (">/dev/full", 3),
        ("2>/dev/full", 0),
        ("| true", 0),
        ("2>&1 | true", 0),
    ],
)
def test_no_stream_ends_the_program_or_writes_into_a_file(redirection, status, tmp_path):
    line = f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = shell(line, "-c", SCRIPT, tmp_path / "file")
    assert done.returncode == status, done.stderr
    assert b"Error" not in done.stderr
    assert b"Exception" not in done.stderr
    assert (tmp_path / "file").read_bytes() == b""


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    done = shell('"$@"', "-c", SCRIPT, tmp_path / "file", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"to stdout \\xe4 \\udcff\n"
    assert done.stderr.startswith(b"to stderr \\xe4\n")


@pytest.mark.parametrize(("target", "status"), [("| true", 0), (">/dev/full", 2), (">&-", 0)])
def test_help_whose_reader_has_gone_ends_quietly_and_a_full_disk_is_named(target, status):
    done = shell(f'"$@" {target}; exit ${{PIPESTATUS[0]}}', "-m", "histo_jax.main", "--help")
    assert done.returncode == status
    expected = b"" if status == 0 else b"histo_jax: stdout was lost: No space left on device\n"
    assert done.stderr == expected
