"""Slides are opened, scaled by their micrometres, and refused with one line."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histo_jax.errors import ConfigError, DataError
from histo_jax.slides import reader, resolution, scaling, search

pytest.importorskip("openslide", reason="the extra slides is not installed")


class Pixels(reader.Slide):
    """A slide in memory."""

    vendor, path = "memory", Path("memory")

    def __init__(self, pixels, levels=None, spacing=None):
        self.pixels, self.spacing = pixels, spacing
        self.levels = levels or [(pixels.shape[1], pixels.shape[0])]

    def _read(self, level, x, y, width, height):
        return self.pixels[y : y + height, x : x + width]

    def close(self):
        pass


# From shared real files: what each says, and the level and factor for 0.972 micrometres.
REAL = {
    "wsi/cmu-1-small-region.svs": ("aperio", (2220, 2967), 0.499, 0, 0.972 / 0.499),
    "wsi/packer_example.tif": ("generic-tiff", (1472, 690), 0.9872, 0, 1.0),
    "wsi/instanseg_HE_example.ome.tif": ("tiff", (1380, 1484), 0.50008, 0, 0.972 / 0.50008),
    "broken/mrxs_partial/Mirax2-Fluorescence-2.mrxs": (
        "mirax", (72448, 152080), 0.3225, 1, 0.972 / 0.645,
    ),
    "dicom/highdicom_sm_image.dcm": ("dicom", (50, 50), 0.499, 0, 0.972 / 0.499),
    "odd/gc_no_dzi_mask.tif": ("generic-tiff", (3072, 3968), 0.97237, 0, 1.0),
}  # fmt: skip
REFUSED = {
    "wsi/tcga-cr-7395-01a-01-ts1.svs": "does not state micrometres",
    "odd/gc_invalid_resolutions_tiff.tif": "does not state micrometres",
    "odd/large_image_test_orient6.tif": "does not state micrometres",
    "odd/large_image_yb10kx5k.zstd.tiff": "does not state micrometres",
    "odd/slaid_patch_rgba.tif": "does not state micrometres",
    "odd/large_image_small_la.tiff": "does not state micrometres",
    "regions/centre_0_patient_006_node_1.jpeg": "does not state micrometres",
    "dicom/camelyon_jpeg.dcm": "too coarse",
    "dicom/camelyon_jpeg2000.dcm": "too coarse",
    "dicom/highdicom_sm_image_jpegls.dcm": "Unsupported transfer syntax",
    "broken/histolab_broken.svs": "not a slide that can be read",
    "broken/vms_dummy/CMU-1-40x - 2010-01-12 13.24.05.vms": "Premature end of JPEG",
}


def scale_of(slide, given=None, target=0.972):
    spacing = resolution.slide_spacing(slide, given)
    return resolution.choose_scale(slide, spacing, target)


@pytest.mark.parametrize("name", REAL)
def test_real_slides(name, sample):
    vendor, size, mpp, level, factor = REAL[name]
    with reader.open_slide(sample / "slides" / name) as slide:
        assert (slide.vendor, slide.size) == (vendor, size)
        assert slide.spacing.x == pytest.approx(mpp, rel=1e-4)
        scale = scale_of(slide)
        assert scale.level == level
        assert scale.factor == pytest.approx((factor, factor), rel=1e-4)
        image = scaling.thumbnail(slide, max(slide.size) / 100)
        assert max(image.shape) == 100


@pytest.mark.parametrize("name", REFUSED)
def test_real_refusals_are_one_line(name, sample):
    path = sample / "slides" / name

    def open_and_scale():
        with reader.open_slide(path) as slide:
            scale_of(slide)

    with pytest.raises(DataError, match=REFUSED[name]) as caught:
        open_and_scale()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_slide_that_opens_and_fails_on_read(sample):
    path = sample / "slides/broken/mrxs_partial/Mirax2-Fluorescence-2.mrxs"
    with reader.open_slide(path) as slide:
        assert slide.offset == (9153, 102664)
        with pytest.raises(DataError, match="cannot be read at level 0"):
            slide.read(0, 9153, 102664, 2000, 2000)


def test_transparent_and_outside_are_white(tmp_path):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :3] = (10, 20, 30, 255)
    pixels[:, 3] = (0, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with reader.open_slide(tmp_path / "a.png") as slide:
        region = slide.read(0, -1, -1, 8, 6)
    assert region.shape == (6, 8, 3)
    assert (region[1:5, 1:4] == (10, 20, 30)).all()
    assert (region[1:5, 4] == 127).all()
    outside = np.ones((6, 8), bool)
    outside[1:5, 1:5] = False
    assert (region[outside] == 255).all()


def test_sixteen_bits_and_huge_pictures_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="8 bits a channel"):
        reader.open_slide(tmp_path / "deep.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(reader, "_MAX_PICTURE_PIXELS", 100)
    with pytest.raises(DataError, match="vips tiffsave"):
        reader.open_slide(tmp_path / "large.png")
    with pytest.raises(DataError, match="cannot be opened"):
        reader.open_slide(tmp_path / "missing.svs")


@pytest.mark.parametrize(
    ("mpp", "level", "factor"),
    [
        (0.243, 2, 1.0),  # 0.243 * 4 = 0.972
        (0.2527, 1, 0.972 / 0.5054),  # level 2 is 4% too coarse
        (0.239, 2, 1.0),  # within 2%
        (0.235, 2, 0.972 / 0.94),
        (0.972, 0, 1.0),
        (1.2, 0, 0.972 / 1.2),  # enlarged
    ],
)
def test_the_coarsest_level_that_is_fine_enough(mpp, level, factor, log):
    slide = Pixels(np.zeros((0, 0, 3), np.uint8), [(4001, 3000), (2000, 1500), (1000, 750)])
    scale = scale_of(slide, mpp)
    assert scale.level == level
    assert scale.factor == pytest.approx((factor, factor))
    assert scale.full == pytest.approx((2**level * factor,) * 2)
    assert ("enlarged" in log.text) == (factor < 1)


def test_given_micrometres_win_and_coarse_slides_are_refused(log):
    slide = Pixels(np.zeros((9, 9, 3), np.uint8), spacing=reader.Spacing(0.5, 0.5, "tags"))
    assert resolution.slide_spacing(slide, 0.25)[:2] == (0.25, 0.25)
    assert "0.25 micrometres a pixel, as given; the file states 0.5" in log.text
    assert resolution.slide_spacing(slide, None).source == "tags"
    with pytest.raises(DataError, match=r"1\.46 micrometres a pixel \(given\), too coarse"):
        scale_of(slide, 1.46)


def test_anisotropic_pixels(write_slide, tmp_path, tissue_pixels):
    path = write_slide(tmp_path / "a.tif", tissue_pixels(400, 200), mpp=0.972, mpp_y=0.486)
    with reader.open_slide(path) as slide:
        scale = scale_of(slide)
        assert scale.full == pytest.approx((1, 2), rel=1e-3)
        assert scaling.read_scaled(slide, scale, 0, 0, 200, 200).min() > 100


def area_mean(pixels, left, top, width, height):
    """The mean of a rectangle with fractional edges, computed pixel by pixel."""

    def overlap(count, low, high):
        index = np.arange(count)
        return np.clip(np.minimum(index + 1, high) - np.maximum(index, low), 0, None)

    rows = overlap(pixels.shape[0], top, top + height)
    columns = overlap(pixels.shape[1], left, left + width)
    return np.einsum("y,yxc,x->c", rows, pixels, columns) / (width * height)


@settings(max_examples=25, deadline=None)
@given(
    factor_x=st.floats(1.0, 7.0),
    factor_y=st.floats(1.0, 7.0),
    x=st.integers(-5, 30),
    y=st.integers(-5, 30),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_area_means_do_not_depend_on_the_region(factor_x, factor_y, x, y, size):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 170, 3)).astype(np.uint8)
    slide = Pixels(pixels)
    scale = resolution.Scale(0, (factor_x, factor_y), (factor_x, factor_y))
    region = scaling.read_scaled(slide, scale, x, y, *size)
    whole = scaling.read_scaled(slide, scale, -5, -5, 80, 80)
    np.testing.assert_array_equal(region, whole[y + 5 : y + 5 + size[1], x + 5 : x + 5 + size[0]])
    padded = np.pad(pixels, [(50, 400), (50, 400), (0, 0)], constant_values=255)
    expected = area_mean(padded, 50 + x * factor_x, 50 + y * factor_y, factor_x, factor_y)
    np.testing.assert_allclose(region[0, 0], expected, atol=0.51)


def test_strips_make_no_seam(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    scale = resolution.Scale(0, (2.7, 3.3), (2.7, 3.3))
    whole = scaling.read_scaled(Pixels(pixels), scale, -3, -3, 100, 90)
    monkeypatch.setattr(scaling, "_STRIP_PIXELS", 2000)
    np.testing.assert_array_equal(
        scaling.read_scaled(Pixels(pixels), scale, -3, -3, 100, 90), whole
    )


def test_squares_of_a_thumbnail_make_no_seam(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (310, 290, 3)).astype(np.uint8)
    whole = scaling.thumbnail(Pixels(pixels), 2.7)
    monkeypatch.setattr(scaling, "_SQUARE", 50)
    np.testing.assert_array_equal(scaling.thumbnail(Pixels(pixels), 2.7), whole)
    assert whole.shape == (115, 108, 3)
    np.testing.assert_allclose(whole[3, 5], area_mean(pixels, 13.5, 8.1, 2.7, 2.7), atol=0.51)


def test_a_folder_is_searched_by_content(tmp_path, log, write_slide, tissue_pixels, sample):
    log.set_level(logging.INFO, "histo_jax")
    write_slide(tmp_path / "deep.tif", tissue_pixels(64, 64))
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "sub/picture.png")
    for name in ("deep_mask.png", "sub/unknown_mask.png"):
        Image.new("L", (9, 9)).save(tmp_path / name)
    (tmp_path / "deep.tif.geojson").touch()
    (tmp_path / "notes.txt").write_text("no slide")
    (tmp_path / "fake.png").write_text("no picture")
    (tmp_path / "broken.svs").write_text("a failure")
    (tmp_path / "mrxs").symlink_to(sample / "slides/broken")
    (tmp_path / "loop.svs").symlink_to(tmp_path / "loop.svs")
    os.mkfifo(tmp_path / "pipe.svs")
    found = [slide.path.relative_to(tmp_path) for slide in search.find([str(tmp_path)], 0.5)]
    assert [str(path) for path in found] == [
        "broken.svs", "deep.tif", "loop.svs", "sub/picture.png", "sub/unknown_mask.png",
    ]  # fmt: skip
    assert "passed over 3 files that are not slides (fake.png, notes.txt, pipe.svs)" in log.text
    assert "passed over 1 links to folders, which are not followed (mrxs)" in log.text
    for path, message in (
        ("loop.svs", "cannot be opened"),
        ("pipe.svs", "is not a file"),
        ("sub", "is not a file"),
    ):
        with pytest.raises(DataError, match=message):
            reader.open_slide(tmp_path / path)
    names = [s.path.name for s in search.find([str(sample / "slides/broken")], None)]
    assert names == [
        "histolab_broken.svs", "Mirax2-Fluorescence-2.mrxs", "CMU-1-40x - 2010-01-12 13.24.05.vms",
    ]  # fmt: skip


def test_tables_give_micrometres_for_each_slide(tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text("slide,mpp\na.svs,0.25\n/b/c.svs,\na.svs,0.5\n")
    assert search.find([str(table)], 0.4) == [
        search.SlideFile(tmp_path / "a.svs", 0.25),
        search.SlideFile(Path("/b/c.svs"), 0.4),
    ]
    with pytest.raises(ConfigError, match=r"mpp = 100 .* 0\.02 to 50"):
        search.find([str(table)], 100)
    for text, message in {
        "slide,mpp\na.svs,fine\n": "line 2: mpp = fine must be a number above 0",
        "file\na.svs\n": "no column slide",
        "slide,mpp\n,0.5\n": "line 2: the slide is missing",
        "slide,mpp\na.svs,nan\n": "line 2: mpp = nan must be a number above 0",
        "slide,mpp\na.svs,1e-9\n": "line 2: mpp = 1e-9 cannot be the scale of a slide",
        "mpp\n0.5\n": "no column slide",
        "slide,mpp\n": "no rows",
        "": "no column slide",
    }.items():
        table.write_text(text)
        with pytest.raises(ConfigError, match=message):
            search.find([str(table)], None)
    with pytest.raises(ConfigError, match="does not exist"):
        search.find([str(tmp_path / "x.svs")], None)


def test_names_of_results():
    slides = [
        search.SlideFile(Path(path))
        for path in ("/a/Slide 1.svs", "/b/Slide 1.svs", "/c/é.tif", "/a/Slide 1.svs")
    ]
    taken = {"slide_1": Path("/z/slide 1.svs"), "_": Path("/c/é.tif")}
    names = [name for name, _ in search.assign_names(slides, taken)]
    assert names == ["Slide_1-2", "Slide_1-3", "_", "Slide_1-2"]
    # A slide keeps the name of its results, in whatever order slides are given.
    again = search.assign_names(slides[1:2], {"Slide_1-3": slides[1].path})
    assert [name for name, _ in again] == ["Slide_1-3"]
    odd = ["x" * 240, "x" * 239 + "y", "index.html", "....", "a\nb/<c>"]
    slides = [search.SlideFile(Path("/", f"{name}.svs")) for name in odd]
    names = [name for name, _ in search.assign_names(slides, {})]
    assert names == ["x" * 150, "x" * 150 + "-2", "index.html-2", "slide", "_c_"]
