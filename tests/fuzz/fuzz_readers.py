"""Fuzzes the readers with randomly corrupted files: `python tests/fuzz/fuzz_readers.py`.

Each file must be read, or refused by a `UserError` of one line; no other exception may escape, and
no input may take more than `--seconds` or `MEMORY`. The C libraries can crash and hang, so every
reader runs in a child process that can be killed. A finding is saved; `--replay FILE` repeats it.
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import io
import logging
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from histo_jax.config import DataConfig
from histo_jax.data import groups, gzips, image_files, names, slide_map
from histo_jax.data.example import Example
from histo_jax.data.sources import images, kaggle, pcam
from histo_jax.errors import DataError, UserError

MIB = 2**20
MEMORY = 512 * MIB  # growth of the child process by one input
DISK = 256 * MIB  # one file
ADDRESSES = 16 * 1024 * MIB  # protects the machine; far above MEMORY, the limit that counts

X, Y, META = (f"camelyonpatch_level_2_split_train_{end}" for end in ("x.h5", "y.h5", "meta.csv"))
PATCHES = np.random.default_rng(0).integers(150, 230, (3, 96, 96, 3), np.uint8)
# One is flat, so that compressed files are small and most changes hit the metadata.
PATCHES[0] = 200
IDS = [hashlib.sha1(patch).hexdigest() for patch in PATCHES]


class Kind(NamedTuple):
    """A kind of input: valid and hand-made bad files to start from, and their reader."""

    starts: list[bytes]
    feed: Callable[[Path, bytes], Iterator[Example]]
    tokens: list[bytes]


# --- readers ------------------------------------------------------------------------------------


def feed_labels(folder: Path, content: bytes) -> Iterator[Example]:
    """Reads `content` as both CSVs of a Kaggle folder."""
    for name, csv_name in kaggle._FOLDERS.values():
        (folder / name).mkdir(exist_ok=True)
        (folder / csv_name).write_bytes(content)
        for patch, id_ in zip(PATCHES, IDS, strict=True):
            (folder / name / f"{id_}.tif").write_bytes(tiff(patch))
    listed = [kaggle.list_files(folder, split) for split in kaggle._FOLDERS]
    assert kaggle.fingerprint(folder)
    for files in listed:
        yield from kaggle.read(files, skip=False, corrupt={})


def feed_tiff(folder: Path, content: bytes) -> Iterator[Example]:
    """Reads `content` as a patch; it is left out if and only if it is refused without `skip`."""
    path, valid = (folder / f"{name}.tif" for name in IDS[:2])
    path.write_bytes(content)
    valid.write_bytes(tiff(PATCHES[1]))
    corrupt: dict[str, str] = {}
    kept = list(kaggle.read([(path, 1), (valid, 1)], skip=True, corrupt=corrupt))
    assert len(kept) + len(corrupt) == 2
    assert kept[-1].id == IDS[1]
    assert kaggle.intact(corrupt) == []
    alone = list(kaggle.read([(path, 1)], skip=False, corrupt={}))
    assert len(alone) + 1 == len(kept)
    yield from kept


def feed_pcam(name: str, folder: Path, content: bytes) -> Iterator[Example]:
    for path in folder.iterdir():
        path.unlink()
    for empty in (X, Y):
        (folder / empty.replace("train", "valid")).touch()
    valid = KINDS["pcam.h5"].starts[0]
    (folder / name).write_bytes(content)
    for other in (X, Y):
        if not (folder / f"{other}.gz").exists():
            # Both datasets in one file, so that one change can affect both.
            (folder / other).write_bytes(content if name == X else valid)
    files = pcam.find(folder)["train"]
    with pcam.unpacked(files, folder) as plain:
        count = pcam.check(plain)
        examples = 0
        for example in pcam.read(plain):
            examples += 1
            yield example
    assert examples == count
    assert all(pcam.fingerprint(folder))


def feed_map(folder: Path, content: bytes) -> Iterator[Example]:
    path = folder / "map.csv"
    path.write_bytes(content)
    table = pd.DataFrame({"id": IDS, "slide": ""})
    for on_damaged in ("skip", "stop"):
        data = DataConfig(slide_map=str(path), on_damaged=on_damaged)
        filled = groups.unify({"train": slide_map.fill_in(table, data, folder)})["train"]
        yield from map(Example, filled["id"], PATCHES, [0] * 3, filled["slide"])


def feed_images(name: str, folder: Path, content: bytes) -> Iterator[Example]:
    """Reads `content` as the table of a folder of images."""
    if not (folder / "0.png").exists():
        for number, patch in enumerate(PATCHES):
            Image.fromarray(patch).save(folder / f"{number}.png")
    path = folder / name
    path.write_bytes(content)
    for positive in (None, "1"):
        data = DataConfig(raw_dir=str(folder), table=str(path), positive=positive)
        source = images.Images(data)
        assert source.fingerprint()
        for examples in source.splits().values():
            yield from examples


def feed_image(folder: Path, content: bytes) -> Iterator[Example]:
    """Reads `content` as an image of any format, as it is and scaled."""
    path = folder / "image.png"
    path.write_bytes(content)
    for size in (None, 96):
        result = image_files.read_image(path, size)
        if isinstance(result, image_files.ImageFile) and result.pixels.shape == (96, 96, 3):
            yield Example(hashlib.sha1(result.pixels.tobytes()).hexdigest(), result.pixels, 0)
        elif isinstance(result, Exception):
            raise result
        elif isinstance(result, str):
            raise DataError(result)


# --- files to start from -------------------------------------------------------------------------


def tiff(image: np.ndarray, **options) -> bytes:
    Image.fromarray(image).save(buffer := io.BytesIO(), "TIFF", **options)
    return buffer.getvalue()


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    Image.fromarray(PATCHES[0]).convert(mode).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def parquet() -> bytes:
    rows = {"path": [f"{k}.png" for k in range(3)], "label": [0, 1, 1], "slide": ["a", "b", "b"]}
    pd.DataFrame(rows).to_parquet(buffer := io.BytesIO())
    return buffer.getvalue()


def h5(
    count: int = 3, libver: str = "earliest", chunk: bytes = b"", labels: str = "u1", **options
) -> bytes:
    """Returns a file with both datasets; of more than three patches they are not written."""
    with h5py.File(buffer := io.BytesIO(), "w", libver=libver) as file:
        x = file.create_dataset("x", (count, 96, 96, 3), np.uint8, **options)
        options.pop("chunks", None)
        shape = (count, 1, 1, 1) if labels == "u1" else (count,)
        y = file.create_dataset("y", shape, labels, **options)
        if count == 3:
            x[:], y[:] = PATCHES, np.array([0, 1, 1], labels).reshape(shape)
        if chunk:
            x.id.write_direct_chunk((0, 0, 0, 0), chunk)
    return buffer.getvalue()


def bomb(mib: int) -> bytes:
    """Returns a deflate stream that grows a thousandfold, made quickly of one repeated block."""
    packer = zlib.compressobj()
    head = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (mib - 1) + packer.flush()


def tables(header: str, rows: list[str]) -> list[bytes]:
    text = "\n".join([header, *rows, ""])
    texts = [text, text.replace(",", ";"), text.replace("\n", "\r\n"), header, "", '"' * 99_999]
    # Pandas's own reader took 13 seconds and half a GB for each of these two.
    texts += ["\n".join([header, rows[0] + "," * 100_000]), header + ",c" * 100_000 + "\n1"]
    texts += ["\n".join([header, *['"x\ny",1'] * 2])]  # a name of two lines, twice
    texts += [text.replace(",", "\t"), text.upper().replace(",", " , "), f"\n\n{text},\n\n"]
    return [*(t.encode() for t in texts), *(text.encode(c) for c in ("utf-16", "utf-8-sig"))]


def numbers(*sizes: int) -> list[bytes]:
    """Returns integers that break lengths and offsets, in both byte orders."""
    values = [0, 1, 2, 7, 8, 96, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**64 - 1]
    return [
        (value % 256**size).to_bytes(size, order)
        for size in sizes for value in values for order in ("little", "big")
    ]  # fmt: skip


PACKED = {"compression": "gzip", "chunks": (1, 96, 96, 3)}
TEXT = [t.encode() for t in ('"', ",", "\n", "\r", "\0", ";", "\ufeff", "-1", "nan", "é", "\u2028")]
TEXT += [t.encode() for t in ("\u200b", "\u00a0", "e\u0301", "\uff17", "7.0", ".tif", "\t", ";;")]
TEXT += [b"\xff\xfe", b"\x1b", b"9" * 400, b"x" * 200_000, b"," * 50_000, b"\n" * 50_000]
FLAT = tiff(PATCHES[0])
CODECS = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")
KINDS = {
    "kaggle.csv": Kind(tables("id,label", [f"{i},1" for i in IDS]), feed_labels, TEXT),
    "kaggle.tif": Kind(
        [FLAT, *(tiff(PATCHES[0], compression=codec) for codec in CODECS), tiff(PATCHES[1]),
         tiff(np.zeros((6000, 6000, 3), np.uint8), compression="tiff_lzw"),
         FLAT.replace(b"\x60\0\0\0", b"\xff\xff\xff\x7f"), FLAT.replace(b"\x60\0", b"\xff\xff")],
        feed_tiff, numbers(2, 4)),
    "pcam.h5": Kind(
        [h5(), h5(**PACKED), h5(labels=">i8"), h5(labels="f4"), h5(labels="?"),
         h5(libver="latest"), h5(libver="latest", **PACKED),
         h5(shuffle=True, fletcher32=True, chunks=(2, 96, 96, 3)),
         h5(2**33), h5(2**40), h5(2**33, compression="lzf", chunks=(1, 96, 96, 3)),
         h5(60_000, chunk=bomb(1600), compression="gzip", chunks=(60_000, 96, 96, 3)),
         h5(60_000, chunks=(60_000, 96, 96, 3)), h5(chunk=bomb(600), **PACKED)],
        functools.partial(feed_pcam, X), numbers(1, 2, 4, 8)),
    "pcam.h5.gz": Kind(
        [gzip.compress(h5(**PACKED), mtime=0), gzip.compress(h5(), 0, mtime=0),
         gzip.compress(bytes(MIB), mtime=0) * 400],  # the trailer states one MiB
        functools.partial(feed_pcam, f"{X}.gz"), numbers(1, 2, 4)),
    "pcam.csv": Kind(
        tables("coord_x,wsi", [f"{i},slide_{i}" for i in range(3)]),
        functools.partial(feed_pcam, META), TEXT),
    "images.csv": Kind(
        tables("path,label,wsi", [f"{k}.png,{k % 2},s" for k in range(3)]),
        functools.partial(feed_images, "images.csv"),
        [*TEXT, b"../", b"\\", b"/", b"0.png", b"sep=;\n", b"NA", b":/"]),
    "images.parquet": Kind(
        [parquet()], functools.partial(feed_images, "images.parquet"), numbers(1, 2, 4)),
    "images.png": Kind(
        [encoded("PNG"), encoded("PNG", "P"), encoded("PNG", "LA"), encoded("JPEG"),
         encoded("JPEG", "CMYK"), encoded("GIF"), encoded("WEBP"), encoded("BMP"), encoded("PPM"),
         encoded("JPEG2000"), FLAT],
        feed_image, numbers(2, 4)),
    "map.csv": Kind(tables("id,wsi", [f"{i},s" for i in IDS]), feed_map, TEXT),
}  # fmt: skip


def make(kind: str, seed: int, index: int) -> bytes:
    """Returns input `index`: the starts unchanged, then mutations; a function of its arguments."""
    starts, _, tokens = KINDS[kind]
    if index < len(starts):
        return starts[index]
    rng = random.Random(f"{seed} {kind} {index}")
    content = bytearray(rng.choice((starts[0], rng.choice(starts))))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        size = len(content)
        # Headers and trailers describe the rest, which is mostly pixels.
        near = min(size, rng.choice((16, 256, 2500)))
        at = rng.choice(
            (rng.randrange(near + 1), size - rng.randrange(near + 1), rng.randint(0, size))
        )
        run = min(rng.choice((1, 4, 60, 3000)), size - at)
        token = rng.choice(tokens)
        match rng.randrange(8):
            case 0 if at < size:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + run] = rng.randbytes(run)
            case 2:
                content[at : at + run] = bytes([rng.choice((0, 255))]) * run
            case 3:
                del content[at : at + run]
            case 4:
                content[at:at] = content[at : at + run]
            case 5:
                content[at:at] = token
            case 6 if rng.random() < 0.3:
                del content[at:]
            case _:
                content[at : at + len(token)] = token
    return bytes(content)


# --- child processes -----------------------------------------------------------------------------


def check(kind: str, folder: Path, content: bytes) -> tuple[str, str]:
    """Returns 'ok', 'refused' or 'finding', and the message."""
    try:
        for id_, image, label, slide, patient, _ in KINDS[kind].feed(folder, content):
            assert re.fullmatch("[0-9a-f]{40}", id_)
            assert (image.dtype, image.shape) == (np.uint8, (96, 96, 3))
            assert label in (-1, 0, 1)
            assert (slide, patient) == (names.clean(slide), names.clean(patient))
    except UserError as error:
        # Memory that only the limit of the child refused would have been allocated without it.
        bad = not str(error).isprintable() or re.search("memory|allocate ", str(error), re.I)
        return "finding" if bad else "refused", str(error)
    except BaseException as error:
        return "finding", f"{type(error).__name__}: {error}"
    return "ok", ""


def child(pipe) -> None:
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff prints
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    # A larger stated size is refused by the reader, a larger file by the limit above.
    os.cpu_count = lambda: 1  # one image in memory at a time
    free = gzips.shutil.disk_usage("/")._replace(free=DISK)
    gzips.shutil.disk_usage = lambda _: free
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EOFError):
        before = peak()
        while True:
            kind, content = pipe.recv()
            (place := Path(folder) / kind).mkdir(exist_ok=True)
            pipe.send((*check(kind, place, content), peak() - before))


def peak() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class Child:
    """A process that reads inputs; replaced after one that had to be killed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.pipe, end = multiprocessing.Pipe()
        # Forked, it starts at once and has `KINDS`; there are no threads yet.
        self.process = multiprocessing.get_context("fork").Process(target=child, args=(end,))
        self.process.start()
        end.close()

    def check(self, kind: str, content: bytes) -> tuple[str, str, int]:
        self.pipe.send((kind, content))
        try:
            if not self.pipe.poll(self.seconds):
                return "finding", f"hangs: more than {self.seconds} s", 0
            result, line, memory = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return "finding", f"crash, status {self.process.exitcode}", 0
        if memory > MEMORY:
            return "finding", f"takes {memory // MIB} MiB ({line})", memory
        return result, line, memory

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10, help="limit for one input")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--replay", type=Path, help="a saved finding")
    args = parser.parse_args()
    findings, started = 0, time.monotonic()
    print(f"{'kind':12} inputs     ok refused findings slowest   peak")
    for place, kind in enumerate(args.kinds):
        if args.replay:
            if args.replay.name.split("-")[0] != kind:
                continue
            inputs = iter([args.replay.read_bytes()])
        else:
            count = (args.inputs + place) // len(args.kinds)
            inputs = (make(kind, args.seed, index) for index in range(count))
        tally, slowest, most = {"ok": 0, "refused": 0, "finding": 0}, 0.0, 0
        runner = Child(args.seconds)
        for index, content in enumerate(inputs):
            begin = time.monotonic()
            result, line, memory = runner.check(kind, content)
            slowest, most = max(slowest, time.monotonic() - begin), max(most, memory)
            tally[result] += 1
            if args.replay:
                print(f"{result}: {line}")
            elif result == "finding":
                saved = args.findings / f"{kind}-{args.seed}-{index}"
                saved.write_bytes(content)
                print(f"FINDING, seed {args.seed}: {line!r:.300}; --replay {saved}", flush=True)
                runner.end()  # it may hang, and its memory would count for the next input
                runner = Child(args.seconds)
        runner.end()
        findings += tally["finding"]
        print(
            f"{kind:12} {sum(tally.values()):6} {tally['ok']:6} {tally['refused']:7} "
            f"{tally['finding']:8} {slowest:5.2f} s {most // MIB:4} MiB", flush=True,
        )  # fmt: skip
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
