import errno
import hashlib
import logging
import os
import pathlib
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histo_jax
from histo_jax.data.sources import kaggle
from histo_jax.errors import UserError


@pytest.fixture
def raw(make_kaggle, tmp_path):
    return make_kaggle(tmp_path / "raw", train=20, test=3)


def flip_a_bit(path):
    pixels = np.asarray(Image.open(path)).copy()
    pixels[40, 50, 1] ^= 1
    Image.fromarray(pixels).save(path)


def test_the_id_is_the_sha1_of_the_pixels(raw):
    examples = list(kaggle.read(kaggle.list_files(raw, "train"), False, {}))
    assert len(examples) == 20
    for example in examples:
        assert hashlib.sha1(example.image.tobytes()).hexdigest() == example.id


def test_one_flipped_bit_is_detected(raw):
    files = kaggle.list_files(raw, "train")
    flip_a_bit(files[5][0])
    with pytest.raises(UserError, match=f"{files[5][0].name}.*SHA-1.*on_damaged=skip"):
        list(kaggle.read(files, False, {}))


def test_one_error_names_all_corrupt_files(raw):
    files = kaggle.list_files(raw, "train")
    flip_a_bit(files[2][0])
    files[11][0].write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        list(kaggle.read(files, False, {}))
    assert files[2][0].name in str(error.value)
    assert files[11][0].name in str(error.value)
    assert "\n" not in str(error.value)


def test_corrupt_files_are_left_out_and_listed(raw, tiny_config, tmp_path):
    tiny_config.data.raw_dir, tiny_config.data.tfds_dir = str(raw), str(tmp_path / "records")
    tiny_config.data.on_damaged = "skip"
    path = kaggle.list_files(raw, "train")[5][0]
    flip_a_bit(path)
    prepared = histo_jax.prepare(tiny_config)
    assert len(prepared.tables["train"]) == 19
    assert path.stem not in set(prepared.tables["train"]["id"])
    assert path.name in (prepared.directory / "prepared.json").read_text()
    tiny_config.data.on_damaged = "stop"
    with pytest.raises(UserError, match="1 corrupt patches were left out"):
        histo_jax.prepare(tiny_config)


def test_restored_files_are_logged(raw, tiny_config, tmp_path, caplog):
    tiny_config.data.raw_dir, tiny_config.data.tfds_dir = str(raw), str(tmp_path / "records")
    tiny_config.data.on_damaged = "skip"
    path = kaggle.list_files(raw, "train")[5][0]
    content = path.read_bytes()
    path.write_bytes(b"")
    logging.getLogger("histo_jax").addHandler(caplog.handler)
    for restored in (b"no image", content):
        histo_jax.prepare(tiny_config)
        assert "are intact now" not in caplog.text
        path.write_bytes(restored)
    histo_jax.prepare(tiny_config)
    logging.getLogger("histo_jax").removeHandler(caplog.handler)
    assert "1 corrupt patches that were left out are intact now" in caplog.text


def test_data_whose_files_are_all_corrupt_is_refused(raw):
    files = kaggle.list_files(raw, "train")
    for path, _ in files:
        Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(path)
    with pytest.raises(UserError, match=r"^20 of 20 files are corrupt: .*lossy"):
        list(kaggle.read(files, True, {}))


# --- a file that the system cannot read is not corrupt --------------------------------------------


def folder_for_file(path):
    path.unlink()
    path.mkdir()


def link(target):
    def spoil(path):
        path.unlink()
        path.symlink_to(target)

    return spoil


REFUSED = {
    "folder": (folder_for_file, errno.EISDIR, "replace the folder"),
    "dangling": (link("/nowhere/at/all"), errno.ENOENT, "restore it"),
    "loop": (lambda path: link(path.name)(path), errno.ELOOP, "restore it"),
    "permission": (None, errno.EACCES, "permissions"),
    "disk": (None, errno.EIO, "disk or mount"),
    "stale": (None, errno.ESTALE, "disk or mount"),
    "limit": (None, errno.EMFILE, "ulimit -n"),
    "busy": (None, errno.EBUSY, "close it"),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_the_system_cannot_read_is_not_corrupt(raw, monkeypatch, name, skip):
    spoil, number, fix = REFUSED[name]
    files = kaggle.list_files(raw, "train")
    path, real = files[3][0], pathlib.Path.open

    def fail(self, *args, **kwargs):
        if self == path:
            raise OSError(number, os.strerror(number))  # as `read`, it names no file
        return real(self, *args, **kwargs)

    spoil(path) if spoil else monkeypatch.setattr(pathlib.Path, "open", fail)
    corrupt = {}
    with pytest.raises(UserError) as error:
        list(kaggle.read(files, skip, corrupt))
    assert str(error.value).startswith(f"{path} cannot be read ({os.strerror(number)}): ")
    assert fix in str(error.value)
    assert not corrupt


def test_one_line_counts_files_that_the_system_cannot_read(raw):
    files = kaggle.list_files(raw, "train")
    for path, _ in files[:12]:
        folder_for_file(path)
    with pytest.raises(UserError, match=f"^{files[0][0]} cannot .*, nor can 11 more of 20: "):
        list(kaggle.read(files, True, {}))


def test_a_bug_is_not_a_corrupt_file(raw, monkeypatch):
    files = kaggle.list_files(raw, "train")

    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(kaggle.Image, "open", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        list(kaggle.read(files, True, {}))


def test_too_little_memory_is_not_a_corrupt_file(raw, monkeypatch):
    files = kaggle.list_files(raw, "train")

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(kaggle.Image, "open", fail)
    with pytest.raises(UserError, match=r"cannot be read \(Cannot allocate memory\)"):
        list(kaggle.read(files, True, {}))


def test_a_corrupt_test_image_is_always_an_error(raw, tiny_config, tmp_path):
    tiny_config.data.raw_dir, tiny_config.data.tfds_dir = str(raw), str(tmp_path / "records")
    tiny_config.data.on_damaged = "skip"
    path = kaggle.list_files(raw, "test")[1][0]
    flip_a_bit(path)
    with pytest.raises(UserError, match=path.name):
        histo_jax.prepare(tiny_config)


# --- CSVs ---------------------------------------------------------------------------------------


def rewrite(raw, change, name="train_labels.csv"):
    table = pd.read_csv(raw / name)
    change(table).to_csv(raw / name, index=False)


def keep(change):
    return lambda raw: rewrite(raw, change)


EQUIVALENT = {
    "floats": keep(lambda t: t.assign(label=t["label"].astype(float))),
    "booleans": keep(lambda t: t.assign(label=t["label"].astype(bool))),
    "file-names": keep(lambda t: t.assign(id=t["id"].str.upper() + ".TIF")),
    "more-columns": keep(lambda t: t.assign(fold=1, wsi="a,b")[["fold", "label", "wsi", "id"]]),
    "other-order": keep(lambda t: t[::-1]),
    "windows": lambda raw: rewrite_text(raw, lambda old: old.replace("\n", "\r\n")),
    "filled-in": lambda raw: rewrite(raw, lambda t: t.assign(label=0.3), "sample_submission.csv"),
    "ids-alone": lambda raw: rewrite(raw, lambda t: t[["id"]], "sample_submission.csv"),
    "copy": lambda raw: [os.utime(path, (1, 1)) for path in raw.rglob("*")],
    "packed": lambda raw: [
        Image.open(path).save(path, compression="tiff_lzw") for path in raw.glob("train/*.tif")
    ],
    "mac": lambda raw: [(raw / "train" / name).write_text("") for name in ("._a.tif", ".DS_Store")],
    "more-files": lambda raw: shutil.copy(next(raw.glob("train/*")), raw / "train" / "copy.tif"),
    "dangling": lambda raw: (raw / "train" / f"{'f' * 40}.tif").symlink_to("/nowhere/at/all"),
    "folder": lambda raw: (raw / "train" / "thumbnails.tif").mkdir(),
}


def rewrite_text(raw, change):
    path = raw / "train_labels.csv"
    path.write_bytes(change(path.read_text()).encode())


@pytest.mark.parametrize("name", EQUIVALENT)
def test_equivalent_tables_have_the_same_fingerprint(raw, name):
    before, files = kaggle.fingerprint(raw), kaggle.list_files(raw, "train")
    EQUIVALENT[name](raw)
    assert kaggle.fingerprint(raw) == before
    assert sorted(kaggle.list_files(raw, "train")) == sorted(files)
    assert len(list(kaggle.read(kaggle.list_files(raw, "train"), False, {}))) == 20
    assert len(kaggle.list_files(raw, "test")) == 3


@pytest.mark.parametrize(
    "change", [lambda t: t[1:], lambda t: t.assign(label=1 - t["label"])], ids=["row", "labels"]
)
def test_other_rows_or_labels_have_another_fingerprint(raw, change):
    before = kaggle.fingerprint(raw)
    rewrite(raw, change)
    assert kaggle.fingerprint(raw) != before


WRONG_ROWS = {
    "ids": (lambda t: t.assign(id=range(20)), r"line 2: id '0' is not 40 hex .*\(20 of 20 "),
    "labels": (lambda t: t.assign(label=t["label"] + 1), r"line 3: label '2' .* \(10 of 20 rows"),
    "duplicates": (lambda t: pd.concat([t, t[:4]]), "line 22: duplicate id .*4 of 24.*; remove"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_wrong_rows_are_counted(raw, name):
    change, words = WRONG_ROWS[name]
    rewrite(raw, change)
    with pytest.raises(UserError, match=words):
        kaggle.list_files(raw, "train")


def move(folder, suffix=".tif", count=20):
    def spoil(raw):
        for path in sorted(raw.glob("train/*.tif"))[:count]:
            target = raw / folder / f"{path.stem}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)

    return spoil


def zipped(raw):
    for path in raw.glob("train/*.tif"):
        path.unlink()
    (raw / "train.zip").touch()


MISPLACED = {
    "too-deep": (move("train/train"), "20 of 20 files", "/train/train/", "move"),
    "deeper": (move("train/a/b"), "20 of 20 files", "/train/a/b/", "move"),
    "capitals": (move("train", ".TIF"), "20 of 20 files", ".TIF", "rename"),
    "tiff": (move("train", ".tiff"), "20 of 20 files", ".tiff", "rename"),
    "png": (move("train", ".png"), "20 of 20 files", ".png", "convert"),
    "above": (move("."), "train is empty", "20 files", "20 of them are elsewhere", "move"),
    "other-split": (move("test", count=5), "5 of 20 files", "/test/", "move"),
    "gone": (move("..", count=2), "2 of 20 files", "restore them"),
    "zip": (zipped, "train is empty", "20 files", "unpack train.zip"),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_missing_files_are_counted_and_searched_for(raw, name):
    spoil, *words = MISPLACED[name]
    spoil(raw)
    with pytest.raises(UserError) as error:
        kaggle.list_files(raw, "train")
    assert not [word for word in words if word not in str(error.value)], str(error.value)
    assert "remove the row;" not in str(error.value)


def test_a_folder_too_high_or_too_low_is_named(raw):
    for wrong, right in ((raw.parent, raw), (raw / "train", raw)):
        with pytest.raises(UserError, match=f"are missing; {right} has all files: give this "):
            kaggle.list_files(wrong, "train")
    (raw / "train").rename(raw / "Train")
    with pytest.raises(UserError, match="rename Train to train"):
        kaggle.list_files(raw, "train")


def test_names_that_are_not_text_can_be_read(raw):
    odd = raw.rename(os.fsdecode(os.fsencode(raw) + b"\xff [1] %20"))
    assert len(list(kaggle.read(kaggle.list_files(odd, "train"), False, {}))) == 20
    assert kaggle.fingerprint(odd)
