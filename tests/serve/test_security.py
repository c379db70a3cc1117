"""What the server refuses, and that it lives on."""

import asyncio
import concurrent.futures
import io
import socket
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image

from histo_jax.metrics import Calibration

httpx = pytest.importorskip("httpx2", reason="launch/install.sh test installs it")

TOKEN = "a-token-of-24-characters"
PATHS = ("/", "/static/main.js", "/v1/model", "/v2/health/live", "/metrics", "/nothing")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil", "", "[::2]"])
def test_a_request_for_another_host_is_refused(client, host):
    for path in PATHS:
        assert client.get(path, headers={"Host": host}).status_code == 421
    answer = client.get("/v1/model", headers={"Host": host})
    assert "--allow-hosts" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST:9", "[::1]"])
def test_names_of_this_machine_are_accepted(client, host):
    assert client.get("/v1/model", headers={"Host": host}).status_code == 200


def test_a_form_of_another_web_page_is_refused(client, form):
    for origin in ("https://evil.example", "null", "http://localhost.evil"):
        answer = client.post("/v1/predict", files=form, headers={"Origin": origin})
        assert answer.status_code == 403
    own = str(client.base_url).rstrip("/")
    assert client.post("/v1/predict", files=form, headers={"Origin": own}).status_code == 200


def test_every_answer_has_the_headers_of_security(client):
    for path in PATHS:
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
    page = client.get("/").text
    assert "style=" not in page
    assert "<script>" not in page


@pytest.mark.parametrize(
    "path",
    ["/static/../application.py", "/static/%2e%2e/application.py", "/static/..%2fapplication.py",
     "/static//etc/passwd", "/../../etc/passwd", "/static/", "/v1/slides/..%2f..%2fetc%2fpasswd"],
)  # fmt: skip
def test_no_path_leads_to_a_file(served, path):
    # As it is: clients make a path shorter.
    answer = raw(served, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 ")


def raw(served, request, timeout=20):
    """Sends bytes and returns all that is answered."""
    address = served.url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout) as connection:
        connection.sendall(request if isinstance(request, bytes) else request.encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_a_token_is_needed_where_there_is_one(start, form):
    with start(token=TOKEN) as server, httpx.Client(base_url=server.url) as client:
        for path in ("/", "/static/main.js", "/v2/health/ready", "/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("/v1/model", "/v1/slides", "/metrics", "/v2/models/histo_jax"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for wrong in ("Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"):
            headers = {"Authorization": wrong.encode("latin-1")}
            assert client.post("/v1/predict", files=form, headers=headers).status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert client.post("/v1/predict", files=form, headers=headers).status_code == 200


def test_503_until_the_networks_are_compiled(start, form, monkeypatch):
    from histo_jax.serve.service import Service

    compile_all = Service._compile

    def wait_and_compile(service):
        while not service.may_compile:
            time.sleep(0.01)
        compile_all(service)

    monkeypatch.setattr(Service, "may_compile", False, raising=False)
    monkeypatch.setattr(Service, "_compile", wait_and_compile)
    with start(wait=False) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        while client.get("/v2/health/live").status_code != 200:
            time.sleep(0.01)
        assert client.get("/v2/health/ready").status_code == 503
        answer = client.post("/v1/predict", files=form)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert client.get("/v1/model").json()["is_ready"] is False
        server.service.may_compile = True
        while client.get("/v2/health/ready").status_code != 200:
            time.sleep(0.01)
        assert client.post("/v1/predict", files=form).status_code == 200


def test_limits_of_files_bytes_pixels_and_cells(start, form, encode, patches):
    picture = {"file": ("a.png", encode(np.zeros((200, 300, 3), np.uint8), "PNG"))}
    limits = {"body": 200_000, "tensors": 30_000, "files": 4, "pixels": 50_000, "patches": 3}
    with start(**limits) as server, httpx.Client(base_url=server.url) as client:
        answer = client.post("/v1/predict", files=form[:4])
        assert (answer.status_code, "3 may" in answer.json()["error"]) == (429, True)
        assert int(answer.headers["retry-after"]) > 0
        assert client.post("/v1/predict", files=form[:3]).status_code == 200
        tiny = [("files", (str(n), b"x")) for n in range(5)]
        answer = client.post("/v1/predict", files=tiny)
        assert (answer.status_code, "4" in answer.json()["error"]) == (413, True)
        answer = client.post("/v1/predict", files={"files": ("a", bytes(300_000))})
        assert (answer.status_code, "send fewer" in answer.json()["error"]) == (413, True)
        answer = client.post("/v1/heatmap", files=picture)
        assert (answer.status_code, "300x200" in answer.json()["error"]) == (413, True)
        answer = client.post("/v2/models/histo_jax/infer", content=bytes(40_000))
        assert answer.status_code == 413
    with start(cells=5, received=100_000) as server, httpx.Client(base_url=server.url) as client:
        answer = client.post("/v1/heatmap", files=picture, data={"tissue": "all"})
        assert (answer.status_code, "set stride = " in answer.json()["error"]) == (413, True)
        answer = client.post("/v1/predict", files=form)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        assert server.service.receiver.held == server.service.maps == 0


def test_a_body_without_an_end_is_refused_where_it_passes_the_limit(start):
    def endless():
        for _ in range(1000):
            yield bytes(10_000)

    with start(body=100_000) as server, httpx.Client(base_url=server.url) as client:
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        try:
            status = client.post("/v1/predict", content=endless(), headers=kind).status_code
        except httpx.HTTPError:  # closed before the client has read the answer
            status = 413
        assert status in (400, 413)
        assert client.get("/v2/health/ready").status_code == 200
        assert server.service.receiver.held == 0


def test_slow_clients_and_those_that_leave_do_not_stay(start, form, encode, tissue_pixels):
    with start(receive_seconds=0.3) as server, httpx.Client(base_url=server.url) as client:
        head = (
            "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        answer = raw(server, head)
        assert answer.startswith(b"HTTP/1.1 408 ")
        address = server.url.removeprefix("http://").rstrip("/").split(":")
        for part in (head, "POST /v1/pre", ""):
            with socket.create_connection((address[0], int(address[1]))) as connection:
                connection.sendall(part.encode())
        large = encode(tissue_pixels(2000, 2000), "PNG")
        with pytest.raises(httpx.HTTPError):
            client.post(
                "/v1/heatmap", files={"file": ("r.png", large)}, data={"tissue": "all"}, timeout=0.4
            )
        with client.stream(
            "POST", "/v1/heatmap", files={"file": ("r.png", large)}, data={"tissue": "all"},
            headers={"Accept": "application/x-ndjson"}, timeout=5,
        ) as streamed:  # fmt: skip
            next(streamed.iter_lines())
        deadline = time.monotonic() + 30
        while (server.service.maps or server.service.receiver.held) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.service.maps == server.service.receiver.held == 0
        assert client.post("/v1/predict", files=form, timeout=30).status_code == 200


def test_a_connection_without_a_request_is_closed(start, monkeypatch):
    from histo_jax.serve import server as module

    monkeypatch.setattr(module, "_KEEP_ALIVE", 0.2)
    with start(receive_seconds=0.1) as server:
        assert raw(server, "GET / HTTP/1.1\r\nHost: loc") == b""
        assert raw(server, "") == b""


def test_a_client_that_does_not_read_its_heat_map_is_dropped(start, monkeypatch):
    from histo_jax.serve import heatmaps
    from histo_jax.serve import server as module

    async def make_large_map(*arguments):
        return {"map": "x" * 20_000_000}

    monkeypatch.setattr(module, "_KEEP_ALIVE", 0.2)
    monkeypatch.setattr(heatmaps, "_make_map", make_large_map)
    head = (
        "POST /v1/heatmap HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: "
    )
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b--'
    with start(receive_seconds=0.1) as server:
        address = server.url.removeprefix("http://").rstrip("/").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            connections = server.running.server_state.connections
            deadline = time.monotonic() + 20
            while not connections and time.monotonic() < deadline:
                time.sleep(0.01)
            while connections and time.monotonic() < deadline:
                time.sleep(0.02)
            assert time.monotonic() < deadline


def test_a_long_answer_to_the_last_request_of_a_connection_is_not_cut_off(start, monkeypatch):
    from histo_jax.serve import patches as routes
    from histo_jax.serve import server as module

    predict = routes._predict

    async def predict_slowly(*arguments):
        await asyncio.sleep(0.8)
        return await predict(*arguments)

    monkeypatch.setattr(module, "_KEEP_ALIVE", 0.2)
    monkeypatch.setattr(routes, "_predict", predict_slowly)
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nx\r\n--b--'
    head = (
        "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    first = "GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with start(receive_seconds=0.1) as server:
        for before in ("", first):
            assert b'"results":' in raw(server, (before + head).encode() + body)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_bombs_are_refused_by_their_header(client):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    answer = client.post("/v1/heatmap", files={"file": ("bomb.png", bomb)})
    assert answer.status_code in (413, 422)
    (result,) = client.post("/v1/predict", files={"files": ("bomb.png", bomb)}).json()["results"]
    assert "error" in result
    text = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 96, 8, 2, 0, 0, 0))
    text += chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))) + chunk(b"IEND", b"")
    (result,) = client.post("/v1/predict", files={"files": ("text.png", text)}).json()["results"]
    assert "error" in result


def test_200_requests_at_once_are_answered(client, form):
    send = lambda _: client.post("/v1/predict", files=form[:1]).status_code  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        assert set(pool.map(send, range(200))) == {200}


def test_clients_do_not_fill_the_log(served, client, log):
    upgrade = "Connection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    raw(served, f"GET / HTTP/1.1\r\nHost: localhost\r\n{upgrade}")
    raw(served, "no request\r\n\r\n")
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/predict", content=b"--b\r\nbroken\r\n", headers=kind).status_code == 400
    assert log.text == ""


def test_a_bug_is_an_answer_without_details(start, form, monkeypatch, log):
    with start() as server, httpx.Client(base_url=server.url) as client:

        def fail(images):
            raise RuntimeError("/secret/path")

        monkeypatch.setattr(server.service.thread, "logits", fail)
        answer = client.post("/v1/predict", files=form)
        assert (answer.status_code, answer.json()) == (
            500, {"error": "the server has failed: see its log"}
        )  # fmt: skip
    assert "/secret/path" in log.text


@pytest.mark.slow
def test_memory_returns_after_many_patches_and_a_picture_of_100_megapixels(
    save_run, make_tiny_config, tmp_path, form
):
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    small = rng.integers(100, 220, (250, 250, 3)).astype(np.uint8)
    Image.fromarray(small).resize((10_000, 10_000)).save(file, "JPEG")
    run = save_run(make_tiny_config(), tmp_path / "run", Calibration(1.0, 0.0))
    command = [sys.executable, "-m", "histo_jax.serve", f"--workdir={run}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            with httpx.Client(base_url=process.stdout.readline().strip(), timeout=600) as client:
                send = lambda _: client.post("/v1/predict", files=form * 20).status_code  # noqa: E731
                send(0)
                before = psutil.Process(process.pid).memory_info().rss
                for _ in range(2):
                    with concurrent.futures.ThreadPoolExecutor(32) as pool:
                        assert set(pool.map(send, range(64))) <= {200, 429}
                    assert grown(process, before) < 100
                    answer = client.post(
                        "/v1/heatmap", files={"file": ("r.jpg", file.getvalue())},
                        data={"tissue": "all", "stride": "256"},
                    )  # fmt: skip
                    assert answer.status_code == 200, answer.text
                    assert grown(process, before) < 100
        finally:
            process.terminate()


def grown(process, before):
    """Returns the growth of its memory in MB, a second after the last request."""
    time.sleep(1)
    growth = (psutil.Process(process.pid).memory_info().rss - before) / 1e6
    print(f"memory has grown by {growth:.0f} MB")
    return growth
