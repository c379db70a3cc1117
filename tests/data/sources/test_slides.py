"""Patches cut from annotated slides: labels, counts, seeds, splits, scales, bad input."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histo_jax.config import Config, DataConfig
from histo_jax.data import splits
from histo_jax.data.records import prepare
from histo_jax.data.slide_tables import AnnotatedSlide, list_slides
from histo_jax.data.sources.slides import Slides
from histo_jax.errors import DataError
from histo_jax.report import points
from histo_jax.slides.annotations import read_annotations

tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")
shapely = pytest.importorskip("shapely", reason="the extra slides is not installed")
affinity = pytest.importorskip("shapely.affinity", reason="the extra slides is not installed")
pytest.importorskip("openslide", reason="the extra slides is not installed")

# Pixels of 1 micrometre; the tissue ends within cells.
WIDTH, HEIGHT, BORDER, CELL = 512, 384, 48, 32
ROWS, COLUMNS = HEIGHT // CELL, WIDTH // CELL
TISSUE = np.zeros((ROWS, COLUMNS), bool)
TISSUE[1:-1, 1:-1] = True


def write_slide(path, scale=1, seed=0, mpp=None):
    """Writes noisy tissue on glass; its pixels are 1 / `scale` micrometres wide."""
    rng = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, WIDTH, 3), 244, np.uint8)
    noise = rng.integers(-40, 40, (HEIGHT - 2 * BORDER, WIDTH - 2 * BORDER, 1))
    inside = slice(BORDER, HEIGHT - BORDER), slice(BORDER, WIDTH - BORDER)
    pixels[inside] = np.array([200, 130, 180]) + noise
    pixels = pixels.repeat(scale, 0).repeat(scale, 1)
    per_centimetre = 1e4 * scale / (mpp or 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", metadata=None, compression="zlib",
        resolution=(per_centimetre, per_centimetre), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def write_geojson(path, scale=1, **shapes):
    """Writes shapes in micrometres by class."""
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(
                shapely.to_geojson(affinity.scale(shape, scale, scale, origin=(0, 0)))
            ),
            "properties": {"classification": {"name": name}},
        }
        for name, shape in shapes.items()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def read(folder, **settings):
    settings = {"positive": "Tumor", "mpp": 1.0, "split_seed": 0, **settings}
    folder = None if folder is None else str(folder)
    source = Slides(DataConfig(source="slides", raw_dir=folder, **settings))
    return {split: list(examples) for split, examples in source.splits().items()}


def place(example):
    """The row and the column of a patch's cell, on a slide of 1 micrometre."""
    x, y, width, height = map(int, re.search(r"#xywh=(.+)$", example.path)[1].split(","))
    assert width == height == 96
    return (y + CELL) // CELL, (x + CELL) // CELL


def label_map(examples):
    """The labels of cells, -1 where there is no patch."""
    labels = np.full((ROWS, COLUMNS), -1)
    for example in examples:
        labels[place(example)] = example.label
    return labels


SQUARE = shapely.box(96, 96, 256, 224)
SHAPES = {
    "square": SQUARE,
    "one pixel": shapely.box(127, 100, 128, 101),
    "half a pixel": shapely.box(200, 200, 201, 200.5).union(shapely.box(300, 250, 310, 260)),
    "hole": SQUARE.difference(shapely.box(128, 128, 192, 192)),
    "turned": affinity.rotate(SQUARE, 33),
    "mirrored": affinity.scale(affinity.rotate(SQUARE, 33), -1, 1),
    "bow": shapely.Polygon([(100, 100), (400, 300), (400, 100), (100, 300)]),
    "parts": shapely.MultiPolygon([SQUARE, shapely.Point(400, 200).buffer(30)]),
}


def covered_pixels(shape, factor=4):
    """The area of a shape in each cell, in pixels, from points in it."""
    y, x = (np.indices((HEIGHT * factor, WIDTH * factor)) + 0.5) / factor
    shape = shapely.make_valid(shape)
    shapely.prepare(shape)
    points = shapely.contains_xy(shape, x.ravel(), y.ravel())
    cells = points.reshape(ROWS, CELL * factor, COLUMNS, CELL * factor)
    return cells.sum((1, 3)) / factor**2


@pytest.mark.parametrize("name", SHAPES)
def test_labels_equal_those_of_the_mask(name, tmp_path):
    write_slide(tmp_path / "a.tif")
    write_geojson(tmp_path / "a.geojson", Tumor=SHAPES[name])
    labels = label_map(read(tmp_path)["train"])
    area = covered_pixels(SHAPES[name])
    # Points cannot tell all areas from one pixel.
    is_certain = (np.abs(area - 1) > 0.3) | (name == "one pixel")
    assert is_certain.sum() > ROWS * COLUMNS - 6
    expected = np.where(TISSUE, area > 0.9, -1)
    np.testing.assert_array_equal(labels[is_certain], expected[is_certain])
    assert labels.max() == 1


def test_mask_images_and_min_overlap(tmp_path):
    write_slide(tmp_path / "a.tif")
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[100:101, 100:101], values[160:176, 160:192], values[300:310, 300:310] = 7, 7, 9
    Image.fromarray(values).save(tmp_path / "a_mask.png")
    cells = values.reshape(ROWS, CELL, COLUMNS, CELL).swapaxes(1, 2) == 7
    expected = np.where(TISSUE, cells.any((2, 3)), -1)
    np.testing.assert_array_equal(label_map(read(tmp_path, positive="7")["train"]), expected)
    expected = np.where(TISSUE, cells.mean((2, 3)) >= 0.5, -1)
    labels = label_map(read(tmp_path, positive="7", min_overlap=0.5)["train"])
    np.testing.assert_array_equal(labels, expected)
    assert (labels == 1).sum() == 1


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Four annotated slides of two patients, one normal slide, and a table of them."""
    folder = tmp_path_factory.mktemp("study")
    rows = ["Slide,Annotation,Case ID,split"]
    for number in range(4):
        write_slide(folder / f"tiles/s{number}.tif", seed=number)
        shapes = {"Tumor": affinity.translate(SQUARE, 20 * number)}
        if number == 0:
            shapes |= {
                "Necrosis": shapely.box(96, 96, 160, 160),
                "Ignore*": shapely.box(0, 0, 90, 90),
            }
        write_geojson(folder / f"tiles/s{number}.geojson", **shapes)
        split = "test" if number == 3 else "train"
        rows.append(f"tiles/s{number}.tif,tiles/s{number}.geojson,p{number // 2 % 2},{split}")
    write_slide(folder / "tiles/normal.tif", seed=9)
    rows.append("tiles/normal.tif,,p2,train")
    rows[-2] = rows[-2].replace("p1", "p3")
    (folder / "slides.csv").write_text("\n".join(rows))
    return folder


def test_excluded_classes_take_no_part(study):
    def of_first(**settings):
        examples = read(study, **settings)["train"]
        return label_map(example for example in examples if example.slide == "s0")

    kept, excluded = of_first(), of_first(exclude="necrosis")
    assert (kept[2:4, 2:4] == -1).sum() == 1, "Ignore* never takes part"
    assert (excluded[3:5, 3:5] == -1).all()
    is_same = np.ones_like(kept, bool)
    is_same[3:5, 3:5] = False
    np.testing.assert_array_equal(kept[is_same], excluded[is_same])


def test_counts_by_slide_and_seed(study):
    def ids(**settings):
        return {e.id: (e.slide, e.label) for e in read(study, **settings)["train"]}

    first, second, other = ids(per_slide=5), ids(per_slide=5), ids(per_slide=5, split_seed=1)
    assert first == second
    assert first.keys() != other.keys()
    counts = pd.Series(list(first.values())).value_counts()
    assert counts.to_dict() == {
        (slide, label): 5
        for slide in ("s0", "s1", "s2", "normal")
        for label in (0, 1)
        if (slide, label) != ("normal", 1)
    }
    everything = ids(per_slide=None)
    assert first.items() <= everything.items()


def test_records_keep_patients_apart_and_know_places(study, tmp_path):
    config = Config()
    config.data = DataConfig(
        source="slides", raw_dir=str(study), tfds_dir=str(tmp_path), positive="Tumor", mpp=1.0,
        validation_fraction=0.4,
    )  # fmt: skip
    prepared = prepare(config.data, 0)
    table = prepared.tables["train"]
    assert set(table["slide"]) == {"s0", "s1", "s2", "normal"}
    assert set(prepared.tables["test"]["slide"]) == {"s3"}
    assert table["path"].str.fullmatch(r"tiles/\w+\.tif#xywh=-?\d+,-?\d+,96,96").all()
    subsets = splits.make_subsets(prepared.tables, config.data, 0)
    assert subsets.by == "patient"
    assert subsets.patient_disjoint
    assert prepare(config.data, 0).name == prepared.name
    config.data.per_slide = 7
    assert prepare(config.data, 0).name != prepared.name


def test_scales_give_the_same_patches(tmp_path):
    found = {}
    for scale in (1, 2, 4):
        folder = tmp_path / str(scale)
        write_slide(folder / "a.tif", scale)
        write_geojson(folder / "a.geojson", scale, Tumor=SHAPES["turned"])
        found[scale] = read(folder)["train"]
    for scale in (2, 4):
        assert [e.label for e in found[scale]] == [e.label for e in found[1]]
        for fine, coarse in zip(found[scale], found[1], strict=True):
            numbers = [int(n) for n in fine.path.partition("=")[2].split(",")]
            assert [n // scale for n in numbers] == [
                int(n) for n in coarse.path.partition("=")[2].split(",")
            ]
            assert np.abs(fine.image.astype(int) - coarse.image).max() <= 1
    assert len(found[1]) == TISSUE.sum()


@pytest.mark.parametrize(("scale", "mpp"), [(2, 1.0), (2, 0.972), (1, 0.972)])
def test_points_of_errors_are_where_the_pixels_are(scale, mpp, tmp_path):
    """Bright squares on a slide are found in the patches, and at the points of these patches."""
    write_slide(tmp_path / "a.tif", scale)
    pixels = tifffile.imread(tmp_path / "a.tif")
    full = mpp * scale  # pixels of the slide in one of a patch
    centres = [(cell + 0.5) * CELL * full for cell in (4, 5, 7)]
    for centre in centres:
        square = slice(round(centre - 4 * full), round(centre + 4 * full))
        pixels[square, square] = (0, 250, 0)
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, tile=(256, 256), photometric="rgb", metadata=None,
        resolution=(1e4 * scale,) * 2, resolutionunit="CENTIMETER",
    )  # fmt: skip
    write_geojson(tmp_path / "a.geojson", scale, Tumor=SQUARE)
    examples = read(tmp_path, mpp=mpp)["train"]
    wrong = [e for e in examples if e.image[46:50, 46:50, 0].max() < 30]
    assert len(wrong) == len(centres)
    table = pd.DataFrame([(e.id, e.label, e.slide, e.path) for e in wrong],
                         columns=["id", "label", "slide", "path"])  # fmt: skip
    points.write(tmp_path, table.assign(logit=1.0 - 2.0 * table["label"]), tmp_path)
    features = json.loads((tmp_path / "errors/a.geojson").read_text())["features"]
    found = sorted(feature["geometry"]["coordinates"] for feature in features)
    # The places of patches are in whole pixels of the slide.
    np.testing.assert_allclose(found, np.transpose([centres, centres]), atol=0.75)


def test_sparse_and_dense_patches_have_the_same_pixels(tmp_path):
    write_slide(tmp_path / "a.tif", 2)
    write_geojson(tmp_path / "a.geojson", 2, Tumor=SQUARE)
    dense = {e.path: e.id for e in read(tmp_path)["train"]}
    sparse = {e.path: e.id for e in read(tmp_path, per_slide=1)["train"]}
    assert len(sparse) == 2
    assert sparse.items() <= dense.items()


def test_a_table_states_the_scale(tmp_path):
    write_slide(tmp_path / "a.tif", mpp=3)
    write_geojson(tmp_path / "a.geojson", Tumor=SQUARE)
    (tmp_path / "slides.csv").write_text("slide;annotation;mpp\na.tif;a.geojson;1,0\n")
    assert len(read(tmp_path)["train"]) == TISSUE.sum()


def test_slides_without_annotation_are_left_out(tmp_path, log):
    write_slide(tmp_path / "a.tif")
    write_geojson(tmp_path / "a.tif.geojson", Tumor=SQUARE)
    write_slide(tmp_path / "b.tif", seed=1)
    slides = list_slides(tmp_path)
    assert [slide.name for slide in slides] == ["a"]
    assert "1 of 2 slides have no annotation and are left out, the first is" in log.text


@pytest.mark.parametrize(
    ("slide", "annotation"),
    [
        ("a.tif", "a.GEOJSON"),
        ("a.TIF", "a.tif.geojson"),
        ("a.tif", "a_MASK.PNG"),
        ("Fälle 2/Präparat #1 (ö).tif", "Fälle 2/Präparat #1 (ö).geojson"),
        ("Pra\u0308parat.tif", "Pr\u00e4parat.geojson"),
    ],
)
def test_annotations_in_other_spellings(slide, annotation, tmp_path, log):
    log.set_level("INFO", "histo_jax")
    path = write_slide(tmp_path / slide)
    (tmp_path / annotation).touch()
    if annotation.endswith("PNG"):
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / annotation)
    # Copies that macOS makes on other file systems.
    (tmp_path / f"._{annotation.rpartition('/')[2]}").write_bytes(b"\0\5\x16\7")
    assert list_slides(tmp_path) == [AnnotatedSlide(path, tmp_path / annotation, path.stem)]
    assert Slides.recognizes(tmp_path)
    assert "passed over" not in log.text


def test_slides_without_patches(tmp_path, log):
    """One is glass, and on one all is excluded."""
    write_slide(tmp_path / "a.tif")
    shapes = {"Tumor": SQUARE, "Stroma": SQUARE, "Ignore*": shapely.box(0, 0, 90, 90)}
    write_geojson(tmp_path / "a.geojson", **shapes)
    write_slide(tmp_path / "b.tif", seed=1)
    write_geojson(tmp_path / "b.geojson", Fold=shapely.box(0, 0, WIDTH, HEIGHT))
    glass = np.full((HEIGHT, WIDTH, 3), 244, np.uint8)
    tifffile.imwrite(tmp_path / "NA.tif", glass, photometric="rgb")
    table = "slide,annotation,mpp\na.tif,a.geojson,\nb.tif,b.geojson,\nNA.tif,,1\n"
    (tmp_path / "slides.csv").write_text(table)
    log.set_level("INFO", "histo_jax")
    assert {e.slide for e in read(tmp_path, exclude="Fold")["train"]} == {"a"}
    assert "b.tif: all tissue is excluded, and no patch is taken" in log.text
    assert "NA.tif: no tissue was found, and no patch is taken" in log.text
    assert "areas of 'Stroma' count as negative" in log.text
    # A name that tables write where a slide is not known.
    assert [slide.name for slide in list_slides(tmp_path)] == ["a", "b", "NA.tif"]


def test_names_of_slides_are_unique(tmp_path):
    for folder in ("x", "y"):
        write_slide(tmp_path / folder / "a.tif")
        write_geojson(tmp_path / folder / "a.geojson", Tumor=SQUARE)
    assert [slide.name for slide in list_slides(tmp_path)] == ["x/a.tif", "y/a.tif"]


def test_repeated_pixels_are_kept_once(tmp_path, log):
    for name in "ab":
        write_slide(tmp_path / f"{name}.tif")
        write_geojson(tmp_path / f"{name}.geojson", Tumor=SQUARE)
    assert len(read(tmp_path)["train"]) == TISSUE.sum()
    assert f"{TISSUE.sum()} patches of the train split have the same pixels" in log.text


def test_corrupt_slides_can_be_left_out(tmp_path):
    write_slide(tmp_path / "a.tif")
    (tmp_path / "b.svs").write_bytes(b"no slide")
    for name in "ab":
        write_geojson(tmp_path / f"{name}.geojson", Tumor=SQUARE)
    with pytest.raises(DataError, match=r"b\.svs is not a slide"):
        read(tmp_path)
    assert {e.slide for e in read(tmp_path, on_damaged="skip")["train"]} == {"a"}


BAD = {
    "annotation without slide": (
        lambda folder: write_geojson(folder / "b.geojson", Tumor=SQUARE),
        r"b\.geojson is an annotation without a slide",
    ),
    "class that is missing": (
        lambda folder: write_geojson(folder / "a.geojson", Tumour=SQUARE, Stroma=SQUARE),
        "has the class 'Tumor'; they have 'Stroma', 'Tumour': did you mean Tumour",
    ),
    "outside": (
        lambda folder: write_geojson(folder / "a.geojson", Tumor=affinity.translate(SQUARE, WIDTH)),
        r"a\.geojson: its polygons .* are outside of the slide, which has 512 x 384",
    ),
    "glass": (
        lambda folder: write_geojson(folder / "a.geojson", Tumor=shapely.box(0, 0, 30, 30)),
        "100% of the positive area is not on tissue",
    ),
    "points alone": (
        lambda folder: write_geojson(folder / "a.geojson", Tumor=shapely.Point(90, 90)),
        "has no polygons: annotate a.tif, or list it in a table",
    ),
    "mask without slide": (
        lambda folder: Image.new("L", (WIDTH, HEIGHT)).save(folder / "b_mask.png"),
        r"b_mask\.png is an annotation without a slide: add b with its suffix",
    ),
    "annotation of two slides": (
        lambda folder: Image.new("RGB", (64, 48)).save(folder / "a.jpg"),
        r"a\.geojson is the annotation of two slides by its name, a\.jpg and a\.tif: move one",
    ),
    "empty xml": (
        lambda folder: (folder / "a.geojson").rename(folder / "a.xml").write_text(""),
        r"a\.xml is no XML of ASAP that can be read \(no element found",
    ),
    "only empty polygons": (
        lambda folder: write_geojson(folder / "a.geojson", Tumor=shapely.Polygon()),
        "has no polygons: annotate a.tif, or list it in a table",
    ),
    "broken xml": (
        lambda folder: (
            (folder / "a.geojson").rename(folder / "a.xml").write_text("<ASAP_Annotations><")
        ),
        r"a\.xml is no XML of ASAP",
    ),
    "broken geojson": (
        lambda folder: (folder / "a.geojson").write_text('{"type":'),
        r"a\.geojson is no GeoJSON",
    ),
    "two annotations": (
        lambda folder: (folder / "a.xml").write_text("<ASAP_Annotations/>"),
        r"a\.tif has several annotations, a\.geojson and a\.xml",
    ),
    "one class": (
        lambda folder: write_geojson(folder / "a.geojson", Tumor=shapely.box(0, 0, WIDTH, HEIGHT)),
        "0 have label 0 and 140 have label 1, where Tumor covers at least a pixel of the cell",
    ),
    "no slide to train on": (
        lambda folder: (folder / "slides.csv").write_text(
            "slide,annotation,split\na.tif,a.geojson,test\n"
        ),
        "gives no training patch: add slides of the split train, or exclude less",
    ),
    "unknown scale": (
        lambda folder: Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.tif"),
        r"a\.tif does not state micrometres a pixel: list the slides in a table",
    ),
    "slide that is missing": (
        lambda folder: (folder / "slides.csv").write_text("slide,annotation\nb.tif,\n"),
        r"slides\.csv, line 2: path 'b\.tif' is missing",
    ),
    "annotation that is missing": (
        lambda folder: (folder / "slides.csv").write_text("slide,annotation\na.tif,b.xml\n"),
        r"slides\.csv, line 2: annotation 'b\.xml' is missing",
    ),
    "no column of annotations": (
        lambda folder: (folder / "slides.csv").write_text("slide,patient\na.tif,1\n"),
        "has no column with the slides' annotations; name it annotation",
    ),
    "scale that is none": (
        lambda folder: (folder / "slides.csv").write_text("slide,annotation,mpp\na.tif,,x\n"),
        r"slides\.csv, line 2: mpp 'x' cannot be the scale of a slide",
    ),
    "no column": (
        lambda folder: (folder / "slides.csv").write_text("name,annotation\na.tif,\n"),
        "has no column with the slides' paths; name it slide",
    ),
    "no annotation": (
        lambda folder: (folder / "a.geojson").unlink(),
        r"none of 1 slides has an annotation beside it, such as a\.geojson",
    ),
    "no slides": (
        lambda folder: [path.unlink() for path in sorted(folder.iterdir())],
        "has no slides",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line(case, tmp_path):
    write_slide(tmp_path / "a.tif")
    write_geojson(tmp_path / "a.geojson", Tumor=SQUARE)
    change, expected = BAD[case]
    change(tmp_path)
    with pytest.raises(DataError, match=expected) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_settings_give_one_line(tmp_path):
    write_slide(tmp_path / "a.tif")
    write_geojson(tmp_path / "a.geojson", Tumor=SQUARE)
    with pytest.raises(DataError, match=r"have 'Tumor'; name the positive class by --config\.data"):
        read(tmp_path, positive=None)
    with pytest.raises(DataError, match=r"exclude names 'tumor', which config\.data\.positive"):
        read(tmp_path, exclude="tumor,necrosis")
    with pytest.raises(DataError, match=r"other\.csv: no such table; set --config.data.table"):
        read(tmp_path, table=str(tmp_path / "other.csv"))
    with pytest.raises(DataError, match="label_region = 100 is more than the 96 pixels"):
        read(tmp_path, label_region=100)
    with pytest.raises(DataError, match=r"config\.data\.raw_dir is not set"):
        read(None)


def test_coordinates_in_micrometres_are_refused(tmp_path):
    # At a quarter of a micrometre, the square lands in the glass of the upper left corner.
    write_slide(tmp_path / "a.tif", 4)
    write_geojson(tmp_path / "a.geojson", 1, Tumor=shapely.box(100, 60, 180, 180))
    with pytest.raises(DataError, match="taken as micrometres it is: give coordinates in pixels"):
        read(tmp_path)


def test_the_config_file_selects_the_source():
    config = runpy.run_path(str(Path(__file__).parents[3] / "configs" / "slides.py"))[
        "get_config"
    ]()
    assert config.data.source == "slides"


@pytest.mark.parametrize(
    ("slide", "annotation", "positive"),
    [
        ("packer_example.tif", "packer_example.xml", "Unclassified"),
        ("cmu-1-small-region.svs", None, "Tumor"),
    ],
)
def test_real_slides(slide, annotation, positive, sample, tmp_path):
    slides = sample / "slides"
    if annotation:
        path = slides / "annotations" / annotation
    else:  # drawn by hand
        shape = shapely.Polygon([(900, 700), (1700, 900), (1500, 1800), (1000, 1500)])
        path = write_geojson(tmp_path / "a.geojson", Tumor=shape)
    table = tmp_path / "table.csv"
    table.write_text(f"wsi,annotation\n{slides / 'wsi' / slide},{path}\n")
    examples = read(None, table=str(table), positive=positive, mpp=None, per_slide=20)["train"]
    (area,) = read_annotations(path, (5000, 5000)).values()
    assert {e.label for e in examples} == {0, 1}
    for example in examples:
        assert example.path.startswith(f"{slides / 'wsi' / slide}#xywh=")
        x, y, width, height = map(int, example.path.partition("=")[2].split(","))
        cell = shapely.box(x + width / 3, y + height / 3, x + width * 2 / 3, y + height * 2 / 3)
        # The place is in whole pixels.
        assert area.intersects(cell.buffer(2)) >= example.label >= area.intersects(cell.buffer(-3))
