"""The command `explain`: attribution images of single patches."""

import copy
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import expit

from histo_jax import evaluation_files
from histo_jax.errors import UserError
from histo_jax.preparation import prepare
from histo_jax.report import explain, patches


def test_orange_raises_and_blue_lowers_the_logit():
    image = np.full((96, 96, 3), 200, np.uint8)
    adds = np.ones((96, 96), np.float32)
    adds[:, 48:] = -1
    red, _, blue = patches.draw_attribution(image, adds).astype(int).transpose(2, 0, 1)
    assert (red > blue + 100)[:, :40].all()
    assert (blue > red + 50)[:, 56:].all()


@pytest.fixture(scope="module")
def explained(config, run):
    return explain(config, run)


def test_explain_writes_the_patches_of_the_galleries(config, run, explained):
    table = evaluation_files.read(run, "validation")
    rows = np.unique(np.concatenate(list(patches.galleries(table, config.seed).values())))
    assert sorted(explained["id"]) == sorted(table["id"].iloc[rows])
    names = {path.stem for path in (run / "explain").glob("*.png")}
    assert names == set(explained["id"])
    merged = explained.merge(table, on="id")
    np.testing.assert_allclose(merged["probability"], expit(merged["logit"]), rtol=1e-4)
    written = pd.read_csv(run / "explain" / "patches.csv", keep_default_na=False)
    assert written["id"].tolist() == explained["id"].tolist()


def test_an_image_shows_the_patch_beside_its_attribution(config, run, explained):
    prepared = prepare(config)
    row = prepared.tables["train"]["id"].tolist().index(explained["id"][0])
    image = prepared.source("train").__getitems__([row])[0]["image"]
    sheet = np.asarray(Image.open(run / "explain" / f"{explained['id'][0]}.png"))
    assert sheet.shape == (384, 2 * 384 + 4, 3)
    left, right = sheet[::4, :384:4], sheet[::4, 388::4]
    outside = np.ones((96, 96), bool)
    # The frame, whose outer line is one pixel of the fourfold enlargement wide.
    outside[31:65, 31:65] = False
    np.testing.assert_array_equal(left[outside], image[outside])
    assert (right != image).any()


def test_explain_accepts_ids_of_any_split(config, run):
    tables = prepare(config).tables
    ids = [tables["train"]["id"][3], tables["test"]["id"][2]]
    table = explain_ids(config, run, f"{ids[0].upper()}.tif,{ids[1]}")
    assert sorted(table["id"]) == sorted(ids)
    with pytest.raises(UserError, match=r"config\.explain\.ids: no patch .* has the id 'abc'"):
        explain_ids(config, run, f"{ids[0]},abc")


@pytest.fixture
def explained_run(config, run, explained, tmp_path):
    """A copy of the explained run, with a file of the user."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "explain" / "mine.png").write_bytes(b"my own image")
    return tmp_path / "run"


def read_rows(run):
    rows = pd.read_csv(run / "explain" / "patches.csv", keep_default_na=False).set_index("id")
    names = {path.stem for path in (run / "explain").glob("*.png")} - {"mine"}
    assert names == set(rows.index)
    return rows


def test_images_of_one_checkpoint_accumulate(config, explained, explained_run):
    before = read_rows(explained_run)
    first, other = explained["id"][0], prepare(config).tables["test"]["id"][7]
    added = explain_ids(config, explained_run, f"{first},{other}")
    rows = read_rows(explained_run)
    assert rows.index.is_unique
    assert set(rows.index) == {*before.index, other}
    assert set(added["id"]) == {first, other}
    assert rows["checkpoint"].nunique() == 1
    unchanged = before.index.drop(first)
    pd.testing.assert_frame_equal(rows.loc[unchanged], before.loc[unchanged])
    # The row of a deleted image is removed.
    (explained_run / "explain" / f"{other}.png").unlink()
    explain_ids(config, explained_run, first)
    assert set(read_rows(explained_run).index) == set(before.index)


def with_other_weights(rows):
    return rows.assign(checkpoint=rows["checkpoint"].str[:-1] + "x")


def without_checkpoint(rows):
    return rows.drop(columns=["tta", "checkpoint"]).iloc[:3]


@pytest.mark.parametrize("older", [with_other_weights, without_checkpoint, None])
def test_images_of_another_checkpoint_are_removed(config, explained, explained_run, older):
    path = explained_run / "explain" / "patches.csv"
    if older:
        older(pd.read_csv(path)).to_csv(path, index=False)
    else:
        path.write_bytes(b"\xff,corrupt")
    explain_ids(config, explained_run, explained["id"][1])
    assert read_rows(explained_run).index.tolist() == [explained["id"][1]]
    assert (explained_run / "explain" / "mine.png").read_bytes() == b"my own image"


def explain_ids(config, run, ids):
    config = copy.deepcopy(config)
    config.explain.ids = ids
    return explain(config, run)
