"""Downloads files whose size and SHA-256 are known; a file is complete or not there."""

import hashlib
import logging
import threading
import uuid
from pathlib import Path
from typing import NamedTuple

import requests

from histo_jax.errors import DataError, one_line
from histo_jax.run import progress, signals

log = logging.getLogger("histo_jax")

RETRIES = 4  # with pauses of 1, 2 and 4 seconds between them
_TIMEOUT_SECONDS = 60
_BLOCK = 1 << 20  # bytes


class RemoteFile(NamedTuple):
    """A published file.

    Attributes:
        url: its address.
        size: bytes.
        sha256: of its content, 64 hex digits.
    """

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


def read_checksums(path: Path) -> dict[str, RemoteFile]:
    """Returns by name the files of a table in TFDS's form: URL, size, SHA-256, name; by tabs."""
    rows = (line.split("\t") for line in path.read_text().splitlines() if line)
    return {name: RemoteFile(url, int(size), sha256) for url, size, sha256, name in rows}


def download(file: RemoteFile, folder: Path) -> Path:
    """Downloads a file into a folder, unless it is there.

    Args:
        file: what to download.
        folder: made if missing.

    Raises:
        DataError: names the URL, and why it cannot be downloaded or is not as published.
        OSError: the folder cannot be written, or the disk is full.
    """
    path = folder / file.name
    if path.is_file() and path.stat().st_size == file.size:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s", file.url)
    part = folder / f"{file.name}.{uuid.uuid4().hex}.part"
    try:
        _in_thread(file, part)
        part.replace(path)
    except requests.RequestException as error:
        raise DataError(_failure(file, _reason(error))) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _in_thread(file: RemoteFile, part: Path) -> None:
    """Downloads in a thread: a signal is handled at once, also while no data arrives."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            _fetch_with_retries(file, part, stop)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            if signals.requested():
                raise signals.Preempted
    finally:
        stop.set()
    if errors:
        raise errors[0]


def _fetch_with_retries(file: RemoteFile, part: Path, stop: threading.Event) -> None:
    for attempt in range(RETRIES):
        try:
            _fetch(file, part, stop)
            return
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", 503)
            if attempt == RETRIES - 1 or status < 500:
                raise
        if stop.wait(2**attempt):
            return


def _fetch(file: RemoteFile, part: Path, stop: threading.Event) -> None:
    digest, size = hashlib.sha256(), 0
    with (
        requests.get(file.url, stream=True, timeout=_TIMEOUT_SECONDS) as response,
        part.open("wb") as sink,
        progress.bar(file.name, file.size, unit="B", unit_scale=True) as bar,
    ):
        response.raise_for_status()
        for block in response.iter_content(_BLOCK):
            if stop.is_set():
                return
            digest.update(block)
            sink.write(block)
            bar.update(len(block))
            size += len(block)
            if size > file.size:  # it would fill the disk
                break
    if size != file.size or digest.hexdigest() != file.sha256:
        raise DataError(_failure(file, "its size or SHA-256 is not the published one"))


def _failure(file: RemoteFile, reason: str) -> str:
    return (
        f"{file.url} cannot be downloaded ({reason}): try again later, or download all files by "
        "hand and set --config.data.raw_dir to their folder"
    )


def _reason(error: BaseException) -> str:
    """Returns the first error of a chain in one line: it is the most specific."""
    while error.__context__:
        error = error.__context__
    return one_line(error)
