"""Annotations of QuPath, of ASAP, and mask images, as areas by class."""

import json

import numpy as np
import pytest
from PIL import Image

from histo_jax.errors import DataError
from histo_jax.slides import masks
from histo_jax.slides.annotations import check_classes, read_annotations, regions

shapely = pytest.importorskip("shapely", reason="the extra slides is not installed")
tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")

SIZE = (1000, 800)


def ring(x, y, width, height):
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]


def feature(coordinates, name="Tumor", kind="Polygon", **properties):
    if name:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def geojson(tmp_path, *features):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def xml(tmp_path, *groups, kind="Polygon", head=""):
    parts = []
    for group, points in groups:
        coordinates = "".join(
            f'<Coordinate Order="{k}" X="{x}" Y="{y}" />' for k, (x, y) in enumerate(points)
        )
        parts.append(
            f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}"><Coordinates>{coordinates}'
            "</Coordinates></Annotation>"
        )
    path = tmp_path / "a.xml"
    body = f"<ASAP_Annotations><Annotations>{''.join(parts)}</Annotations></ASAP_Annotations>"
    path.write_text(f'<?xml version="1.0"?>{head}{body}')
    return path


def areas(path, **options):
    return {name: area.area for name, area in read_annotations(path, SIZE, **options).items()}


def test_qupath_classes_holes_and_what_is_passed_over(tmp_path):
    path = geojson(
        tmp_path,
        feature([ring(0, 0, 100, 100), ring(10, 10, 20, 20)]),
        feature([[ring(50, 0, 100, 100)], [ring(300, 300, 10, 10)]], kind="MultiPolygon"),
        feature([ring(200, 0, 10, 10)], name="Tumor: Positive", objectType="annotation"),
        feature([ring(400, 0, 10, 10)], name=None, classification={"names": ["A", "B"]}),
        feature([ring(500, 0, 10, 10)], name=None),
        feature([ring(600, 0, 10, 10)], objectType="tile"),
        feature([ring(600, 0, 10, 10)], objectType="detection"),
        feature([5, 5], kind="Point"),
        feature([[0, 0], [9, 9]], kind="LineString"),
    )
    assert areas(path) == {
        "Tumor": 100 * 150 - 20 * 20 + 10 * 10,
        "Tumor: Positive": 100,
        "A: B": 100,
        "Unclassified": 100,
    }


def test_crossing_outlines_count_with_all_loops(tmp_path):
    bow = [[0, 0], [20, 20], [20, 0], [0, 20], [0, 0]]
    loop = [[100, 0], [110, 0], [110, 10], [102, 10], [102, 2], [108, 2], [108, 12], [100, 12]]
    path = geojson(tmp_path, feature([bow], "Bow"), feature([[*loop, loop[0]]], "Loop"))
    assert areas(path) == {"Bow": 200, "Loop": 116}


def test_qupath_coordinates_start_at_its_origin(tmp_path):
    path = geojson(tmp_path, feature([ring(0, 0, 10, 10)]))
    moved = read_annotations(path, SIZE, offset=(300, 200))["Tumor"]
    assert moved.bounds == (300, 200, 310, 210)


def test_asap_groups_of_camelyon(tmp_path):
    path = xml(
        tmp_path,
        ("_0", ring(0, 0, 100, 100)),
        ("_1", ring(50, 0, 100, 100)),
        ("_2", ring(10, 10, 20, 20)),
        ("Exclusion", ring(70, 70, 10, 10)),
        ("None", [("1,5", "0"), ("11,5", "0"), ("11,5", "10,25"), ("1,5", "10,25")]),
        kind="Spline",
    )
    found = areas(path)
    assert found["Tumor"] == 150 * 100 - 20 * 20 - 10 * 10
    assert found["Unclassified"] == 10 * 10.25 - 1.5 * 0.25  # a corner of the hole
    assert (found["_2"], found["Exclusion"]) == (400, 100)
    assert areas(xml(tmp_path, ("_0", [(5, 5)]), kind="Dot")) == {}


def test_asap_groups_of_camelyon17_and_their_case(tmp_path):
    path = xml(
        tmp_path,
        ("metastases", ring(0, 0, 100, 100)),
        ("tumor", ring(50, 0, 100, 100)),
        ("Normal", ring(10, 10, 20, 20)),
    )
    assert areas(path) == {"Tumor": 150 * 100 - 20 * 20, "Normal": 400}


def test_shapes_without_an_area_are_passed_over(tmp_path):
    line = [[0, 0], [9, 9], [0, 0], [0, 0]]
    path = geojson(
        tmp_path,
        feature([], "Empty"),
        feature([], "Empty", kind="MultiPolygon"),
        feature([line], "Line"),
        feature([ring(0, 0, 10, 10)]),
        {"type": "Feature", "geometry": None, "properties": None},
    )
    assert areas(path) == {"Tumor": 100}


def test_masks_name_classes_by_their_values(tmp_path):
    values = np.zeros((80, 100), np.uint8)
    values[10:20, 30:50], values[40:50, 0:10], values[45:47, 2:4] = 2, 255, 0
    Image.fromarray(values).save(tmp_path / "grey.png")
    # As PANDA has them: a pyramid whose first channel is the class.
    panda = np.stack([values, values * 0, values * 0], axis=-1)
    tifffile.imwrite(tmp_path / "rgb.tif", panda, photometric="rgb")
    for name in ("grey.png", "rgb.tif"):
        found = read_annotations(tmp_path / name, SIZE)
        assert found["2"].equals(shapely.box(300, 100, 500, 200))
        assert found["255"].area == (100 - 4) * 100
        assert list(found) == ["2", "255"]


def test_a_pyramid_is_read_at_the_finest_level_that_fits(tmp_path, monkeypatch):
    values = np.zeros((80, 100), np.uint8)
    values[10:20, 30:50] = 1
    with tifffile.TiffWriter(tmp_path / "mask.tif") as file:
        file.write(values, subifds=1)
        file.write(values[::2, ::2], subfiletype=1)
    assert areas(tmp_path / "mask.tif") == {"1": 200 * 100}
    monkeypatch.setattr(masks, "_MAX_PIXELS", 5000)
    assert areas(tmp_path / "mask.tif") == {"1": 200 * 100}
    monkeypatch.setattr(masks, "_MAX_PIXELS", 100)
    with pytest.raises(DataError, match="too many"):
        areas(tmp_path / "mask.tif")


def test_regions_by_names(tmp_path):
    path = geojson(
        tmp_path,
        feature([ring(0, 0, 10, 10)]),
        feature([ring(100, 0, 10, 10)], "Metastasis"),
        feature([ring(200, 0, 10, 10)], "Necrosis"),
        feature([ring(300, 0, 10, 10)], "Ignore*"),
    )
    annotations = read_annotations(path, SIZE)
    positive, excluded = regions(annotations, "tumor, metastasis", "Necrosis")
    assert (positive.area, excluded.area) == (200, 200)
    positive, excluded = regions(annotations, "Tumor")
    assert (positive.area, excluded.area) == (100, 100)
    assert regions({}, "Tumor")[0].is_empty


def test_a_class_that_is_missing_lists_those_found(log):
    check_classes({"Tumor", "Stroma"}, "tumor,Stroma", "", "folder")
    with pytest.raises(DataError, match=r"'Tumour'; they have 'Stroma', 'Tumor': did you mean Tum"):
        check_classes({"Tumor", "Stroma"}, "Tumour", "", "folder")
    with pytest.raises(DataError, match=r"they have 'Tumor': did you mean Tumor\?"):
        check_classes({"Tumor"}, "metastasis", "", "folder")
    check_classes({"Tumor"}, "Tumor", "Necrosis", "folder")
    assert "no annotation in folder has the class 'Necrosis'" in log.text


BOMB = '<!DOCTYPE a [<!ENTITY b "&c;&c;"><!ENTITY c SYSTEM "/etc/passwd">]>'
BAD = {
    "broken xml": ("a.xml", "<ASAP_Annotations><Annot", "no XML of ASAP"),
    "empty xml": ("a.xml", "", "no XML of ASAP"),
    "entity bomb": ("a.xml", f"{BOMB}<ASAP_Annotations/>", "document type"),
    "xml of Aperio": ("a.xml", "<Annotations MicronsPerPixel='0.5'/>", "its root is Annotations"),
    "no number": (
        "a.xml",
        "<ASAP_Annotations><Coordinate X='x' Y='1'/></ASAP_Annotations>",
        "could not convert",
    ),
    "broken geojson": ("a.geojson", '{"type": "FeatureColl', "no GeoJSON"),
    "other json": ("a.json", '{"positive": []}', "its type is None"),
    "deep json": ("a.geojson", "[" * 100_000, "no GeoJSON"),
    "open ring": (
        "a.geojson",
        json.dumps(feature([[[0, 0], [1, 1]]])),
        "no GeoJSON",
    ),
    "not finite": (
        "a.geojson",
        json.dumps(feature([[[0, 0], [float("inf"), 1], [1, 1], [0, 0]]])),
        "no GeoJSON",
    ),
    "outside": ("a.geojson", json.dumps(feature([ring(1500, 0, 100, 100)])), "outside of the"),
    "no image": ("a.png", "no image", "no mask that can be read"),
    "no tiff": ("a.tif", "no image", "no mask that can be read"),
    "unknown": ("a.csv", "x,y", "no annotation that can be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_give_one_line(case, tmp_path):
    name, text, expected = BAD[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=expected) as caught:
        read_annotations(tmp_path / name, SIZE)
    message = str(caught.value)
    assert str(tmp_path / name) in message
    assert "\n" not in message


def test_bad_masks_and_missing_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(tmp_path / "missing.geojson", SIZE)
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(tmp_path / "missing.tif", SIZE)
    Image.new("L", (100, 100)).save(tmp_path / "square.png")
    with pytest.raises(DataError, match="proportions"):
        read_annotations(tmp_path / "square.png", SIZE)
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    for channels, expected in ((noise, "a grey image"), (noise[..., 0], "256 different values")):
        Image.fromarray(channels).save(tmp_path / "noise.png")
        with pytest.raises(DataError, match=expected):
            read_annotations(tmp_path / "noise.png", SIZE)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "CMU-1_segmentation.xml": {"malignant": 2274165, "benign": 1045867},
        "asap-dot.xml": {},
        "asap-pointset.xml": {},
        "asap-polygon.xml": {"Unclassified": 28617},
        "packer_example.xml": {"Unclassified": 19254},
        "patient_004_node_4.xml": {"Tumor": 252947},
        "tumor_009.xml": {"Tumor": 850599383},
        "dlup_qupath05.geojson": {"Unclassified": 168998},
        "histoqc_holed.geojson": {"Unclassified": 7827735},
        "wsidicom_qupath-brush.json": {"Unclassified": 10072},
        "wsidicom_qupath-line.json": {},
        "wsidicom_qupath-multipoint.json": {},
        "wsidicom_qupath-polygon-cell-classified.json": {"Cell": 257, "Nucleus": 185},
    }.items(),
)
def test_real_files(name, expected, sample):
    path = sample / "slides" / "annotations" / name
    found = read_annotations(path, (200_000, 200_000))
    assert {name: round(area.area) for name, area in found.items()} == expected
    assert all(area.is_valid for area in found.values())
