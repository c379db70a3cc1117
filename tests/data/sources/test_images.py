"""Own images: tables, class folders, conversions, faults."""

import errno
import hashlib
import os
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histo_jax
from histo_jax.config import Config, DataConfig
from histo_jax.data import image_tables, records, source_adapter
from histo_jax.data.image_files import ImageFile, read_image
from histo_jax.data.sources import images, kaggle
from histo_jax.data.sources.images import Images
from histo_jax.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (32, 32, 3), np.uint8)
PATCH = Image.fromarray(PIXELS)


def draw(path, seed, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def raw(tmp_path):
    """Eight images a0.png to a7.png and a table of them."""
    folder = tmp_path / "raw"
    for number in range(8):
        draw(folder / "tiles" / f"a{number}.png", number)
    write(folder)
    return folder


def write(folder, change=lambda text: text, name="images.csv"):
    rows = [f"tiles/a{k}.png,{k % 2},s{k // 2},p{k // 4}" for k in range(8)]
    text = change("\n".join(["path,label,slide,patient", *rows, ""]))
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def read(raw, **settings):
    source = Images(DataConfig(source="images", raw_dir=str(raw), **settings))
    return {split: list(examples) for split, examples in source.splits().items()}


# --- tables ---------------------------------------------------------------------------------------

HABITS = {
    "byte-order-mark": lambda t: "\ufeff" + t,
    "windows": lambda t: t.replace("\n", "\r\n"),
    "semicolons": lambda t: t.replace(",", ";"),
    "delimiter-line": lambda t: "\ufeffsep=;\r\n" + t.replace(",", ";"),
    "tabs": lambda t: t.replace(",", "\t"),
    "utf-16": lambda t: t.encode("utf-16"),
    "quotes": lambda t: "\n".join(f'"{line.replace(",", chr(34) + "," + chr(34))}"'
                                  for line in t.splitlines()),
    "index": lambda t: "\n".join(f"{k - 1 if k else ''},{line}"
                                 for k, line in enumerate(t.splitlines())),
    "floats": lambda t: t.replace(",0,", ",0.0,").replace(",1,", ",1.0,"),
    "booleans": lambda t: t.replace(",0,", ",FALSE,").replace(",1,", ",TRUE,"),
    "spaces": lambda t: t.replace(",", " , ").replace("\n", "  \n"),
    "backslashes": lambda t: t.replace("/", "\\"),
    "names": lambda t: t.replace("path,label,slide,patient", "File Name,Class,WSI,Case-ID"),
    "more-columns": lambda t: "\n".join(line + (",x" if k else ",notes")
                                        for k, line in enumerate(t.splitlines())),
    "empty-lines": lambda t: t.replace("\n", "\n\n,,,\n"),
    "dots": lambda t: t.replace("tiles/", "./tiles/../tiles/"),
}  # fmt: skip


@pytest.mark.parametrize("name", HABITS)
def test_habits_of_spreadsheets(raw, name):
    before, source = read(raw), Images(DataConfig(raw_dir=str(raw)))
    write(raw, HABITS[name])
    after = read(raw)
    assert len(after["train"]) == 8
    for one, other in zip(before["train"], after["train"], strict=True):
        assert one._replace(image=None) == other._replace(image=None)
    assert Images(DataConfig(raw_dir=str(raw))).fingerprint() == source.fingerprint()


def test_tsv_parquet_and_absolute_paths(raw, tmp_path):
    before = [example.id for example in read(raw)["train"]]
    table = pd.read_csv(raw / "images.csv")
    table["path"] = [str(raw / path) for path in table["path"]]
    table.to_csv(tmp_path / "list.tsv", sep="\t", index=False)
    table.to_parquet(tmp_path / "list.parquet")
    for name in ("list.tsv", "list.parquet"):
        examples = read(raw, table=str(tmp_path / name))["train"]
        assert [example.id for example in examples] == before
        assert {example.slide for example in examples} == {"s0", "s1", "s2", "s3"}
        assert examples[0].path == "tiles/a0.png"


def test_used_columns_are_logged_once_in_a_command(raw, log):
    write(raw, HABITS["names"])
    read(raw)
    (record,) = log.records
    assert "path (column 'file name'), label (column 'class')" in record.getMessage()
    assert record.is_once


def test_paths_of_the_table_itself(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "tmp.*/images.csv: no such table; .* current folder: --config.data.table=.*raw/images.csv"
    )
    with pytest.raises(UserError, match=words):
        read(raw, table="images.csv")
    (raw / "bad.parquet").write_bytes(b"PAR1xxxx")
    with pytest.raises(UserError, match=r"corrupt.*[^.]\): write it again"):
        read(raw, table=str(raw / "bad.parquet"))
    with pytest.raises(UserError, match=r"images.csv: not a folder; .*data.table to a table"):
        source_adapter.check_layout(DataConfig(source="images", raw_dir=str(raw / "images.csv")))


def test_splits_and_unlabelled_test_rows(raw):
    write(
        raw,
        lambda _: (
            "img,y,fold\ntiles/a0.png,1,Train\ntiles/a1.png,0,training\n"
            "tiles/a2.png,1,val\ntiles/a3.png,0,VALID\ntiles/a4.png,,test\ntiles/a5.png,nan,test\n"
            "tiles/a6.png,1,test\n"
        ),
    )
    splits = read(raw)
    assert {split: [e.label for e in part] for split, part in splits.items()} == {
        "train": [1, 0], "validation": [1, 0], "test": [-1, -1, 1],
    }  # fmt: skip


BAD_TABLES = {
    "no-path": (lambda t: t.replace("path", "where"), "no column with the images' paths"),
    "twice": (lambda t: t.replace("slide", "path"), "the column path twice"),
    "no-label": (lambda t: t.replace(",label", ",diagnosis"), r"line 2: the label is missing .*8 "),
    "duplicate": (lambda t: t + "tiles//a3.png,1,s,p\n", "line 10: duplicate path 'tiles//a3.png'"),
    "outside": (lambda t: t.replace("tiles/a4", "../raw/tiles/a4"), "line 6: .*leads out of"),
    "missing": (lambda t: t.replace("a6.png", "b6.png"), "line 8: .*b6.png' is missing"),
    "missing-twice": (lambda t: t.replace("a6", "b6").replace("a7", "b7"), r"\(2 of 8 rows"),
    "three": (lambda t: t.replace(",1,s0", ",2,s0"), "3 classes, '0', '1', '2'; two are supported"),
    "words": (lambda t: t.replace(",1,", ",tumor,"), "'0', 'tumor'.*data.positive=CLASS"),
    "one-class": (lambda t: t.replace(",1,", ",0,"), "all 8 training images are of one class"),
    "empty": (lambda _: "path,label\n", "lists no images"),
    "no-row-path": (lambda t: t.replace("tiles/a2.png", ""), "line 4: the path is missing"),
    "split": (lambda _: "path,label,fold\ntiles/a0.png,1,0\n", "line 2: split '0' must be train"),
    "zero": (lambda t: t.replace("tiles/a2", "tiles/a\0"), "line 4"),
    "split-blank": (lambda _: "path,label,fold\na.png,1,test\nb.png,1,\n", "line 3: the split is"),
    "label-na": (lambda t: t.replace(",1,", ",NA,"), "line 3: label 'NA' means that it is"),
    "address": (lambda t: t.replace("tiles/a4", "https://x/a4"), "line 6: .* is a URL; download"),
    "windows": (lambda t: t.replace("tiles/a4", r"C:\a4"), r"line 6: 'C:.* absolute Windows path"),
    "no-file": (lambda t: t.replace("/a6.png", ""), "line 8: .*tiles' is not a file; remove"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(raw, name):
    change, words = BAD_TABLES[name]
    write(raw, change)
    with pytest.raises(UserError, match=words) as error:
        read(raw)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("column", ["patient", "slide"])
def test_a_leak_of_given_splits_is_refused(raw, column, messages):
    rows = "".join(f"tiles/a{k}.png,{k % 2},{'train' if k < 6 else 'test'},N {k}\n"
                   for k in range(8)).replace("N 7", "n  1")  # fmt: skip
    write(raw, lambda _: f"path,label,split,{column}\n{rows}")
    with pytest.raises(
        UserError, match=f"line 9: {column} 'n 1' is in the train and the test split: cor"
    ):
        read(raw)
    assert len(read(raw, allow_leak=True)["test"]) == 2
    assert any("LEAK" in line for line in messages)


def test_the_positive_class(raw):
    with pytest.raises(UserError, match=r"'tumor' is no class .* labels are 0 and 1: leave it out"):
        read(raw, positive="tumor")
    write(raw, lambda t: t.replace(",1,", ",Tumor,").replace(",0,", ",none,"))
    labels = [example.label for example in read(raw, positive="tumor")["train"]]
    assert labels == [0, 1] * 4
    with pytest.raises(UserError, match=r"positive = 'cancer' is no class .*'Tumor', 'none'"):
        read(raw, positive="cancer")
    write(raw, lambda t: t.replace(",1,", ",NA,"))
    assert [example.label for example in read(raw, positive="na")["train"]] == labels


# --- folders --------------------------------------------------------------------------------------


def test_class_folders_and_debris(tmp_path):
    for number, name in enumerate(
        ("train/tumor/a.png", "train/normal/x/b.PNG", "val/tumor/c.png", "Test/d.png")
    ):
        draw(tmp_path / name, number)
    for name in ("Thumbs.db", "._a.png", ".DS_Store", "desktop.ini", "notes.txt"):
        (tmp_path / "train/tumor" / name).write_bytes(b"x")
    (tmp_path / "train/.hidden").mkdir()
    draw(tmp_path / "train/.hidden/e.png", 9)
    shutil.copytree(tmp_path / "train/tumor", tmp_path / "__MACOSX")
    assert Images.recognizes(tmp_path)
    splits = read(tmp_path, positive="tumor")
    found = {split: [(e.path, e.label) for e in part] for split, part in splits.items()}
    assert found == {
        "train": [("train/normal/x/b.PNG", 0), ("train/tumor/a.png", 1)],
        "validation": [("val/tumor/c.png", 1)],
        "test": [("Test/d.png", -1)],
    }


def test_links_to_folders_and_images_beside_the_splits(tmp_path, messages, monkeypatch):
    for number, name in enumerate(
        ("train/NA/0.png", "train/tumor/1.png", "more/2.png", "3.png", "notes/x")
    ):
        draw(tmp_path / name, number) if number < 4 else (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train/tumor/loop").symlink_to(tmp_path)
    (tmp_path / "train/NA/twin").symlink_to("../tumor")
    (tmp_path / "train/tumor/twin").symlink_to("../NA")
    rows = image_tables.list_images(tmp_path).rows
    assert rows[["path", "label"]].to_numpy().tolist() == [
        ["train/NA/0.png", "NA"], ["train/NA/twin/1.png", "NA"],
        ["train/tumor/1.png", "tumor"], ["train/tumor/twin/0.png", "tumor"],
    ]  # fmt: skip
    assert any(line.endswith("splits are ignored: 3.png, more") for line in messages)
    for name in ("NA", "tumor"):
        (tmp_path / "train" / name / "twin").unlink()
    assert [e.label for e in read(tmp_path, positive="tumor")["train"]] == [0, 1]
    (tmp_path / "train/NA/self.png").symlink_to("self.png")
    with pytest.raises(UserError, match=r"self.png' is missing; .* remove the link"):
        read(tmp_path, positive="tumor")

    def scandir(path, real=os.scandir):
        if str(path).endswith("NA"):
            raise PermissionError(errno.EACCES, "denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"train/NA cannot be read .*: change its permissions"):
        read(tmp_path, positive="tumor")


def test_folders_without_splits(tmp_path):
    for number in range(4):
        draw(tmp_path / str(number % 2) / f"{number}.png", number)
    assert [e.label for e in read(tmp_path)["train"]] == [0, 0, 1, 1]
    for folder, words in (("1", "of one class"), ("0", "holds no images")):
        shutil.rmtree(tmp_path / folder)
        with pytest.raises(UserError, match=words):
            read(tmp_path)


def test_a_folder_without_the_class_and_a_name_that_is_not_utf8_are_refused(tmp_path):
    draw(tmp_path / "batch" / "0.png", 0)
    with pytest.raises(UserError, match=r"'tumour' is no class of .*'batch'"):
        read(tmp_path, positive="tumour")
    try:
        draw(tmp_path / "batch" / os.fsdecode(b"\xff.png"), 1)
    except OSError:  # macOS
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(UserError, match=r"\\xff.png: the name is not UTF-8"):
        read(tmp_path, positive="batch")


def test_kaggle_s_folder_is_not_one_of_images(kaggle_dir):
    assert not Images.recognizes(kaggle_dir)


# --- files ----------------------------------------------------------------------------------------


def transparent():
    image = PATCH.convert("RGBA")
    image.putpixel((3, 3), (0, 0, 0, 9))
    return image


FILES = {
    "grey.png": (PATCH.convert("L"), {}, "greyscale"),
    "palette.gif": (PATCH.quantize(16), {}, "palette"),
    "opaque.png": (PATCH.convert("RGBA"), {}, "opaque RGBA"),
    "lossless.webp": (PATCH, {"lossless": True}, None),
    "plain.bmp": (PATCH, {}, None),
    "cmyk.jpg": (PATCH.convert("CMYK"), {}, "is CMYK, not 8-bit RGB"),
    "deep.png": (Image.fromarray(np.zeros((32, 32), np.uint16)), {}, "16 bits a channel"),
    "clear.png": (transparent(), {}, "is transparent"),
    "key.png": (PATCH, {"transparency": tuple(map(int, PIXELS[0, 0]))}, "is transparent"),
    "moves.png": (PATCH, {"save_all": True, "append_images": [PATCH.rotate(90)]}, "is animated"),
    "pages.tif": (PATCH, {"save_all": True, "append_images": [PATCH]}, "is multi-page"),
    "wide.png": (PATCH.crop((0, 0, 32, 20)), {}, "is 32x20 pixels"),
    "bomb.png": (Image.new("1", (14_000, 14_000)), {}, "is .*196000000 pixels"),
}


@pytest.mark.parametrize("name", FILES)
def test_conversions(tmp_path, name):
    image, options, words = FILES[name]
    image.save(tmp_path / name, **options)
    result = read_image(tmp_path / name)
    if isinstance(result, ImageFile):
        assert result.conversions == ((words,) if words else ())
        assert result.pixels.tolist() == np.asarray(image.convert("RGB")).tolist()
    else:
        assert words
        assert re.search(words, result), result


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_the_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[274] = 6
    plain, turned = tmp_path / f"plain{suffix}", tmp_path / f"turned{suffix}"
    PATCH.save(plain)
    PATCH.save(turned, exif=exif)
    expected = np.rot90(read_image(plain).pixels, -1)
    assert (read_image(turned).pixels == expected).all()


@pytest.mark.parametrize(("before", "after"), [(96, 32), (50, 32), (100, 96)])
def test_reduced_pixels_are_means_over_areas(tmp_path, before, after):
    pixels = RNG.integers(0, 256, (before, before + 9, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    edges, row = np.arange(after + 1) * before / after, np.arange(before)
    cover = np.minimum(edges[1:, None], row + 1) - np.maximum(edges[:-1, None], row)
    cover = np.clip(cover, 0, None) * after / before
    square = pixels[:, 4 : 4 + before].astype(float)
    expected = np.einsum("ij,jkc,lk->ilc", cover, square, cover, optimize=True)
    result = read_image(tmp_path / "a.png", after)
    assert np.abs(result.pixels - expected).max() < 0.501
    assert result.conversions == ("cropped to the square in their centre", "reduced")


def test_sizes(raw, tmp_path, monkeypatch, messages):
    draw(raw / "tiles" / "a3.png", 3, size=64)
    with pytest.raises(UserError, match=r"a3.png is 64x64 pixels, most are 32x32.*image_size"):
        read(raw)
    assert len(read(raw, on_damaged="skip")["train"]) == 7
    assert {e.image.shape for e in read(raw, image_size=64)["train"]} == {(64, 64, 3)}
    Image.new("1", (7000, 7000)).save(raw / "tiles" / "a3.png")
    with pytest.raises(UserError, match=r"a3.png is .* than 33,554,432: replace .* them, or leave"):
        read(raw, image_size=32)
    (raw / "tiles" / "a0.png").write_bytes(b"x")
    monkeypatch.setattr(images, "_SAMPLE", 1)  # the size is that of the first readable file
    assert len(read(raw, on_damaged="skip")["train"]) == 6
    for number in range(8):
        draw(raw / "tiles" / f"a{number}.png", number, size=100)
    data = DataConfig(source="images", raw_dir=str(raw), tfds_dir=str(tmp_path / "tfds"))
    with pytest.raises(UserError, match=r"raw/images.csv: most .* 100x100 pixels.*image_size=96"):
        records.prepare(data, 0)
    assert not any("preparing" in line for line in messages)
    assert {e.image.shape for e in read(raw, image_size=96)["train"]} == {(96, 96, 3)}


def test_repeated_training_images_are_left_out(raw, messages):
    shutil.copy(raw / "tiles/a0.png", raw / "tiles/a2.png")
    assert len(read(raw)["train"]) == 7
    assert any("1 training images have the same pixels" in line for line in messages)


def test_training_images_with_the_same_pixels_and_different_labels(raw, tmp_path, messages):
    for name in ("a1.png", "a2.png"):
        shutil.copy(raw / "tiles/a0.png", raw / "tiles" / name)
    words = "a0.png and .*a1.png have the same pixels and different labels .3 training images"
    with pytest.raises(UserError, match=words):
        read(raw)
    data = DataConfig(
        source="images", raw_dir=str(raw), tfds_dir=str(tmp_path / "tfds"), on_damaged="skip"
    )
    prepared = records.prepare(data, 0)
    assert prepared.tables["train"]["path"].tolist() == [f"tiles/a{k}.png" for k in range(3, 8)]
    assert sum("left out: " in line and "another label" in line for line in messages) == 3
    records.prepare(data, 0)
    assert not any("intact now" in line for line in messages)
    data.on_damaged = "stop"
    with pytest.raises(UserError, match="3 corrupt patches were left out"):
        records.prepare(data, 0)


def test_fingerprint_and_times(raw):
    def state():
        source = Images(DataConfig(raw_dir=str(raw)))
        return source.fingerprint(), source.modified()

    before = state()
    os.utime(raw / "tiles/a0.png", (1, 1))
    assert state()[0] == before[0]
    assert state()[1] != before[1]
    write(raw, lambda t: t.replace("s3", "s4"))
    assert state()[0] != before[0]


def test_a_large_folder_with_one_percent_of_every_fault(tmp_path):
    kinds = {
        "cmyk.jpg": PATCH.convert("CMYK"),
        "clear.png": transparent(),
        "wide.png": PATCH.crop((0, 0, 32, 20)),
        "deep.png": Image.fromarray(np.zeros((32, 32), np.uint16)),
        "other.png": PATCH.resize((64, 64)),
    }
    contents = {}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        contents[name] = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    plain = []
    for image in (PATCH, PATCH.rotate(90)):
        image.save(tmp_path / "a.png")
        plain.append((tmp_path / "a.png").read_bytes())
    (tmp_path / "a.png").unlink()
    contents |= {"cut.png": plain[0][:900], "empty.png": b"", "text.png": b"no image"}
    for number in range(3000):
        name = f"{number:04}.png"
        content = list(contents.items())[number % 100] if number % 100 < len(contents) else None
        label = number // 100 % 2
        path = tmp_path / "raw" / str(label) / (name if not content else name + content[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[1] if content else plain[label])
    raw = tmp_path / "raw"
    with pytest.raises(UserError) as error:
        read(raw)
    assert str(error.value).startswith("240 of 3,000 train images cannot be used: ")
    assert str(error.value).count("(30 files are like this)") == len(contents)
    assert str(error.value).isprintable()
    source = Images(DataConfig(raw_dir=str(raw), on_damaged="skip"))
    assert len(list(source.splits()["train"])) == 2  # the intact ones of a class are equal
    assert len(source.corrupt) == 240
    fixed = next(path for path in source.corrupt if path.endswith("empty.png"))
    assert source.intact(source.corrupt) != [fixed]
    PATCH.save(fixed)
    assert fixed in source.intact(source.corrupt)


# --- with the other sources -----------------------------------------------------------------------


def test_same_training_as_kaggle(make_tiny_config, kaggle_dir, tmp_path, unregister):
    runpy.run_path(str(Path(__file__).parents[2] / "tiny_network.py"))
    files = kaggle.list_files(kaggle_dir, "train")
    test = [(path, "", "test") for path, _ in kaggle.list_files(kaggle_dir, "test")]
    rows = [(path, label, "train") for path, label in files] + test
    table = pd.DataFrame(rows, columns=["path", "label", "split"])
    table.to_csv(tmp_path / "images.csv", index=False)
    histories, default = [], Config().model
    for source in ("kaggle", "images"):
        config = make_tiny_config()
        config.data.source = source
        config.data.table = str(tmp_path / "images.csv") if source == "images" else None
        config.model.features, config.model.dense = default.features, default.dense
        config.model.name, config.fit.epochs = "tiny", 1
        histo_jax.fit(config, tmp_path / source)
        histories.append((tmp_path / source / "history.csv").read_bytes())
    assert histories[0] == histories[1]


@pytest.mark.parametrize("layout", ["table", "folders"])
def test_real_patches_as_png(sample, tmp_path, layout):
    files = kaggle.list_files(sample / "kaggle_sample", "train")[:24]
    rows = []
    for number, (path, label) in enumerate(files):
        name = f"{label}/{path.stem}.png"
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.open(path).save(tmp_path / name)
        rows.append((name, label, f"slide {number // 6}"))
    if layout == "table":
        table = pd.DataFrame(rows, columns=["image", "label", "wsi"])
        table.to_csv(tmp_path / "images.csv", index=False)
    examples = read(tmp_path)["train"]
    assert sorted(e.id for e in examples) == sorted(path.stem for path, _ in files)
    assert all(hashlib.sha1(e.image.tobytes()).hexdigest() == e.id for e in examples)
    assert {e.slide for e in examples} == (
        {f"slide {k}" for k in range(4)} if layout == "table" else {""}
    )
    assert image_tables.list_images(tmp_path).rows["path"].is_unique
