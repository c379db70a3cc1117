"""The published files, plain and packed; each mistake one line; downloads from a small server."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tensorflow_datasets as tfds

from histo_jax.data import downloads, gzips
from histo_jax.data.sources import pcam
from histo_jax.errors import UserError
from histo_jax.run import signals

STEM = "camelyonpatch_level_2_split_"
COUNTS = {"train": 700, "validation": 30, "test": 20}  # train is more than is read at once
X, Y, META = (f"{STEM}train_{end}" for end in ("x.h5", "y.h5", "meta.csv"))


def write(path: Path, key: str, values: np.ndarray, **options) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=values, **options)


def pack(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    path.unlink()
    return packed


def pixels(split: str) -> np.ndarray:
    count = COUNTS[split]
    return np.random.default_rng(count).integers(0, 256, (count, 96, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine files, plain; labels alternate, and ten patches share a slide."""
    folder = tmp_path_factory.mktemp("pcam")
    for split, name in pcam.SPLITS.items():
        order = np.arange(COUNTS[split])
        write(folder / f"{STEM}{name}_x.h5", "x", pixels(split))
        write(folder / f"{STEM}{name}_y.h5", "y", (order % 2).astype(np.uint8)[:, None, None, None])
        table = pd.DataFrame({"coord_y": order, "coord_x": order, "tumor_patch": False})
        table = table.assign(
            center_tumor_patch=order % 2 == 1, wsi=[f"{name}_{i // 10}" for i in order]
        )
        table.to_csv(folder / f"{STEM}{name}_meta.csv", index=split == "test")  # with and without
    return folder


@pytest.fixture
def raw(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "raw"))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for unpacked files, which must be empty in the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir())


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    line = str(error.value)
    assert "\n" not in line
    assert not [word for word in words if word not in line], line


# --- examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", "xy", "x", "y"])
def test_examples_equal_what_was_written(raw: Path, scratch: Path, packed: str) -> None:
    for kind in packed:
        for name in pcam.SPLITS.values():
            pack(raw / f"{STEM}{name}_{kind}.h5")
    found = pcam.find(raw)
    assert list(found) == ["train", "validation", "test"]
    for split, files in found.items():
        images, name = pixels(split), pcam.SPLITS[split]
        with pcam.unpacked(files, scratch) as plain:
            assert pcam.check(plain) == COUNTS[split]
            examples = list(pcam.read(plain))
        assert [e.id for e in examples] == [hashlib.sha1(i.tobytes()).hexdigest() for i in images]
        assert all((e.image == i).all() for e, i in zip(examples, images, strict=True))
        assert [e.label for e in examples] == [i % 2 for i in range(COUNTS[split])]
        assert {type(e.label) for e in examples} == {int}
        assert [e.slide for e in examples] == [f"{name}_{i // 10}" for i in range(COUNTS[split])]


def test_slides_and_test_may_be_missing(raw: Path) -> None:
    for path in {*raw.glob("*_test_*"), *raw.glob("*_meta.csv")}:
        path.unlink()
    found = pcam.find(raw)
    assert list(found) == ["train", "validation"]
    assert {example.slide for example in pcam.read(found["validation"])} == {""}


def test_a_plain_file_is_preferred_to_a_packed_one(raw: Path) -> None:
    (raw / f"{X}.gz").write_bytes(b"never read")
    assert pcam.find(raw)["train"] == pcam.Files(raw / X, raw / Y, raw / META)


def test_real_sample(sample: Path) -> None:
    found = pcam.find(sample / "pcam_sample")
    assert {split: pcam.check(files) for split, files in found.items()} == {
        "train": 19171,
        "validation": 2907,
    }
    with h5py.File(found["validation"].x) as x, h5py.File(found["validation"].y) as y:
        images, labels = x["x"][:600], y["y"][:600].ravel().tolist()
    examples = [e for e, _ in zip(pcam.read(found["validation"]), images, strict=False)]
    assert [e.id for e in examples] == [hashlib.sha1(i.tobytes()).hexdigest() for i in images]
    assert [e.label for e in examples] == labels
    assert set(labels) == {0, 1}


@pytest.mark.parametrize("options", [{}, {"chunks": (32, 96, 96, 3), "compression": "lzf"}])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, options: dict) -> None:
    peaks = []
    for count in (1024, 4096):
        files = pcam.Files(tmp_path / f"{count}_x.h5", tmp_path / f"{count}_y.h5", None)
        with h5py.File(files.x, "w") as file:
            file.create_dataset("x", (count, 96, 96, 3), np.uint8, fillvalue=7, **options)
            file["x"][-1] = 8  # allocates all of a contiguous one
        write(files.y, "y", np.zeros((count, 1, 1, 1), np.uint8))
        tracemalloc.start()
        assert sum(1 for _ in pcam.read(files)) == count
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    # 3072 patches more are 81 MiB more on disk; two chunks of 512 are 27 MiB.
    assert 13 < peaks[0] < 40
    assert abs(peaks[1] - peaks[0]) < 2


# --- bad files: how to spoil them, and words of the error ---------------------------------------


def cut(name: str, share: float) -> Callable[[Path], None]:
    def spoil(raw: Path) -> None:
        content = (raw / name).read_bytes()
        (raw / name).write_bytes(content[: int(share * len(content))])

    return spoil


def text(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda raw: (raw / name).write_text(change((raw / name).read_text()))


def hdf5(name: str, key: str, *shape: int, dtype: type = np.uint8, fill: int = 0, **options):
    return lambda raw: write(raw / name, key, np.full(shape, fill, dtype), **options)


def corrupt_chunk(raw: Path) -> None:
    """Spoils the checksum of the last chunk; everything before reads well."""
    write(raw / X, "x", pixels("train"), chunks=(50, 96, 96, 3), fletcher32=True)
    with h5py.File(raw / X) as file:
        offset = file["x"].id.get_chunk_info(13).byte_offset
    content = bytearray((raw / X).read_bytes())
    content[offset] ^= 1
    (raw / X).write_bytes(content)


def group_for_dataset(raw: Path) -> None:
    with h5py.File(raw / X, "w") as file:
        file.create_group("x")


def null(raw: Path) -> None:
    with h5py.File(raw / X, "w") as file:
        file.create_dataset("x", dtype=np.uint8)


HDF5, AGAIN = "not a readable HDF5", "download it again"
# Errors that no download would fix.
FORM, FILL = "must be uint8[n, 96, 96, 3]: write", "complete it"
BAD = {
    "x-other-key": (hdf5(X, "images", 9, 96, 96, 3), X, "no dataset 'x'", "holds images"),
    "x-group": (group_for_dataset, X, "no dataset 'x'", "write it"),
    "x-float": (hdf5(X, "x", 7, 96, 96, 3, dtype=np.float32), X, "float32[7,", FORM, "0 to 255"),
    "x-small": (hdf5(X, "x", 700, 64, 64, 3), X, "uint8[700, 64, 64, 3]", FORM),
    "x-flat": (hdf5(X, "x", 700), X, "uint8[700]", FORM),
    "x-scalar": (hdf5(X, "x"), X, "uint8[]", FORM),
    "x-null": (null, X, "uint8[]", FORM),
    "x-no-patches": (hdf5(X, "x", 0, 96, 96, 3), X, "uint8[0, 96, 96, 3]", FORM),
    "x-no-hdf5": (lambda raw: (raw / X).write_bytes(bytes(999)), X, HDF5, AGAIN),
    "x-empty": (cut(X, 0), X, HDF5, AGAIN),
    "x-cut": (cut(X, 0.9), X, HDF5, "truncated", AGAIN),
    "x-cut-early": (cut(X, 1e-5), X, HDF5, AGAIN),
    "y-other-key": (hdf5(Y, "x", 700, 1, 1, 1), Y, "no dataset 'y'", "holds x", "write it"),
    "y-cut": (cut(Y, 0.7), Y, HDF5, AGAIN),
    "y-longer": (hdf5(Y, "y", 701, 1, 1, 1), Y, X, "701", "700", "each patch needs one"),
    "y-shorter": (hdf5(Y, "y", 699, 1, 1, 1), Y, X, "699", "700", "each patch needs one"),
    "label-2": (hdf5(Y, "y", 700, 1, fill=2), Y, "label 2 of patch 0", "0 or 1", "699 more of 700"),
    "meta-no-wsi": (text(META, lambda old: old.replace("wsi", "w")), META, "center_", "correct"),
    "meta-longer": (text(META, lambda old: old + "1,1,False,True,s\n"), META, "701", X, FILL),
    "meta-shorter": (text(META, lambda old: old[: old[:-1].rindex("\n")]), META, "699", FILL),
    "meta-cut": (cut(META, 0.5), META, X, FILL),
    "meta-cut-in-row": (text(META, lambda old: old[: old.rindex(",")]), META, "699 of 700"),
    "meta-no-slide": (text(META, lambda old: old.replace("train_7\n", "\n")), META, "690", FILL),
    "meta-empty": (cut(META, 0), META, "not a readable CSV", AGAIN),
    "meta-ragged": (text(META, lambda old: old + "1," * 9 + "\n"), META, "not a readable", AGAIN),
    "meta-binary": (lambda raw: (raw / META).write_bytes(bytes(range(256))), META, "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(
    "act", [pcam.check, lambda files: next(pcam.read(files))], ids=["check", "read"]
)
@pytest.mark.parametrize("name", BAD)
def test_bad_file(raw: Path, name: str, act: Callable) -> None:
    spoil, *words = BAD[name]
    files = pcam.find(raw)["train"]
    assert act(files)
    spoil(raw)
    with pytest.raises(UserError) as error:
        act(files)
    one_line(error, str(raw), *words)


def test_corrupt_images(raw: Path) -> None:
    corrupt_chunk(raw)
    files = pcam.find(raw)["train"]
    assert pcam.check(files) == 700
    reader = pcam.read(files)
    assert sum(1 for _ in zip(range(512), reader, strict=False)) == 512
    with pytest.raises(UserError) as error:
        next(reader)
    one_line(error, str(raw / X), HDF5, AGAIN)


@pytest.mark.parametrize("end", ["train_x", "train_y", "valid_x", "valid_y", "test_x", "test_y"])
def test_missing_file(raw: Path, end: str) -> None:
    (raw / f"{STEM}{end}.h5").unlink()
    with pytest.raises(UserError) as error:
        pcam.find(raw)
    one_line(error, str(raw / f"{STEM}{end}.h5"), "missing", ".gz", "zenodo.org")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_missing_split(raw: Path, split: str) -> None:
    for path in raw.glob(f"*_{split}_*"):
        path.unlink()
    with pytest.raises(UserError) as error:
        pcam.find(raw)
    one_line(error, str(raw / f"{STEM}{split}_x.h5"), "missing", "zenodo.org")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        pcam.find(tmp_path / "raw")
    one_line(error, str(tmp_path / "raw"), "no such folder", "--config.data.raw_dir")


def test_all_missing_files_are_named_and_searched_for(raw: Path) -> None:
    names = [f"{STEM}{n}_{k}.h5" for n in ("train", "valid") for k in "xy"]
    (raw / "deep" / "er").mkdir(parents=True)
    for path in raw.glob("*.h5"):
        path.rename(raw / "deep" / "er" / path.name)
    with pytest.raises(UserError) as error:
        pcam.find(raw)
    one_line(
        error, *names, "are missing", f"{raw}/deep/er has all files", "give this folder instead"
    )


def test_a_missing_file_under_another_name_is_found(raw: Path) -> None:
    (raw / X).rename(raw / X.replace(".h5", ".HDF5"))
    with pytest.raises(UserError, match=rf"rename {STEM}train_x\.HDF5 to {X}"):
        pcam.find(raw)
    (raw / X.replace(".h5", ".HDF5")).unlink()
    (raw / X).mkdir()
    with pytest.raises(UserError, match=rf"{X} is a folder"):
        pcam.find(raw)


# --- files that users made -----------------------------------------------------------------------

LABELS = np.arange(700) % 2
IMAGES = np.random.default_rng(700).integers(0, 256, (700, 96, 96, 3), np.uint8)  # as `pixels`


def put(name: str, key: str, values: object, **options: object) -> Callable[[Path], None]:
    return lambda raw: write(raw / name, key, values, **options)


def annotated(raw: Path) -> None:
    with h5py.File(raw / X, "a") as file:
        file["x"].attrs["scanner"] = file.attrs["site"] = "Aachen"
        file["coordinates"] = np.zeros((700, 2))


ENUM = h5py.enum_dtype({"none": 0, "tumour": 1}, "i1")
OWN = {
    "int64": put(Y, "y", LABELS),
    "big-endian": put(Y, "y", LABELS.astype(">i4")),
    "boolean": put(Y, "y", LABELS.astype(bool)),
    "enum": put(Y, "y", LABELS.astype("i1"), dtype=ENUM),
    "float": put(Y, "y", LABELS.astype(np.float32)),
    "column": put(Y, "y", LABELS[:, None]),
    "row": put(Y, "y", LABELS[None].astype(np.uint16)),
    "packed": put(X, "x", IMAGES, compression="lzf", chunks=(33, 96, 96, 3)),
    "growing": put(X, "x", IMAGES, maxshape=(None, 96, 96, 3), chunks=(64, 96, 96, 3)),
    "annotated": annotated,
}


@pytest.mark.parametrize("name", OWN)
def test_files_that_users_made(raw: Path, name: str) -> None:
    OWN[name](raw)
    files = pcam.find(raw)["train"]
    assert pcam.check(files) == 700
    for place, example in zip(range(3), pcam.read(files), strict=False):
        assert (example.label, type(example.label)) == (place % 2, int)
        assert (example.image == IMAGES[place]).all()


def virtual(raw: Path) -> None:
    layout = h5py.VirtualLayout((700, 96, 96, 3), np.uint8)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", layout.shape)
    with h5py.File(raw / X, "w") as file:
        file.create_virtual_dataset("x", layout)


def unknown_filter(raw: Path) -> None:
    with h5py.File(raw / X, "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((1, 96, 96, 3))
        plan.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())  # Blosc
        space = h5py.h5s.create_simple((9, 96, 96, 3))
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_UINT8, space, plan)


OTHER_FORMS = {
    "one-hot": (put(Y, "y", np.eye(2)[LABELS]), Y, "1400 labels", "float64[700, 2]", "needs one"),
    "soft": (put(Y, "y", LABELS * 0.9), Y, "label 0.9 of patch 1", "349 more of 700", "correct"),
    "not-known": (put(Y, "y", np.where(LABELS, 1, np.nan)), Y, "label nan of patch 0", "349 more"),
    "words": (
        put(Y, "y", np.where(LABELS, b"yes", b"no")),
        Y,
        "S3[700]",
        "numbers that are 0 or 1",
    ),
    "channels-first": (hdf5(X, "x", 7, 3, 96, 96), X, "uint8[7, 3, 96, 96]", "channels last"),
    "transparency": (hdf5(X, "x", 7, 96, 96, 4), X, "uint8[7, 96, 96, 4]", "fourth channel"),
    "group": (group_for_dataset, X, "no dataset 'x'", "x is a group"),
    "virtual": (virtual, X, "x is stored in other files"),
    "blosc": (unknown_filter, X, "filter 32001", "not installed", "gzip"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_forms_are_not_to_be_downloaded_again(raw: Path, name: str) -> None:
    spoil, *words = OTHER_FORMS[name]
    spoil(raw)
    with pytest.raises(UserError) as error:
        pcam.check(pcam.find(raw)["train"])
    one_line(error, str(raw), *words)
    assert "download" not in str(error.value)


@pytest.mark.parametrize("word", ["nan", "Unknown", "-", " "])
def test_slides_that_are_not_known_are_none(raw: Path, word: str) -> None:
    text(META, lambda old: old.replace("train_7\n", f"{word}\n"))(raw)
    with pytest.raises(UserError, match="names the slides of 690 of 700 patches"):
        pcam.check(pcam.find(raw)["train"])


# --- files that are not corrupt ------------------------------------------------------------------


def test_a_file_that_another_program_writes(raw: Path) -> None:
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(raw / X)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        writer.stdout.readline()
        with pytest.raises(UserError) as error:
            pcam.check(pcam.find(raw)["train"])
        writer.communicate(b"\n")
    one_line(error, str(raw / X), "has locked it", "close it")
    assert "download" not in str(error.value)
    if sys.platform == "linux":
        one_line(error, f"process {writer.pid} (python")
    assert pcam.check(pcam.find(raw)["train"]) == 700


def test_a_file_whose_writer_was_killed(raw: Path) -> None:
    code = (
        "import h5py, os, sys\nfile = h5py.File(sys.argv[1], 'a', libver='latest')\n"
        "file['more'] = 1\nfile.flush()\nos.kill(os.getpid(), 9)"
    )
    with h5py.File(raw / X, "w", libver="latest") as file:
        file["x"] = IMAGES
    subprocess.run([sys.executable, "-c", code, str(raw / X)], check=False)
    with pytest.raises(UserError, match=r"its writer was killed: .*h5clear"):
        pcam.check(pcam.find(raw)["train"])


def test_a_mount_without_locks(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = h5py.File, []

    def open_file(path: Path, mode: str, locking: object = None) -> h5py.File:
        if locking is None:
            refused.append(path)
            raise OSError(errno.ENOLCK, "Unable to open file (unable to lock file, errno = 37)")
        return real(path, mode, locking=locking)

    monkeypatch.setattr(h5py, "File", open_file)
    assert pcam.check(pcam.find(raw)["train"]) == 700
    assert refused


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_file_that_the_system_cannot_read(raw: Path, monkeypatch, number: int) -> None:
    pack(raw / Y)

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "Can't read data")

    with monkeypatch.context() as patch:
        patch.setattr(h5py, "File", fail)
        with pytest.raises(UserError) as error:
            pcam.check(pcam.find(raw)["validation"])
        one_line(error, f"split_valid_x.h5 cannot be read ({os.strerror(number)}): ")
    monkeypatch.setattr(gzip, "open", fail)
    for read in (lambda: pcam.fingerprint(raw), lambda: next(gzips._blocks(raw / f"{Y}.gz"))):
        with pytest.raises(UserError) as error:
            read()
        one_line(error, f"{raw / Y}.gz cannot be read ({os.strerror(number)}): ")


def test_a_full_scratch_disk_is_not_blamed_on_another_folder(raw, scratch, monkeypatch) -> None:
    pack(raw / Y)

    def full(path: Path) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr(gzips, "_blocks", full)
    with (
        pytest.raises(OSError, match="No space") as error,
        pcam.unpacked(pcam.find(raw)["train"], scratch),
    ):
        pass
    assert error.value.filename == str(scratch)


# --- the fingerprint -----------------------------------------------------------------------------


def repacked(raw: Path) -> None:
    for path in list(raw.glob("*.h5")):
        pack(path)


SAME = {
    "copied": lambda raw: [os.utime(path, (1, 1)) for path in raw.iterdir()],
    "packed": repacked,
    "packed-beside": lambda raw: (raw / f"{X}.gz").write_bytes(b"never read"),
    "windows": text(META, lambda old: old.replace("\n", "\r\n")),
    "columns": text(META, lambda old: "".join(f"1;{r}\n" for r in old.replace(",", ";").split())),
    "junk": lambda raw: (raw / f"._{X}").symlink_to("/nowhere/at/all"),
}


@pytest.mark.parametrize("name", SAME)
def test_equivalent_files_have_the_same_fingerprint(raw: Path, name: str) -> None:
    before = pcam.fingerprint(raw)
    SAME[name](raw)
    content, times = pcam.fingerprint(raw)
    assert content == before[0]
    assert times == before[1] or name in ("copied", "packed")


CHANGED = {
    "labels": put(Y, "y", (1 - LABELS).astype(np.uint8)[:, None, None, None]),
    "a-patch": put(X, "x", np.concatenate([IMAGES[:9], IMAGES[8:9], IMAGES[10:]])),
    "slides": text(META, lambda old: old.replace("train_7", "train_8")),
    "no-slides": lambda raw: (raw / META).unlink(),
    "longer": lambda raw: (raw / X).write_bytes((raw / X).read_bytes() + b"."),
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_content_has_another_fingerprint(raw: Path, name: str) -> None:
    before = pcam.fingerprint(raw)[0]
    CHANGED[name](raw)
    assert pcam.fingerprint(raw)[0] != before


def test_a_change_after_16_mib_changes_the_times(raw: Path) -> None:
    before = pcam.fingerprint(raw)
    with (raw / X).open("r+b") as file:  # 19 MB
        file.seek(-1, io.SEEK_END)
        file.write(b"!")
    content, times = pcam.fingerprint(raw)
    assert content == before[0]
    assert times != before[1]


# --- packed files ------------------------------------------------------------------------------


def flip(content: bytes) -> bytes:
    """Changes the checksum at the end of a gzip file."""
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


PACKED = {
    "cut": lambda old: old[: len(old) // 2],
    "cut-in-the-end": lambda old: old[:-3],
    "header-alone": lambda old: old[:10],
    "empty": lambda _: b"",
    "no-gzip": lambda _: b"<html>not found</html>" * 9,
    "other-checksum": flip,
    "changed-inside": lambda old: old[:5000] + bytes(100) + old[5100:],
}


@pytest.mark.parametrize("name", PACKED)
def test_corrupt_gzip(raw: Path, scratch: Path, name: str) -> None:
    packed = pack(raw / f"{STEM}valid_x.h5")
    packed.write_bytes(PACKED[name](packed.read_bytes()))
    # An empty file is a gzip of nothing.
    form = HDF5 if name == "empty" else "not a readable gzip"
    files = pcam.find(raw)["validation"]
    with pytest.raises(UserError) as error, pcam.unpacked(files, scratch) as plain:
        pcam.check(plain)
    one_line(error, str(packed), form, AGAIN)


def test_an_error_inside_a_gzip_names_the_gzip(raw: Path, scratch: Path) -> None:
    hdf5(Y, "y", 700, 1, 1, 1, fill=3)(raw)
    packed = pack(raw / Y)
    with (
        pytest.raises(UserError) as error,
        pcam.unpacked(pcam.find(raw)["train"], scratch) as plain,
    ):
        pcam.check(plain)
    one_line(error, f"{packed}: label 3")
    assert str(scratch) not in str(error.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_unpacked_files_are_removed_after_an_error(raw: Path, scratch: Path, kind: type) -> None:
    pack(raw / f"{STEM}valid_x.h5")
    files = pcam.find(raw)["validation"]

    def use() -> None:
        with pcam.unpacked(files, scratch) as plain:
            assert plain.x.is_relative_to(scratch)
            assert plain.x.exists()
            raise kind

    with pytest.raises(kind):
        use()


@pytest.mark.parametrize(
    ("packed", "trailer", "needs"),
    [(100_000, 99_990, "0.0"), (100_000, 5_000, "4.3"), (6 * 2**30, 2**31, "6.4"), (10, 7, "0.0")],
)
def test_too_little_space_is_an_error(
    raw: Path, scratch: Path, monkeypatch, packed: int, trailer: int, needs: str
) -> None:
    """The size in the trailer is modulo 4 GiB; noise grows a little when it is packed."""
    path = raw / f"{X}.gz"
    (raw / X).unlink()
    with path.open("wb") as file:
        file.truncate(packed - 4)
        file.seek(0, io.SEEK_END)
        file.write(trailer.to_bytes(4, "little"))
    free = shutil.disk_usage(scratch)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    files = pcam.find(raw)["train"]
    with pytest.raises(UserError) as error, pcam.unpacked(files, scratch):
        pass
    one_line(error, str(path), f"needs {needs} GB", str(scratch), "--config.data.tfds_dir")


# --- downloads ---------------------------------------------------------------------------------


class Server:
    """Serves `files` and lists the requests; `spoil` answers instead."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.spoil: Callable[[http.server.BaseHTTPRequestHandler, bytes], None] | None = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                outer.requests.append(name)
                content = outer.files[name]
                if outer.spoil and "train_x" in name:
                    outer.spoil(self, content)
                else:
                    self.answer(len(content), content)

            def answer(self, length: int, content: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/files/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture(scope="module")
def packed_files(made: Path) -> dict[str, bytes]:
    return {f"{p.name}.gz": gzip.compress(p.read_bytes(), 1) for p in made.glob("*.h5")}


@pytest.fixture
def server(packed_files, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    server.files = packed_files
    published = {
        name: downloads.RemoteFile(
            server.url + name, len(content), hashlib.sha256(content).hexdigest()
        )
        for name, content in packed_files.items()
    }
    monkeypatch.setattr(downloads, "read_checksums", lambda path: published)
    monkeypatch.setattr(downloads, "RETRIES", 1)
    yield server
    server.http.shutdown()
    server.http.server_close()


def refused(server: Server, folder: Path, *words: str) -> None:
    """Asserts one line, and that nothing of the bad file is left."""
    with pytest.raises(UserError) as error:
        pcam.download(folder)
    one_line(error, f"{server.url}{X}.gz", "--config.data.raw_dir", *words)
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(name for name in server.files if "_y.h5" in name)  # come first


def test_download(server: Server, tmp_path: Path, scratch: Path) -> None:
    found = pcam.download(tmp_path / "downloads")
    assert list(found) == ["train", "validation", "test"]
    for split, files in found.items():
        assert files.meta is None
        with pcam.unpacked(files, scratch) as plain:
            assert pcam.check(plain) == COUNTS[split]
            first = next(pcam.read(plain))
        assert first.id == hashlib.sha1(pixels(split)[0].tobytes()).hexdigest()
    assert sorted(server.requests) == sorted(server.files)
    assert pcam.download(tmp_path / "downloads") == found
    assert len(server.requests) == 6
    assert "tensorflow" not in sys.modules


def test_a_broken_download_starts_again(server: Server, tmp_path: Path) -> None:
    server.spoil = lambda handler, content: handler.answer(len(content), content[:9999])
    refused(server, tmp_path, "try again")
    server.spoil = None
    found = pcam.download(tmp_path)
    assert found["train"].x.read_bytes() == server.files[f"{X}.gz"]
    assert server.requests.count(f"{X}.gz") == 2
    assert server.requests.count(f"{Y}.gz") == 1


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, monkeypatch) -> None:
    def busy_once(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        server.spoil = None
        handler.send_error(503)

    monkeypatch.setattr(downloads, "RETRIES", 2)
    server.spoil = busy_once
    pcam.download(tmp_path)
    assert server.requests.count(f"{X}.gz") == 2


def reset(handler: http.server.BaseHTTPRequestHandler, _: bytes) -> None:
    handler.connection.close()


ANSWERS = {
    "other-content": (lambda h, c: h.answer(len(c), c[:-1] + b"?"), "SHA-256"),
    "shorter": (lambda h, c: h.answer(999, c[:999]), "SHA-256"),
    "longer": (lambda h, c: h.answer(len(c) + 9, c + b"123456789"), "SHA-256"),
    "page": (lambda h, c: h.answer(6, b"<html>"), "SHA-256"),
    "404": (lambda h, c: h.send_error(404), "404"),
    "503": (lambda h, c: h.send_error(503), "503"),
    "cut": (lambda h, c: h.answer(len(c), c[:9999]), "IncompleteRead(9999"),
    "reset": (reset, "Remote end closed connection"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_bad_answer(server: Server, tmp_path: Path, name: str) -> None:
    server.spoil, word = ANSWERS[name]
    refused(server, tmp_path, word, "by hand")


def test_a_signal_ends_a_download_at_once(server: Server, tmp_path: Path) -> None:
    stalled = threading.Event()

    def stall(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        if server.requests.count(f"{X}.gz") == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        stalled.wait(60)

    server.spoil = stall
    with signals.watch(), pytest.raises(signals.Preempted):
        pcam.download(tmp_path)
    stalled.set()
    assert not signals.requested()
    assert not list(tmp_path.glob("*.part"))


def test_a_server_that_is_down(server: Server, tmp_path: Path) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError) as error:
        pcam.download(tmp_path)
    one_line(error, server.url, "Connection refused", "--config.data.raw_dir")


def test_published_checksums() -> None:
    own = downloads.read_checksums(Path(pcam.__file__).with_name("checksums.tsv"))
    folder = Path(tfds.__file__).parent / "datasets" / "patch_camelyon"
    assert own == downloads.read_checksums(folder / "checksums.tsv")
    names = {f"{STEM}{name}_{kind}.h5.gz" for name in pcam.SPLITS.values() for kind in "xy"}
    assert {file.url for file in own.values()} == {f"{pcam.BASE_URL}{name}" for name in names}
