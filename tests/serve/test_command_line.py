"""`python -m histo_jax.serve`: what it refuses, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from histo_jax.errors import UserError
from histo_jax.serve import command_line

httpx = pytest.importorskip("httpx2", reason="launch/install.sh test installs it")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --workdir"),
        (["--workdir="], "--workdir is empty"),
        (["--workdir=a", "--port=http"], "argument --port: invalid int value: 'http'"),
        (["--workdir=a", "--port=65536"], "--port=65536 must be a number from 0 to 65535"),
        (["--workdir=a", "--batch-size=0"], "--batch-size=0 must be a number from 1 to 4096"),
        (["--workdir=a", "--colour=blue"], "unrecognized arguments: --colour=blue"),
        (["--workdir=a", "--host=0.0.0.0"], "--host=0.0.0.0 lets other machines use the server"),
        (["--workdir=a", "--token-file=none"], "none cannot be read (No such file or directory)"),
        (["--workdir=a", "--token-file=short"], "short must hold one word of at least 16"),
        (["--workdir=a", "--token-file=two"], "two must hold one word of at least 16"),
        (["--workdir=a", "--token-file=binary"], "binary cannot be read (it is not ASCII text)"),
        (["--workdir=a", "--token-file="], "--token-file is empty"),
        (["--workdir=a", "--slides="], "--slides is empty"),
        (["--workdir=a", "--allow-hosts=b,http://b"], "--allow-hosts=http://b must be a name"),
        (["--workdir=a", "--allow-hosts=b:8000"], "--allow-hosts=b:8000 must be a name"),
        (["--workdir=a"], "a is not the folder of a run"),
        (["--workdir=run", "--slides=none"], "none"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line_with_the_fix(words, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("secret")
    (tmp_path / "two").write_text("a long token with spaces")
    (tmp_path / "binary").write_bytes(b"\xff" * 30)
    (tmp_path / "run").symlink_to(run)
    with pytest.raises(UserError) as error:
        command_line.main(["--port=0", *words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_addresses_of_ipv6_may_have_the_brackets_of_urls():
    words = ["--workdir=a", "--host=[::1]", "--allow-hosts=[fd00::1],fd00::2"]
    options = command_line.parse(words)
    assert options.host == "::1"
    assert {"[::1]", "[fd00::1]", "[fd00::2]"} < options.hosts


def test_a_port_that_is_in_use_is_named(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port} is in use: choose another, or 0"):
            command_line.main([f"--workdir={run}", f"--port={port}"])


def test_a_missing_library_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'histo_jax\[serve\]'"):
        command_line.main([f"--workdir={run}", "--port=0"])


def test_the_process_reports_one_line_and_status_2():
    done = subprocess.run(
        [sys.executable, "-m", "histo_jax.serve", "--workdir=a", "--port=-1"],
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "histo_jax: --port=-1 must be a number from 0 to 65535\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_heat_map_under_way(
    number, status, run, encode, tissue_pixels, capsys
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    picture = encode(tissue_pixels(1500, 1500), "PNG")
    lines = []

    def request():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(client)
            with client.stream(
                "POST", "/v1/heatmap", files={"file": ("r.png", picture)},
                data={"tissue": "all"}, headers={"Accept": "application/x-ndjson"},
            ) as streamed:  # fmt: skip
                for line in streamed.iter_lines():
                    if not lines:
                        os.kill(os.getpid(), number)
                    lines.append(json.loads(line))

    thread = threading.Thread(target=request)
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {each: signal.getsignal(each) for each in signals}
    thread.start()
    try:
        assert command_line.main([f"--workdir={run}", f"--port={port}"]) == status
    finally:
        thread.join(60)
        for each, handler in before.items():
            signal.signal(each, handler)
    assert 0 < lines[1]["done"] < lines[1]["cells"]
    assert "map" in lines[-1]
    assert capsys.readouterr().out == f"http://127.0.0.1:{port}/\n"


def wait_until_ready(client):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if client.get("/v2/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError("the server did not become ready")
