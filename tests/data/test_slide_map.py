import gzip

import h5py
import numpy as np
import pandas as pd
import pytest

from histo_jax.config import DataConfig
from histo_jax.data import groups, slide_map
from histo_jax.data.sources import pcam
from histo_jax.errors import UserError


def make_table(count: int = 6) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"{i:040x}" for i in range(count)], "slide": ""})


def write_map(folder, rows, header="id,wsi"):
    path = folder / "slides.csv"
    path.write_text("\n".join([header, *(f"{i:040x},{wsi}" for i, wsi in rows)]) + "\n")
    return DataConfig(slide_map=str(path))


def test_no_map_changes_nothing(tmp_path):
    table = make_table()
    assert slide_map.fill_in(table, DataConfig(), tmp_path) is table


def test_a_csv_names_the_slides(tmp_path):
    data = write_map(tmp_path, [(i, f"slide_{i % 2}") for i in range(8)])
    filled = slide_map.fill_in(make_table(), data, tmp_path)
    assert filled["slide"].tolist() == ["slide_0", "slide_1"] * 3


def test_a_partial_map_is_refused_or_leaves_the_rest_out(tmp_path, messages):
    data = write_map(tmp_path, [(i, "a") for i in range(4)])
    with pytest.raises(UserError, match=r"4 of 6 patches.*other 2.*on_damaged=skip"):
        slide_map.fill_in(make_table(), data, tmp_path)
    data.on_damaged = "skip"
    filled = slide_map.fill_in(make_table(), data, tmp_path)
    assert filled["slide"].tolist() == ["a"] * 4 + [""] * 2
    assert "other 2 are left out of training and validation" in "\n".join(messages)


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([(90, "a")], "id,wsi", "no patch"),
        ([(0, "a")], "id,slide", "header must name the columns id,wsi"),
        ([(0, "a"), (0, "b")], "id,wsi", "line 3: 1 duplicate ids"),
    ],
)
def test_a_wrong_map_is_one_line(tmp_path, rows, header, words):
    data = write_map(tmp_path, rows, header)
    with pytest.raises(UserError, match=words) as error:
        slide_map.fill_in(make_table(), data, tmp_path)
    assert data.slide_map in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "wsi;coord_x;id\n" + "".join(f"s{i % 2};9;{i:040X}.tif\n" for i in range(6)),
        "id,wsi\r\n" + "".join(f"{i:040x} ,{'Ss'[i % 3 % 2]}{i % 2} \r\n" for i in range(6)) * 2,
    ],
    ids=["more-columns", "duplicates"],
)
def test_other_forms_of_a_map(tmp_path, text):
    (tmp_path / "map.csv").write_bytes(text.encode())
    data = DataConfig(slide_map=str(tmp_path / "map.csv"))
    tables = groups.unify({"train": slide_map.fill_in(make_table(), data, tmp_path)})
    assert [name.lower() for name in tables["train"]["slide"]] == ["s0", "s1"] * 3
    assert tables["train"]["slide"].nunique() == 2


def test_slides_that_are_not_known_are_not_one_slide(tmp_path):
    data = write_map(tmp_path, enumerate(["a", "nan", "NA", "-", " Unknown", ""]))
    with pytest.raises(UserError, match="slides of 1 of 6 patches"):
        slide_map.fill_in(make_table(), data, tmp_path)
    data.on_damaged = "skip"
    assert slide_map.fill_in(make_table(), data, tmp_path)["slide"].tolist() == ["a"] + [""] * 5
    data = write_map(tmp_path, enumerate(["nan"] * 6))
    with pytest.raises(UserError, match="names no slide in its column wsi"):
        slide_map.fill_in(make_table(), data, tmp_path)


def test_contradictions_in_a_map_are_counted(tmp_path):
    data = write_map(tmp_path, [(i, f"s{k}") for k in range(2) for i in range(6)])
    with pytest.raises(UserError, match="line 8: 6 duplicate ids have different slides"):
        slide_map.fill_in(make_table(), data, tmp_path)


def test_one_slide_has_one_name_in_all_tables(messages):
    tables = {
        "train": pd.DataFrame({"slide": ["Slide_01", "b", "nan", "7"], "label": 0}),
        "validation": pd.DataFrame({"slide": ["slide_01 ", "B\u200b", "c", "07.0"]}),
        "test": pd.DataFrame({"slide": ["SLIDE_01", ""]}),
    }
    for _ in range(2):
        unified = groups.unify(tables)
    assert unified["train"].to_dict("list") == {
        "slide": ["Slide_01", "b", "", "7"],
        "label": [0] * 4,
    }
    assert unified["validation"]["slide"].tolist() == ["Slide_01", "b", "c", "7"]
    assert unified["test"]["slide"].tolist() == ["Slide_01", ""]
    assert messages == [
        "3 slides have several spellings, such as 'SLIDE_01', 'Slide_01', 'slide_01 '; each counts "
        "as one slide"
    ]


def test_a_missing_map_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.csv.*slide_map"):
        slide_map.fill_in(
            make_table(), DataConfig(slide_map=str(tmp_path / "nowhere.csv")), tmp_path
        )


def make_pcam(folder, images, wsi):
    for name in ("train", "valid"):
        stem = folder / f"camelyonpatch_level_2_split_{name}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = images
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = np.zeros((len(images), 1, 1, 1), np.uint8)
        if wsi is not None:
            pd.DataFrame({"coord_y": 0, "wsi": wsi}).to_csv(f"{stem}_meta.csv", index=False)


def make_folders(folder):
    """Makes a PatchCamelyon folder of four patches and a cache; returns both and the ids."""
    raw, cache = folder / "pcam", folder / "cache"
    raw.mkdir()
    cache.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    make_pcam(raw, images, ["s1", "s1", "s2", "s3"])
    ids = [example.id for example in pcam.read(pcam.find(raw)["train"])]
    return raw, cache, ids


def test_slides_are_found_by_pixels_in_patchcamelyon(tmp_path, monkeypatch):
    raw, cache, ids = make_folders(tmp_path)
    table = pd.DataFrame({"id": [ids[3], ids[0], ids[2]], "slide": ""})
    data = DataConfig(slide_map=str(raw))
    assert slide_map.fill_in(table, data, cache)["slide"].tolist() == ["s3", "s1", "s2"]
    named = table.assign(sha1=table["id"], id=["x", "y", "z"])  # of a source with other ids
    assert slide_map.fill_in(named, data, cache)["slide"].tolist() == ["s3", "s1", "s2"]
    # Hashing, which takes minutes, is done once.
    monkeypatch.setattr(pcam, "read", lambda _: pytest.fail("read again"))
    assert slide_map.fill_in(table, data, cache)["slide"].tolist() == ["s3", "s1", "s2"]


def test_patchcamelyon_without_meta_names_no_slides(tmp_path):
    images = np.zeros((2, 96, 96, 3), np.uint8)
    make_pcam(tmp_path, images, None)
    with pytest.raises(UserError, match=r"_meta\.csv"):
        slide_map.fill_in(make_table(), DataConfig(slide_map=str(tmp_path)), tmp_path)


def test_a_truncated_cache_is_replaced_and_one_that_cannot_be_written_is_in_memory(
    tmp_path, monkeypatch
):
    raw, cache, ids = make_folders(tmp_path)
    table, data = pd.DataFrame({"id": ids, "slide": ""}), DataConfig(slide_map=str(raw))
    complete = slide_map.fill_in(table, data, cache)
    (kept,) = cache.iterdir()
    kept.write_text("\n".join(kept.read_text().split("\n")[:3]) + "\n")
    pd.testing.assert_frame_equal(slide_map.fill_in(table, data, cache), complete)
    kept.unlink()

    # The records of another user: nothing can be written beside them.
    with gzip.open(raw / "camelyonpatch_level_2_split_train_y.h5.gz", "wb") as packed:
        packed.write((raw / "camelyonpatch_level_2_split_train_y.h5").read_bytes())
    (raw / "camelyonpatch_level_2_split_train_y.h5").unlink()

    def forbidden(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(slide_map.files, "write_text", forbidden)
    monkeypatch.setattr(slide_map.os, "access", lambda *_: False)
    unpacked = pcam.unpacked
    scratches = []
    monkeypatch.setattr(
        pcam, "unpacked", lambda its, scratch: scratches.append(scratch) or unpacked(its, scratch)
    )
    pd.testing.assert_frame_equal(slide_map.fill_in(table, data, cache), complete)
    assert scratches
    assert cache not in scratches
    monkeypatch.setattr(pcam, "read", lambda _: pytest.fail("read again"))
    pd.testing.assert_frame_equal(slide_map.fill_in(table, data, cache), complete)
    assert not list(cache.iterdir())


def test_ids_of_any_source_are_found(tmp_path):
    table = pd.DataFrame({"id": ["Patch_1", "b"], "slide": "", "sha1": ["1" * 40, "2" * 40]})
    (tmp_path / "map.csv").write_text("id,wsi\nPATCH_1.tif,s1\nb,s2\n")
    data = DataConfig(slide_map=str(tmp_path / "map.csv"))
    assert slide_map.fill_in(table, data, tmp_path)["slide"].tolist() == ["s1", "s2"]
