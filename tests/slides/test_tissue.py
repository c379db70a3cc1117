"""Where tissue is found: colours, masks, and annotations of QuPath."""

import json

import numpy as np
import pytest
from PIL import Image

from histo_jax.errors import DataError
from histo_jax.slides import reader, tissue
from histo_jax.slides.grid import Grid

pytest.importorskip("shapely", reason="the extra slides is not installed")

PINK, GLASS, BLACK = (200, 130, 180), (244, 244, 244), (5, 5, 8)
GREEN_INK, BLUE_INK = (40, 150, 60), (50, 90, 200)


def picture(*areas, size=(200, 200)):
    """Glass with rectangles `(colour, top, left, bottom, right)`."""
    image = np.full((*size, 3), GLASS, np.uint8)
    for colour, top, left, bottom, right in areas:
        image[top:bottom, left:right] = colour
    return image


def test_stained_pixels_are_tissue():
    mask = tissue.detect(picture((PINK, 50, 60, 150, 140)), 1, 0, 0)
    expected = np.zeros((200, 200), bool)
    expected[50:150, 60:140] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("colour", "fraction"),
    [(PINK, 1), (GLASS, 0), (BLACK, 0), (GREEN_INK, 0), (BLUE_INK, 0), ((255, 255, 255), 0)],
)
def test_uniform_slides(colour, fraction):
    assert tissue.detect(picture((colour, 0, 0, 200, 200)), 8, 500, 500).mean() == fraction


def test_small_pieces_go_and_small_holes_are_filled():
    image = picture(
        (PINK, 50, 50, 150, 150), (GLASS, 80, 80, 95, 95), (GLASS, 100, 100, 140, 140),
        (PINK, 10, 10, 20, 20), (BLACK, 0, 190, 200, 200), (GREEN_INK, 160, 20, 190, 180),
    )  # fmt: skip
    mask = tissue.detect(image, 1, 500, 500)
    assert mask[85, 85]  # a hole of 225 pixels
    assert not mask[120, 120]  # one of 1,600
    assert not mask[15, 15]
    assert mask.sum() == 100 * 100 - 40 * 40


def test_real_tissue(sample):
    """Nearly all of the regions is tissue; the slides are glass around it."""
    for path, low, high in (
        ("regions/centre_0_patient_006_node_1.jpeg", 0.9, 1.0),
        ("regions/centre_1_patient_024_node_2.jpeg", 0.9, 1.0),
        ("regions/centre_2_patient_056_node_1.jpeg", 0.9, 1.0),
        ("wsi/cmu-1-small-region.svs", 0.25, 0.6),
        ("wsi/packer_example.tif", 0.15, 0.35),
    ):
        with reader.open_slide(sample / "slides" / path) as slide:
            image = slide.read(0, 0, 0, *slide.size)[::2, ::2]
        assert low <= tissue.detect(image, 8, 4000, 4000).mean() <= high, path


def test_masks_are_stretched_over_the_slide(tmp_path):
    Image.fromarray(np.array([[0, 1], [255, 0]], np.uint8)).save(tmp_path / "a.png")
    mask = tissue._read_mask(tmp_path / "a.png", (100, 60))
    assert mask[:50, 30:].all()
    assert mask[50:, :30].all()
    assert mask.mean() == 0.5
    fine = np.zeros((600, 1000), np.uint8)
    fine[301, 501] = 1
    Image.fromarray(fine).save(tmp_path / "fine.png")
    assert np.argwhere(tissue._read_mask(tmp_path / "fine.png", (60, 100))).tolist() == [[30, 50]]
    with pytest.raises(DataError, match="1000 x 600 pixels, another shape"):
        tissue._read_mask(tmp_path / "fine.png", (100, 60))


def test_qupath_annotations_with_holes_and_offset(tmp_path):
    square = [[0, 0], [80, 0], [80, 80], [0, 80], [0, 0]]
    hole = [[20, 20], [60, 20], [60, 60], [20, 60], [20, 20]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [square, hole]},
        "properties": {"objectType": "annotation"},
    }
    path = tmp_path / "a.geojson"
    for content in (feature, [feature], {"type": "FeatureCollection", "features": [feature]}):
        path.write_text(json.dumps(content))
        mask = tissue._draw(tissue._read_polygons(path), (60, 60), 2.0, (10, 20))
        assert mask[11, 6]
        assert mask[48, 43]
        assert not mask[30, 25]  # the hole
        assert not mask[5, 5]
        assert mask.sum() == pytest.approx((80**2 - 40**2) / 4, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "coordinates", "share"),
    [
        ("Polygon", [[[0, 0], [60, 60], [60, 0], [0, 60], [0, 0]]], 0.5),  # crosses itself
        ("Polygon", [[[-1e12, -1e12], [1e12, -1e12], [1e12, 1e12], [-1e12, -1e12]]], 0.5),
        ("Polygon", [[[0, 0, 9], [30, 0, 9], [30, 60, 9], [0, 60, 9], [0, 0, 9]]], 0.5),
        (
            "MultiPolygon",
            [[[[0, 0], [15, 0], [15, 60], [0, 0]]], [[[60, 60], [15, 60], [60, 0], [60, 60]]]],
            0.5,
        ),
        ("Polygon", [[[99, 99], [120, 99], [120, 120], [99, 99]]], 0),  # beside the slide
        ("Polygon", [[[5, 5], [5, 5], [5, 5], [5, 5]]], 0),
        ("Polygon", [], 0),
    ],
)
def test_odd_polygons(tmp_path, kind, coordinates, share):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": kind, "coordinates": coordinates}))
    mask = tissue._draw(tissue._read_polygons(path), (60, 60), 1.0, (0, 0))
    assert mask.mean() == pytest.approx(share, abs=0.03)


def test_a_geojson_of_another_slide_is_refused(tmp_path, write_slide):
    slide_file = write_slide(tmp_path / "a.tif", np.zeros((50, 50, 3), np.uint8), 0.5)
    ring = [[99, 99], [120, 99], [120, 120], [99, 99]]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    options = tissue.Options(str(tmp_path / "a.geojson"), 0, 0)
    with reader.open_slide(slide_file) as slide, pytest.raises(DataError, match="no polygon on"):
        tissue.find(slide, slide.read(0, 0, 0, 50, 50), 1.0, slide.spacing, options, "a")


def test_real_annotations_are_read(sample):
    folder = sample / "slides/annotations"
    for path in (*folder.glob("*.geojson"), folder / "wsidicom_qupath-polygon.json"):
        assert sum(shape.area for shape in tissue._read_polygons(path)) > 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.geojson", "{", "not a GeoJSON"),
        ("a.geojson", '{"type": "FeatureCollection", "features": []}', "no polygon"),
        ("a.json", '{"type": "Point", "coordinates": [1, 2]}', "no polygon"),
        ("a.png", "x", "not an image"),
    ],
)
def test_bad_masks(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    read = tissue._read_mask if name.endswith("png") else tissue._read_polygons
    arguments = ((9, 9),) if name.endswith("png") else ()
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, *arguments)


def test_the_mask_of_a_slide_in_a_folder(tmp_path):
    (tmp_path / "s 1.png").touch()
    slide = tmp_path / "x" / "s 1.svs"
    assert tissue.mask_file(str(tmp_path), slide, "s_1") == tmp_path / "s 1.png"
    assert tissue.mask_file(str(tmp_path / "s 1.png"), slide, "s_1") == tmp_path / "s 1.png"
    with pytest.raises(DataError, match=r"add b\.png"):
        tissue.mask_file(str(tmp_path), tmp_path / "b.svs", "b")
    with pytest.raises(DataError, match="does not exist"):
        tissue.mask_file(str(tmp_path / "no.png"), slide, "s_1")


def test_cells_meet_a_mask_by_a_single_pixel():
    grid = Grid(window=96, cell=32, stride=32, full=(2.0, 2.0), size=(640, 320))
    mask = np.zeros((40, 80), bool)
    mask[15, 31] = True  # at 8 pixels of level 0 each: x 248 to 256, y 120 to 128
    assert list(zip(*np.nonzero(grid.meeting(mask, 8.0)), strict=True)) == [(1, 3)]
    assert grid.meeting(np.ones((40, 80), bool), 8.0).all()
    # A cell whose pixels of the mask are wider than itself.
    assert grid.meeting(np.ones((1, 1), bool), 640.0).all()
