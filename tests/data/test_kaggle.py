import hashlib

import numpy as np
import pytest
from PIL import Image

from histo_jax.data import builder, kaggle
from histo_jax.errors import ExpectedError


@pytest.fixture
def raw(make_kaggle, tmp_path):
    return make_kaggle(tmp_path / "raw", train=20, test=3)


def flip_a_bit(path):
    pixels = np.asarray(Image.open(path)).copy()
    pixels[40, 50, 1] ^= 1
    Image.fromarray(pixels).save(path)


def test_every_file_proves_itself(raw):
    examples = list(kaggle.read(kaggle.list_files(raw, "train"), False, {}))
    assert len(examples) == 20
    for example in examples:
        assert hashlib.sha1(example.image.tobytes()).hexdigest() == example.id


def test_one_flipped_bit_is_caught(raw):
    files = kaggle.list_files(raw, "train")
    flip_a_bit(files[5][0])
    with pytest.raises(ExpectedError, match=f"{files[5][0].name}.*SHA-1.*on_damaged=skip"):
        list(kaggle.read(files, False, {}))


def test_one_error_names_all_damaged_files(raw):
    files = kaggle.list_files(raw, "train")
    flip_a_bit(files[2][0])
    files[11][0].write_bytes(b"no image")
    with pytest.raises(ExpectedError) as error:
        list(kaggle.read(files, False, {}))
    assert files[2][0].name in str(error.value)
    assert files[11][0].name in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_files_are_left_out_and_listed(raw, tiny_config, tmp_path):
    tiny_config.data.raw_dir, tiny_config.data.tfds_dir = str(raw), str(tmp_path / "records")
    tiny_config.data.on_damaged = "skip"
    path = kaggle.list_files(raw, "train")[5][0]
    flip_a_bit(path)
    prepared = builder.prepare(tiny_config)
    assert len(prepared.tables["train"]) == 19
    assert path.stem not in set(prepared.tables["train"]["id"])
    assert path.name in (prepared.directory / "prepared.json").read_text()
    tiny_config.data.on_damaged = "stop"
    with pytest.raises(ExpectedError, match="1 damaged patches were left out"):
        builder.prepare(tiny_config)


def test_a_damaged_test_image_always_stops(raw, tiny_config, tmp_path):
    tiny_config.data.raw_dir, tiny_config.data.tfds_dir = str(raw), str(tmp_path / "records")
    tiny_config.data.on_damaged = "skip"
    path = kaggle.list_files(raw, "test")[1][0]
    flip_a_bit(path)
    with pytest.raises(ExpectedError, match=path.name):
        builder.prepare(tiny_config)


def test_identity_holds_for_every_real_file(sample):
    raw = sample / "kaggle_sample"
    for split, count in (("train", 2500), ("test", 629)):
        files = kaggle.list_files(raw, split)
        assert sum(1 for _ in kaggle.read(files, False, {})) == count
