"""Maps of annotated slides are scored, from the command line to `evaluation_slides.json`."""

import json
import shutil
from pathlib import Path

import pytest

import histo_jax
from histo_jax import slide_evaluation
from histo_jax.config import Config
from histo_jax.data import splits
from histo_jax.data.records import prepare
from histo_jax.data.slide_tables import AnnotatedSlide
from histo_jax.errors import ConfigError, DataError
from histo_jax.metrics import intervals
from histo_jax.predictor import Predictor
from histo_jax.run.workdir import Workdir

shapely = pytest.importorskip("shapely", reason="the extra slides is not installed")
pytest.importorskip("tifffile", reason="the extra slides is not installed")

# Cells of 64 pixels; the annotated square is 249 micrometres wide.
HALF = 0.486
SQUARE = (64, 64, 64 + 512, 64 + 512)
GREY = (110, 60, 110)


def annotate(path, **shapes):
    features = [
        {"geometry": json.loads(shapely.to_geojson(shape)),
         "properties": {"classification": {"name": name}}}
        for name, shape in shapes.items()
    ]  # fmt: skip
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 100)


@pytest.fixture(scope="module")
def slides(write_slide, tissue_pixels, tmp_path_factory):
    """A dark lesion, a normal slide with a grey cell, and a lesion that looks normal.

    On the third slide a dark cell takes no part, and isolated cells are annotated.
    """
    folder = tmp_path_factory.mktemp("annotated")
    write_slide(folder / "dark.tif", tissue_pixels(832, 896, (64, 64, 512)), HALF)
    annotate(folder / "dark.geojson", Tumor=shapely.box(*SQUARE))
    pixels = tissue_pixels(640, 704)
    pixels[128:192, 256:320] = GREY
    write_slide(folder / "normal.tif", pixels, HALF)
    write_slide(folder / "pale.tif", tissue_pixels(832, 896, (768, 64, 64)), HALF)
    isolated, ignored = shapely.box(700, 700, 800, 800), shapely.box(760, 60, 840, 130)
    tumour = shapely.union_all([shapely.box(*SQUARE), isolated])
    annotate(folder / "pale.geojson", **{"Tumor": tumour, "Ignore*": ignored, "Other": ignored})
    table = "slide,annotation\ndark.tif,dark.geojson\nnormal.tif,\npale.tif,pale.geojson\n"
    (folder / "slides.csv").write_text(table)
    return folder


@pytest.fixture(scope="module")
def own_run(run, tmp_path_factory):
    return shutil.copytree(run, tmp_path_factory.mktemp("run") / "run")


def read_result(folder):
    return json.loads((folder / "evaluation_slides.json").read_text())


@pytest.fixture
def command(run_command, own_run, slides):
    def run(*options, place=slides):
        return run_command(f"--workdir={own_run}", "--mode=evaluate",
                           f"--config.evaluate.slides={place}", *options)  # fmt: skip

    return run


def test_slides_are_scored(command, own_run):
    """Highest first: the dark lesion, the grey cell (a false positive), then everything else."""
    ended = command()
    assert ended.status == 0
    result = read_result(own_run)
    expected = {"slides": 3, "positive_slides": 2, "lesions": 2, "isolated_cells": 1,
                "lesions_found": 1, "false_positives": 1, "sensitivity_at_0.25_fp": 0.5,
                "slide_auc": 0.5, "interval_over": "slides", "resampled": 3, "threshold": 0.5,
                "slide_disjoint": None}  # fmt: skip
    assert {name: result[name] for name in expected} == expected
    assert 0.5 <= result["froc"] <= 1
    assert result["froc_low"] <= result["froc"] <= result["froc_high"]
    dark, normal, pale = result["per_slide"]
    assert dark["probability"] > normal["probability"] > 0.5 > pale["probability"]
    assert [row["name"] for row in (dark, normal, pale)] == ["dark", "normal", "pale"]
    assert [row["lesions_found"] for row in (dark, normal, pale)] == [1, 0, 0]
    assert [row["false_positives"] for row in (dark, normal, pale)] == [0, 1, 0]
    assert "on 3 slides with 2 lesions" in ended.stderr
    assert "was not checked" in ended.stderr

    ended = command("--config.evaluate.positive=Tumor", "--config.evaluate.exclude=other")
    assert ended.stderr.count("is finished: skipped") == 3
    assert read_result(own_run) == result


def test_what_cannot_be_computed_is_null(own_run, slides, tmp_path):
    """The same maps are used again."""
    for text, known, reason in (
        (f"{slides}/normal.tif,", None, "froc is not known: there are no lesions; slide_auc"),
        (f"{slides}/dark.tif,{slides}/dark.geojson", 1.0, "slide_auc is not known: no slide is"),
    ):
        table = tmp_path / "slides.csv"
        table.write_text(f"slide,annotation\n{text}\n")
        config = Workdir(own_run).saved_config().to_config()
        config.evaluate.slides = str(table)
        histo_jax.evaluate(config, own_run)
        result = read_result(own_run)
        assert (result["froc"], result["slide_auc"], result["froc_low"]) == (known, None, None)
        assert reason in result["note"]


def test_slides_that_were_trained_on_are_left_out(own_run, slides, monkeypatch, log):
    config = Workdir(own_run).saved_config().to_config()
    config.evaluate.slides = str(slides)
    monkeypatch.setattr(slide_evaluation, "_trained_on", lambda _: {slides / "dark.tif"})
    result = histo_jax.evaluate(config, own_run)
    assert [row["name"] for row in result["per_slide"]] == ["normal", "pale"]
    assert result["slide_disjoint"] is True
    assert "1 of 3 slides are left out" in log.text
    monkeypatch.setattr(slide_evaluation, "_trained_on", lambda _: set(slides.glob("*.tif")))
    with pytest.raises(DataError, match="trained on all 3 slides"):
        histo_jax.evaluate(config, own_run)


def test_slides_are_known_by_their_files(slides, tmp_path, write_slide, tissue_pixels):
    """A folder is trained on; then all are evaluated, where names need their folders."""
    part, other = tmp_path / "all/part", tmp_path / "all/other"
    for folder in (part, other):
        folder.mkdir(parents=True)
        write_slide(folder / "dark.tif", tissue_pixels(64, 64 * len(folder.name)), HALF)
    copied = shutil.copy(part / "dark.tif", tmp_path)
    listed = [
        AnnotatedSlide(Path(path), None, str(path))
        for path in (part / "dark.tif", other / "dark.tif", copied)
    ]
    kept = slide_evaluation._leave_out(listed, {part / "dark.tif"}, tmp_path)
    assert kept == listed[1:2]
    moved = {tmp_path / "moved/Dark.svs"}
    normal = AnnotatedSlide(slides / "normal.tif", None, "normal")
    assert slide_evaluation._leave_out([*listed, normal], moved, tmp_path) == [normal]


def test_slides_of_the_training_patches_are_known(slides, predictor, tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text(
        f"slide,annotation,split\n{slides}/dark.tif,{slides}/dark.geojson,train\n"
        f"{slides}/normal.tif,,train\n{slides}/pale.tif,{slides}/pale.geojson,validation\n"
    )
    config = Config()
    config.data.source, config.data.table, config.data.positive = "slides", str(table), "Tumor"
    config.data.tfds_dir, config.data.per_slide = str(tmp_path), 20
    prepared = prepare(config.data, 0)
    subsets = splits.make_subsets(prepared.tables, config.data, 0)
    fingerprint = splits.fingerprint(prepared.tables, subsets, 0, config.fit.batch_size)
    trained = predictor.trained[0]._replace(
        config=config, run=str(tmp_path), fingerprint=fingerprint
    )
    expected = {slides / "dark.tif", slides / "normal.tif"}
    assert slide_evaluation._trained_on(Predictor([trained])) == expected
    other = trained._replace(fingerprint="of other patches")
    assert slide_evaluation._trained_on(Predictor([trained, other])) is None
    assert slide_evaluation._trained_on(predictor) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config.evaluate.positive=Tumour",), "did you mean Tumor?"),
        (("--config.evaluate.positive=",), "must be the name of a class"),
        (("--config.evaluate.slides=gs://bucket/slides",), "not a URL"),
        (("--config.evaluate.slides=missing",), "no such file or folder"),
    ],
)
def test_wrong_settings(options, message, command):
    ended = command(*options)
    assert ended.status == 2
    assert message in ended.stderr.strip().splitlines()[-1]


def test_an_ensemble_is_scored(own_run, slides, tmp_path):
    """Its folder becomes that of the ensemble, whose next evaluation is of the split."""
    config = Config()
    config.predict.checkpoints, config.evaluate.slides = f"{own_run}", str(slides)
    config.heatmap.stride = 320
    result = histo_jax.evaluate(config, tmp_path / "ensemble")
    assert result["slides"] == read_result(tmp_path / "ensemble")["slides"] == 3
    saved = Workdir(tmp_path / "ensemble").saved_config().to_config()
    assert saved.predict.checkpoints == str(own_run)
    assert saved.evaluate.slides is None


def test_several_processes_are_refused(own_run, slides, monkeypatch):
    config = Workdir(own_run).saved_config().to_config()
    config.evaluate.slides = str(slides)
    monkeypatch.setattr(slide_evaluation.jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="needs one process"):
        histo_jax.evaluate(config, own_run)


def test_wrong_files(command, slides, tmp_path, own_run):
    """One line each, and the scores of before stay."""
    (own_run / "evaluation_slides.json").write_text("before")
    place = shutil.copytree(slides, tmp_path / "slides")
    (place / "slides.csv").unlink()
    (place / "pale.geojson").write_text("{")
    ended = command(place=place)
    assert "pale.geojson is no GeoJSON that can be read" in ended.stderr.splitlines()[-1]
    annotate(place / "pale.geojson")
    ended = command(place=place)
    assert "pale.geojson has no polygons" in ended.stderr.splitlines()[-1]
    annotate(place / "pale.geojson", Tumor=shapely.box(*SQUARE))
    (place / "pale.tif").write_bytes(b"no slide")
    ended = command(place=place)
    assert ended.status == 2
    assert "pale.tif is not a slide that can be read" in ended.stderr.splitlines()[-1]
    assert (own_run / "evaluation_slides.json").read_text() == "before"
