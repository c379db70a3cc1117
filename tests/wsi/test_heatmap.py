"""From a slide to its files: every output, by coordinates, by content and by resuming."""

import copy
import json
import os
import signal
import uuid

import jax
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histo_jax
from histo_jax.config import HeatmapConfig
from histo_jax.data.example import PatchSpec
from histo_jax.errors import ConfigError, UserError
from histo_jax.predictor import Predictor
from histo_jax.run import folders, signals
from histo_jax.slides import grid as grids
from histo_jax.slides import reader, resolution, scaling, search
from histo_jax.wsi import heatmap, results, slide_map

shapely = pytest.importorskip("shapely", reason="the extra slides is not installed")
tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")

# Level 0 of half the network's 0.972 micrometres, so that level 1 is taken as it is.
HALF = 0.486


@pytest.fixture(scope="package")
def square_slide(write_slide, tissue_pixels, tmp_path_factory):
    """A slide of 750 x 650 pixels with a dark square that fills cell (row 5, column 9)."""
    path = tmp_path_factory.mktemp("slides") / "square slide.tif"
    return write_slide(path, tissue_pixels(650, 750, (9 * 64, 5 * 64, 64)), HALF, levels=2)


@pytest.fixture(scope="package")
def square_map(square_slide, predictor, tmp_path_factory):
    """The folder of its results."""
    out = tmp_path_factory.mktemp("maps")
    table = histo_jax.heatmap(predictor, square_slide, out)
    assert list(table["error"]) == [""]
    return out / "square_slide"


def read_cells(folder):
    return pd.read_csv(folder / "cells.csv")


def features(path):
    content = json.loads(path.read_text())
    assert content["type"] == "FeatureCollection"
    return content["features"]


def test_a_square_is_found_in_every_output(square_map):
    cells = read_cells(square_map)
    top = cells.loc[cells["probability"].idxmax()]
    assert list(top[["x", "y", "width", "height"]]) == [576, 320, 64, 64]
    summary = json.loads((square_map / "slide.json").read_text())
    threshold = summary["threshold"]
    assert (cells["probability"] >= threshold).sum() == 1 == summary["regions"]

    values = tifffile.imread(square_map / "heatmap.ome.tif")
    assert np.unravel_index(np.nanargmax(values), values.shape) == (5, 9)

    positive = [f for f in features(square_map / "cells.geojson")
                if f["properties"]["classification"]["name"] == "Tumor"]  # fmt: skip
    (region,) = features(square_map / "regions.geojson")
    for feature in (*positive, region):
        assert shapely.from_geojson(json.dumps(feature)).bounds == (576, 320, 640, 384)
    measurements = region["properties"]["measurements"]
    assert measurements["Area mm^2"] == pytest.approx((64 * HALF / 1000) ** 2, rel=1e-3)
    assert measurements["Cells"] == 1

    colours = np.asarray(Image.open(square_map / "map.png")).astype(int)
    assert np.unravel_index(colours[..., 0].argmax(), values.shape) == (5, 9)
    overlay = np.asarray(Image.open(square_map / "overlay.png")).astype(int)
    vermillion = (overlay == (213, 94, 0)).all(2)[:, :774]
    rows, columns = np.nonzero(vermillion)
    assert (columns.min() - 24, rows.min() - 36) == (576, 320)
    assert (columns.max() - 23, rows.max() - 35) == (640, 384)


def test_cells_tile_the_slide_and_are_clipped(square_map):
    cells = read_cells(square_map)
    assert len(cells) == 12 * 11
    assert (cells["width"] * cells["height"]).sum() == 750 * 650
    assert set(cells["width"]) == {64, 750 - 11 * 64}
    assert (cells["x"] % 64 == 0).all()


@pytest.mark.parametrize("size", [(800, 1210), (97, 1333)])
@pytest.mark.parametrize("mpp", [HALF, 0.31])
def test_the_map_equals_the_predictor_window_by_window(
    size, mpp, predictor, write_slide, tissue_pixels, tmp_path, monkeypatch
):
    """Blocks of 7 x 7 cells, so that many borders are crossed."""
    monkeypatch.setattr(grids, "_BLOCK_PIXELS", 96 + 6 * 32)
    path = write_slide(tmp_path / "a.tif", tissue_pixels(*size, (60, 20, 40)), mpp, levels=2)
    table = histo_jax.heatmap(predictor, path, tmp_path / "out", HeatmapConfig(tissue="all"))
    cells = read_cells(tmp_path / "out/a")
    with reader.open_slide(path) as slide:
        scale = resolution.choose_scale(slide, resolution.slide_spacing(slide, None), 0.972)
        windows, corners = [], []
        grid = grids.Grid(96, 32, 32, scale.full, slide.size)
        for row in range(grid.shape[0]):
            for column in range(grid.shape[1]):
                corner = column * 32 - 32, row * 32 - 32
                windows.append(scaling.read_scaled(slide, scale, *corner, 96, 96))
                corners.append((column * 32 * scale.full[0], row * 32 * scale.full[1]))
    assert table["cells"].item() == len(windows) == len(cells)
    np.testing.assert_allclose(cells["probability"], predictor(np.stack(windows)), atol=1e-5)
    np.testing.assert_allclose(cells[["x", "y"]], corners, atol=0.5001)
    assert np.ptp(cells["probability"]) > 0.01


def test_labelled_patches_in_a_mosaic(predictor, write_slide, sample, tmp_path):
    """Cells at the centres of real patches equal the predictor on these patches."""
    paths = sorted((sample / "kaggle_sample/train").glob("*.tif"))[:30]
    patches = np.stack([np.asarray(Image.open(path)) for path in paths])
    mosaic = patches.reshape(5, 6, 96, 96, 3).swapaxes(1, 2).reshape(480, 576, 3)
    slide = write_slide(tmp_path / "mosaic.tif", mosaic, 0.972, levels=2)
    histo_jax.heatmap(predictor, slide, tmp_path / "out", HeatmapConfig(tissue="all"))
    values = tifffile.imread(tmp_path / "out/mosaic/heatmap.ome.tif")
    np.testing.assert_allclose(values[1::3, 1::3].ravel(), predictor(patches), atol=1e-5)


def test_geojson_is_what_qupath_documents(square_map):
    cells = read_cells(square_map)
    found = features(square_map / "cells.geojson")
    assert len(found) == len(cells)
    names = set()
    for feature, cell in zip(found, cells.itertuples(), strict=True):
        assert set(feature) == {"type", "id", "geometry", "properties"}
        assert feature["type"] == "Feature"
        names.add(str(uuid.UUID(feature["id"])))
        (ring,) = feature["geometry"]["coordinates"]
        assert feature["geometry"]["type"] == "Polygon"
        assert ring[0] == ring[-1]
        assert len(ring) == 5
        shape = shapely.from_geojson(json.dumps(feature))
        assert shape.is_valid
        right, bottom = cell.x + cell.width, cell.y + cell.height
        assert shape.bounds == (cell.x, cell.y, right, bottom)
        properties = feature["properties"]
        assert properties["objectType"] == "tile"
        assert len(properties["classification"]["color"]) == 3
        assert properties["measurements"] == {"Probability": pytest.approx(cell.probability)}
    assert len(names) == len(found)
    (region,) = features(square_map / "regions.geojson")
    assert region["properties"]["objectType"] == "annotation"


def test_ome_tiff(square_map):
    with tifffile.TiffFile(square_map / "heatmap.ome.tif") as file:
        assert file.is_ome
        page = file.pages[0]
        assert (page.is_tiled, page.dtype, page.shape) == (True, np.float32, (11, 12))
        pixels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
        assert pixels["PhysicalSizeX"] == pytest.approx(32 * 0.972, rel=1e-3)
        assert pixels["PhysicalSizeXUnit"] == "µm"
    values = tifffile.imread(square_map / "heatmap.ome.tif")
    cells = read_cells(square_map)
    np.testing.assert_allclose(values[~np.isnan(values)], cells["probability"], rtol=1e-6)


def test_pyramid_levels_are_means_without_nan(tmp_path):
    from histo_jax.wsi import pyramid

    values = np.random.default_rng(0).random((200, 131)).astype(np.float32)
    values[:60] = np.nan
    values[100, 100] = np.nan
    grid = grids.Grid(96, 32, 32, (4.0, 4.0), (131 * 128, 200 * 128))
    pyramid.write(tmp_path / "a.ome.tif", values, grid, reader.Spacing(0.25, 0.25, ""), "a")
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        levels = [level.asarray() for level in file.series[0].levels]
    assert [level.shape for level in levels] == [(200, 131), (100, 66), (50, 33)]
    assert np.isnan(levels[1][:30]).all()
    assert levels[1][40, 40] == pytest.approx(values[80:82, 80:82].mean())
    assert levels[1][50, 50] == pytest.approx(np.nanmean(values[100:102, 100:102]))


def test_glass_gives_an_empty_map(predictor, write_slide, tmp_path, log):
    pixels = np.full((300, 400, 3), 245, np.uint8)
    slide = write_slide(tmp_path / "glass.tif", pixels, HALF)
    table = histo_jax.heatmap(predictor, slide, tmp_path / "out")
    assert table["cells"].item() == 0
    assert "no tissue was found" in log.text
    assert (tmp_path / "out/glass/cells.csv").read_text().count("\n") == 1
    assert features(tmp_path / "out/glass/cells.geojson") == []
    assert np.isnan(tifffile.imread(tmp_path / "out/glass/heatmap.ome.tif")).all()
    assert "no tissue found" in (tmp_path / "out/index.html").read_text()


def test_strides_sample_the_tissue(predictor, square_slide, tmp_path):
    options = HeatmapConfig(tissue="all", stride=96, threshold=0.01)
    table = histo_jax.heatmap(predictor, square_slide, tmp_path, options)
    assert (table["rows"].item(), table["columns"].item()) == (4, 4)
    cells = read_cells(tmp_path / "square_slide")
    assert set(cells["x"]) == {192 * column for column in range(4)}
    assert cells["width"].max() == 64
    # All cells are positive, and each stands for its stride.
    assert table["regions_mm2"].item() == pytest.approx(750 * 650 * HALF**2 / 1e6, rel=1e-3)
    with pytest.raises(ConfigError, match="multiple of the cell, 32"):
        histo_jax.heatmap(predictor, square_slide, tmp_path, HeatmapConfig(stride=48))


def test_masks_choose_the_cells(predictor, square_slide, tmp_path):
    """Of two slides with a folder of masks, one has no mask; one mask fits no two slides."""
    masks, slides = tmp_path / "masks", [square_slide, tmp_path / "b.tif"]
    masks.mkdir()
    slides[1].write_bytes(square_slide.read_bytes())
    mask = np.zeros((650, 750), np.uint8)
    mask[5 * 64 + 10, 9 * 64 + 10] = 255
    Image.fromarray(mask).save(masks / "square slide.png")
    options = HeatmapConfig(tissue=str(masks))
    table = histo_jax.heatmap(predictor, slides, tmp_path / "out", options)
    assert table["cells"].iloc[0] == 1
    assert list(read_cells(tmp_path / "out/square_slide")[["x", "y"]].iloc[0]) == [576, 320]
    assert "add b.png" in table["error"].iloc[1]
    options = HeatmapConfig(tissue=str(masks / "square slide.png"))
    with pytest.raises(ConfigError, match="one mask for 2 slides"):
        histo_jax.heatmap(predictor, slides, tmp_path / "out", options)


@pytest.mark.parametrize("full", [1.0, 1.9479, 3.846, 4.0, 0.81])
@pytest.mark.parametrize("side", [1, 31, 32, 33, 127, 128, 129, 1000, 2967])
def test_cells_tile_any_slide(full, side):
    grid = grids.Grid(96, 32, 32, (full, full), (side, side))
    columns = np.arange(grid.shape[1])
    x, _, width, _ = grid.rectangles(columns * 0, columns)
    assert (x[0], x[-1] + width[-1]) == (0, side)
    np.testing.assert_array_equal(x[1:], (x + width)[:-1])
    assert width.min() >= 1


def test_cells_of_other_networks():
    whole = grids.Grid(224, PatchSpec(224).cell, 224, (1.0, 1.0), (1000, 1000))
    assert (whole.cell, whole.margin, whole.shape) == (224, 0, (5, 5))
    assert whole.block_pixels == 4 * 224
    small = grids.Grid(64, PatchSpec(64, 32).cell, 32, (1.0, 1.0), (1000, 1000))
    assert (small.cell, small.margin, small.shape) == (32, 16, (32, 32))


def test_qupath_origin_is_that_of_the_bounds(predictor, sample, tmp_path, monkeypatch):
    """The mask's file states bounds from row 512; QuPath shows only these."""
    slide = sample / "slides/odd/gc_no_dzi_mask.tif"
    monkeypatch.setattr(slide_map, "_THUMBNAIL", 200)
    options = HeatmapConfig(tissue="all", stride=512)
    histo_jax.heatmap(predictor, slide, tmp_path, options)
    cells, found = read_cells(tmp_path / slide.stem), tmp_path / slide.stem / "cells.geojson"
    first = shapely.from_geojson(json.dumps(features(found)[0])).bounds
    assert first[1] == cells["y"].iloc[0] - 512
    assert first[0] == cells["x"].iloc[0]


def test_finished_slides_are_skipped_until_something_changes(
    predictor, square_slide, tmp_path, log
):
    def make(**options):
        log.clear()
        histo_jax.heatmap(predictor, square_slide, tmp_path, HeatmapConfig(**options))
        return log.text

    first = make(stride=320)
    assert "skipped" not in first
    before = (tmp_path / "square_slide/cells.geojson").read_bytes()
    assert "square_slide is finished: skipped" in make(stride=320)
    assert "made again" in make(stride=320, threshold=0.9)
    assert "made again" in make(stride=320)
    assert (tmp_path / "square_slide/cells.geojson").read_bytes() == before
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_broken_slide_does_not_stop_the_others(run_command, run, square_slide, tmp_path, sample):
    """Through the command line: status 2 at the end, and the failure on the page."""
    broken = tmp_path / "broken.svs"
    broken.write_text("no slide")
    table = tmp_path / "slides.csv"
    table.write_text(f"slide,mpp\n{broken},0.5\nmissing.svs,\n{square_slide},{HALF}\n")
    options = (f"--workdir={run}", "--mode=heatmap", f"--config.heatmap.slides={table}",
               "--config.heatmap.stride=320", "--config.heatmap.threshold=0.7")  # fmt: skip
    ended = run_command(*options)
    assert ended.status == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("histo_jax: 2 of 3 slides failed")
    assert str(broken) in last
    folder = run / "heatmaps"
    assert (folder / "square_slide/slide.json").exists()
    page = (folder / "index.html").read_text()
    assert "2 slides failed" in page
    assert "missing.svs cannot be opened" in page
    table.write_text(f"slide,mpp\n{square_slide},{HALF}\n")
    ended = run_command(*options)
    assert ended.status == 0
    assert "skipped" in ended.stderr


def test_any_error_of_one_slide_does_not_stop_the_others(
    predictor, square_slide, tmp_path, monkeypatch
):
    """Each kind of error comes from one slide's pixels; the last slide is whole."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("bug", "memory", "gone", "whole", "caf\udce9"):
        (slides / f"{name}.tif").write_bytes(square_slide.read_bytes())
    view = slide_map.make_view

    def spoiled(slide, *arguments):
        if slide.path.stem == "bug":
            raise ValueError("a <b>\nlibrary")
        if slide.path.stem == "memory":
            raise MemoryError
        return view(slide, *arguments)

    def opened(path, original=reader.open_slide):
        slide = original(path)
        if path.stem == "gone":
            path.unlink()
        return slide

    monkeypatch.setattr(slide_map, "make_view", spoiled)
    monkeypatch.setattr(reader, "open_slide", opened)
    out, options = tmp_path / "out", HeatmapConfig(stride=320)
    table = histo_jax.heatmap(predictor, slides, out, options).set_index("name")
    errors = table["error"]
    assert list(errors[errors != ""].index) == ["bug", "gone", "memory"]
    assert "failed with ValueError (a <b> library)" in errors["bug"]
    assert "needs more memory" in errors["memory"]
    assert "gone.tif cannot be read (No such file" in errors["gone"]
    assert table["cells"]["whole"] > 0
    assert table["slide"]["caf_"].endswith("caf\\udce9.tif")
    kept = json.loads((out / ".failed/bug.json").read_text())
    assert "in spoiled" in kept["traceback"]
    assert "a &lt;b&gt; library" in (out / "index.html").read_text()
    assert "<b>" not in (out / "index.html").read_text()
    # What the next slide would meet as well ends the command.
    for error in (OSError("disk"), ConfigError("setting"), jax.errors.JaxRuntimeError("device")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(slide_map, "make_view", fail)
        with pytest.raises(type(error)):
            histo_jax.heatmap(predictor, square_slide, out, options)


def test_each_process_makes_its_share(predictor, tmp_path, monkeypatch):
    """Real processes do in `test_heatmap_processes.py`, which takes longer."""
    made = []

    def make_one(predictor, slide, settings, folder, position):
        made.append((jax.process_index(), folder.name, position))
        return {}

    monkeypatch.setattr(heatmap, "_make_one", make_one)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    slides = [search.SlideFile(tmp_path / name / "a.svs") for name in "abcde"]
    settings = heatmap._settings(predictor, HeatmapConfig(), tmp_path)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        heatmap._make_share(predictor, slides, settings, tmp_path)
    assert made == [
        (0, "a", "1/3"), (0, "a-3", "2/3"), (0, "a-5", "3/3"), (1, "a-2", "1/2"), (1, "a-4", "2/2"),
    ]  # fmt: skip


def test_two_commands_do_not_share_a_folder(predictor, square_slide, tmp_path):
    with results.locked(tmp_path), pytest.raises(UserError, match="in use by another heatmap"):
        histo_jax.heatmap(predictor, square_slide, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pixels", [(1, 1), (700, 1), (1, 700), (40, 50)])
def test_slides_smaller_than_a_window(pixels, predictor, write_slide, tissue_pixels, tmp_path):
    slide = write_slide(tmp_path / "a.tif", tissue_pixels(*pixels), HALF)
    table = histo_jax.heatmap(predictor, slide, tmp_path / "out", HeatmapConfig(tissue="all"))
    height, width = (max(1, -(-side // 64)) for side in pixels)
    assert (table["rows"].item(), table["columns"].item()) == (height, width)
    assert table["cells"].item() == height * width
    cells = read_cells(tmp_path / "out/a")
    assert (cells["width"] * cells["height"]).sum() == pixels[0] * pixels[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "config.heatmap.slides is empty"),
        (("--config.heatmap.slides=no.svs",), "no.svs does not exist"),
        (("--config.heatmap.threshold=2",), "above 0 and below 1"),
        (("--config.heatmap.threshold=nan",), "above 0 and below 1"),
        (("--config.heatmap.mpp=0",), "above 0 and finite"),
        (("--config.heatmap.slides=.", "--config.heatmap.mpp=1e-9"), "0.02 to 50"),
        (("--config.heatmap.slides=.", "--config.heatmap.tissue=no.png"), "does not exist"),
    ],
)
def test_wrong_settings(options, message, run, run_command, square_slide, monkeypatch):
    monkeypatch.chdir(square_slide.parent)
    ended = run_command(f"--workdir={run}", "--mode=heatmap", *options)
    assert ended.status == 2
    assert message in ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "name"), [(slide_map, "thumbnail"), (slide_map.probabilities, "compute")]
)
def test_sigterm_leaves_nothing_half_written(
    module, name, predictor, square_slide, tmp_path, monkeypatch
):
    """The signal comes while the slide is read; the rerun makes it."""
    original = getattr(module, name)

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    options = HeatmapConfig(stride=64)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        with pytest.raises(signals.Preempted) as caught:
            histo_jax.heatmap(predictor, square_slide, tmp_path, options)
    assert caught.value.code == 75
    assert [path.name for path in tmp_path.iterdir()] == []
    histo_jax.heatmap(predictor, square_slide, tmp_path, options)
    assert (tmp_path / "square_slide/slide.json").exists()


@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.parametrize("number", range(8))
def test_a_kill_leaves_the_old_results_or_the_new(number, tmp_path):
    """An exception that nothing handles, at each step of the replacement, stands for SIGKILL."""
    folder = tmp_path / "a"
    with folders.replacing(folder) as part:
        (part / "slide.json").write_text('{"format": 1, "slide": "a", "inputs": 1}')
    pid = os.fork()
    if not pid:
        count = 0

        def die(event, arguments):
            nonlocal count
            if event in ("os.rename", "open", "os.mkdir", "shutil.rmtree"):
                count += 1
                if count > number:
                    os._exit(9)

        import sys

        sys.addaudithook(die)
        with folders.replacing(folder) as part:
            (part / "slide.json").write_text('{"format": 1, "slide": "a", "inputs": 2}')
            (part / "cells.csv").write_text("x")
        os._exit(0)
    os.waitpid(pid, 0)
    folders.recover(folder)
    summary = results.read_summary(folder)
    assert summary is None or summary["inputs"] == 1 or (folder / "cells.csv").exists()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_threshold_of_evaluation_moves_with_the_prior(predictor, monkeypatch, run):
    scores = {"checkpoint_step": predictor.trained[0].step, "threshold_at_95_specificity": 0.4}
    monkeypatch.setattr(heatmap.evaluation_files, "read_scores", lambda *_: scores)
    assert heatmap.decision_threshold(predictor, None, run)[0] == 0.4
    assert heatmap.decision_threshold(predictor, 0.3, run) == (0.3, "given")
    rare = histo_jax.load(run, prior=0.01)
    logits = np.array([[-0.2, 0.0, 0.3, 1.0]], np.float32)
    is_positive = predictor.calibrate(logits)[0] >= np.log(0.4 / 0.6)
    moved = heatmap.decision_threshold(rare, None, run)[0]
    np.testing.assert_array_equal(rare.calibrate(logits)[0] >= np.log(moved / (1 - moved)),
                                  is_positive)  # fmt: skip


def test_networks_without_a_scale_are_refused(predictor, square_slide, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor, "patch", PatchSpec(96, 32, None))
    with pytest.raises(ConfigError, match=r"config\.data\.mpp"):
        histo_jax.heatmap(predictor, square_slide, tmp_path)


def test_maps_use_the_name_of_the_positive_class(predictor, square_slide, tmp_path):
    trained = predictor.trained[0]
    config = copy.deepcopy(trained.config)
    config.data.source, config.data.positive = "images", "<b>a long name"
    own = Predictor([trained._replace(config=config)], batch_size=32)
    histo_jax.heatmap(own, square_slide, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("probability of &lt;b&gt;a long name") == 2
    assert "tumour" not in page
    (region,) = features(tmp_path / "square_slide/regions.geojson")
    assert region["properties"]["classification"]["name"] == "<b>a long name"
    # Corrected areas are read again by the classes that are positive.
    config.data.source, config.data.positive = "slides", " Tumor, Metastasis"
    assert heatmap._settings(own, HeatmapConfig(), tmp_path).positive == "Tumor"


def test_the_page_lists_the_most_suspicious_slide_first(
    predictor, write_slide, tissue_pixels, tmp_path
):
    slides = tmp_path / "slides"
    slides.mkdir()
    write_slide(slides / "a.tif", tissue_pixels(300, 300), HALF)
    write_slide(slides / "b.tif", tissue_pixels(300, 300, (64, 64, 128)), HALF)
    table = histo_jax.heatmap(predictor, slides, tmp_path / "out")
    assert list(table["name"]) == ["a", "b"]
    page = (tmp_path / "out/index.html").read_text()
    assert page.index('id="b"') < page.index('id="a"')
    assert "http" not in page
