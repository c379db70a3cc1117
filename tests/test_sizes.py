"""Patches of other sizes than 96x96 go through every part."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import histo_jax
from histo_jax.config import Config
from histo_jax.data import leakage, near_duplicates, overlap, records, splits
from histo_jax.data.example import Example, PatchSpec
from histo_jax.data.loader import read_size
from histo_jax.errors import DataError, UserError
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.predictor import Predictor, TrainedModel, load, read_best
from histo_jax.report import explain, patches
from histo_jax.training import augmentation

SIZES = (32, 64, 224, 256, 512)

pytestmark = pytest.mark.usefixtures("unregister")


def draw(size, count=24, seed=0):
    images = np.random.default_rng(seed).integers(150, 230, (count, size, size, 3), np.uint8)
    images[1::2] -= 60
    return images


def register(images, test=(), **attributes):
    """Registers a source of these images; every second one has tumour, four are of one slide."""

    def splits(_):
        train = [Example(f"p{k}", image, k % 2, f"s{k // 4}") for k, image in enumerate(images)]
        return {"train": train, **({"test": list(test)} if test else {})}

    body = {"__init__": lambda self, data: None, "splits": splits, **attributes}
    histo_jax.register_source("sized")(type("Sized", (), body))


@pytest.fixture
def config(tmp_path):
    runpy.run_path(str(Path(__file__).with_name("tiny_network.py")))
    config = Config()
    config.data.source, config.data.tfds_dir = "sized", str(tmp_path / "records")
    config.data.validation_fraction = 0.3
    config.model.name = "tiny"
    config.fit.batch_size, config.fit.epochs, config.predict.batch_size = 8, 1, 8
    config.augment.shift = 4
    return config


@pytest.mark.parametrize(("size", "region"), [(32, None), (224, 56)])
def test_every_command_works_at_every_size(size, region, config, tmp_path):
    images = draw(size)
    test = [Example(f"t{k}", image, -1) for k, image in enumerate(draw(size, 3, seed=1))]
    register(images, test)
    config.data.label_region = region
    run = tmp_path / "run"
    assert len(histo_jax.fit(config, run)) == 1
    assert histo_jax.evaluate(config, run)["count"] >= 4
    assert histo_jax.predict(config, run)["id"].tolist() == ["t0", "t1", "t2"]
    histo_jax.audit(config, run)
    histo_jax.report(config, run)
    html = (run / "report.html").read_text()
    assert f'width="{size}" height="{size}"' in html
    assert ("Frame:" in html) == (region is not None)
    config.explain.ids = "p0"
    explain(config, run)
    sheet = np.asarray(Image.open(run / "explain" / "p0.png"))
    scale = {32: 12, 224: 2}[size]
    left = sheet[::scale, : size * scale : scale]
    differs = np.argwhere((left != images[0]).any(-1))
    if region is None:
        assert not len(differs)
    else:  # nothing but the frame, around the region
        assert set(differs.ravel()[[0, -1]]) <= {(size - region) // 2, (size + region) // 2}
    predictor = load(run)
    assert predictor.patch == PatchSpec(size, region)
    assert predictor(images[:3]).shape == (3,)
    with pytest.raises(ValueError, match=rf"expected uint8\[n, {size}, {size}, 3\]"):
        predictor(draw(96, 1))
    if size > 64:
        return
    # Other patches under the same names: the network has no layer that would notice.
    config.data.tfds_dir = str(tmp_path / "other")
    register(draw(64))
    for command in (histo_jax.fit, histo_jax.evaluate):
        with pytest.raises(UserError, match=f"{size}x{size} pixels, and those in .* have 64x64"):
            command(config, run)


@pytest.mark.parametrize("name", ["five_block", "five_block_p4m", "resnet18"])
def test_networks_take_every_size(name):
    config = Config().model
    config.name = name
    model = create_model(config)
    for size in SIZES:
        images = jax.ShapeDtypeStruct((2, size, size, 3), "float32")
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        assert jax.eval_shape(model.apply, variables, images).shape == (2,)


def test_shifts_move_small_patches_by_a_few_pixels():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[:, 16, 16] = 255
    for seed in range(8):
        shifted = np.asarray(
            augmentation.random_shift(jax.random.key(seed), jax.numpy.asarray(image), 4)
        )
        row, column = np.argwhere(shifted[0, ..., 0])[0]
        assert shifted.shape == image.shape
        assert max(abs(row - 16), abs(column - 16)) <= 4


@pytest.mark.parametrize("size", SIZES)
def test_rotated_copies_are_near_duplicates_and_memory_stays_flat(size):
    coarse = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    images = coarse.repeat(size // 16, 1).repeat(size // 16, 2)
    hashes, contrast = near_duplicates.hash_images(images)
    rotated, _ = near_duplicates.hash_images(np.rot90(images, axes=(1, 2)).copy())
    assert (contrast > near_duplicates.BLANK).all()
    rows, found, distances = near_duplicates.nearest(hashes[:, 0], rotated)
    assert rows.tolist() == found.tolist() == [0, 1, 2]
    assert not distances.any()
    assert read_size(size) * size**2 <= 256 * 96**2


def test_squares_of_the_attribution_divide_every_size():
    for size in (32, 96, 160, 224, 512):
        image, adds = np.full((size, size, 3), 200, np.uint8), np.ones((size, size), np.float32)
        assert patches.draw_attribution(image, adds).shape == image.shape


def test_colours_are_counted_per_pixel_at_every_size(config):
    images = draw(32)
    images[0], images[3] = 255, 0
    register(images)
    prepared = records.prepare(config.data, config.data_seed)
    subsets = splits.make_subsets(prepared.tables, config.data, config.data_seed)
    described = leakage.audit(prepared, subsets, 0)["subsets"].values()
    assert sum(each["white"]["count"] for each in described) == 1
    assert sum(each["dark"]["count"] for each in described) == 1
    train = prepared.tables["train"]
    assert (
        len(overlap.shared_ids(train, train)) == len(images) - 2
    )  # patches of one colour excepted
    mean, _ = splits.channel_stats(train, np.arange(len(images)))
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)) / 255, rtol=1e-6)


REFUSED = {
    "several": ({}, [*draw(64, 4), *draw(32, 1)], "train split: patch p4 has 32x32 pixels and the"),
    "region": ({"label_region": 65}, draw(64, 4), "label_region = 65 is more than the 64 pixels"),
    "size": ({"image_size": 96}, draw(64, 4), "image_size = 96, but the patches of .* have 64x64"),
    "odd": ({}, draw(48, 4), r"uint8\[48, 48, 3\], not uint8\[size, size, 3\] with a size that is"),
}


@pytest.mark.parametrize(("settings", "images", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_line(settings, images, message, config):
    register(images)
    for name, value in settings.items():
        setattr(config.data, name, value)
    with pytest.raises(DataError, match=message) as error:
        records.prepare(config.data, config.data_seed)
    assert str(error.value).isprintable()


def test_sizes_of_the_built_in_sources_are_checked_before_their_data_is_read(config):
    config.data.source, config.data.image_size = "kaggle", 64
    with pytest.raises(DataError, match="'kaggle' have 96x96 pixels: leave it out"):
        records.prepare(config.data, config.data_seed)


def test_networks_of_other_sizes_or_scales_are_no_ensemble():
    def trained(run, *spec):
        return TrainedModel(run, Config(), None, None, Calibration(), 1, "", PatchSpec(*spec))

    with pytest.raises(UserError, match="a takes patches of 96 pixels and b of 224"):
        Predictor([trained("a", 96), trained("b", 224)])
    with pytest.raises(UserError, match=r"b takes patches of 0\.5 micrometres .* and c of 1\.0"):
        Predictor([trained("a", 96), trained("b", 96, 32, 0.5), trained("c", 96, 32, 1.0)])
    known = [trained("a", 96), trained("b", 96, 32, 0.972), trained("c", 96, 32, 1.0)]
    assert Predictor(known).patch == PatchSpec(96, None, 0.972)


def test_checkpoints_from_before_sizes_were_saved_are_of_96(config, save_run, tmp_path):
    register(draw(96))
    folder = save_run(config, tmp_path / "run", Calibration())
    (saved,) = folder.glob("checkpoints/*/data/metadata")
    content = json.loads(saved.read_text())
    assert content.pop("image_size") == 96
    saved.write_text(json.dumps(content))
    assert read_best(folder, config).patch == PatchSpec(96)
