"""From images of any number to probabilities, by one network or several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import expit, logit

import histo_jax
from histo_jax.config import Config, ModelConfig
from histo_jax.data.example import PatchSpec
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.models.forward import make_forward, normalise
from histo_jax.predictor import Predictor, TrainedModel, make_forward_tta
from histo_jax.preparation import prepare
from histo_jax.training.state import init_weights

SIZE = 8  # of a batch: two images on each of four devices
IMAGES = np.random.default_rng(0).integers(0, 256, (2 * SIZE + 1, 96, 96, 3), np.uint8)
CALIBRATIONS = (Calibration(2.0, 0.5, 0.4), Calibration(0.5, -1.0, 0.3))


class Tiny(nn.Module):
    """A network that is compiled in no time, and notes the shape of each batch it is traced for."""

    @nn.compact
    def __call__(self, x, train=False):
        if not self.is_initializing():
            TRACED.append(x.shape)
        x = nn.tanh(nn.Conv(2, (16, 16), 16)(x))
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


TRACED: list[tuple[int, ...]] = []


@pytest.fixture(autouse=True)
def _nothing_traced():
    TRACED.clear()


def make_trained(seed, model=None):
    model = model or Tiny()
    weights = init_weights(model, jax.random.key(seed), np.full(3, 0.5), np.full(3, 0.25), 96)
    calibration = CALIBRATIONS[seed % 2]
    return TrainedModel(
        f"run{seed}", Config(), model, weights, calibration, seed, "", PatchSpec(96)
    )


@pytest.fixture(scope="module")
def trained():
    return [make_trained(seed) for seed in (0, 1)]


def expected(trained, images, prior=None):
    """Calibrated logits of one network, by its formula."""
    logits = trained.model.apply(trained.weights.variables, normalise(trained.weights, images))
    return trained.calibration.apply(np.asarray(logits), prior)


@pytest.mark.parametrize("count", [0, 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 1])
def test_any_number_of_images(trained, count):
    predictor = Predictor(trained[:1], batch_size=SIZE)
    probabilities = predictor(IMAGES[:count])
    assert (probabilities.shape, probabilities.dtype) == ((count,), np.float64)
    np.testing.assert_allclose(
        logit(probabilities), expected(trained[0], IMAGES)[:count], rtol=1e-4, atol=1e-5
    )


def test_each_batch_size_is_compiled_once(trained):
    predictor = Predictor(trained, batch_size=SIZE)
    for count in (1, SIZE, 2 * SIZE + 1):
        predictor(IMAGES[:count])
    predictor.select(1)(IMAGES)
    assert TRACED == [(SIZE // 4, 96, 96, 3)]  # on each device, and both networks share it
    Predictor(trained[:1], batch_size=1)(IMAGES)
    assert TRACED[1:] == [(1, 96, 96, 3)]


def test_an_iterable_of_batches_gives_what_one_array_gives(trained):
    predictor = Predictor(trained, batch_size=SIZE)
    together = predictor.logits(IMAGES)
    for sizes in ([1, 3, 13], [0, SIZE, 0, SIZE + 1], [2 * SIZE + 1]):
        batches = iter(np.split(IMAGES, np.cumsum(sizes)[:-1]))
        np.testing.assert_array_equal(predictor.logits(batches), together)
    assert predictor.logits(iter([])).shape == (0,)
    assert predictor.logits([]).shape == (0,)
    np.testing.assert_array_equal(predictor.logits(jnp.asarray(IMAGES)), together)
    np.testing.assert_array_equal(predictor.logits(IMAGES[::-1]), together[::-1])


def test_an_iterable_may_reuse_its_memory(trained):
    predictor = Predictor(trained[:1], batch_size=SIZE)

    def batches(buffer):
        for image in IMAGES:
            buffer[0] = image
            yield buffer

    np.testing.assert_array_equal(
        predictor.logits(batches(np.empty_like(IMAGES[:1]))), predictor.logits(IMAGES)
    )


def test_no_more_than_two_batches_are_in_flight(trained):
    """Reading may lag behind, but not as far as memory lasts."""
    started, read = [], []

    class Output:
        shape = (4, 2)

        def __init__(self):
            started.append(self)

        def __array__(self, dtype=None, copy=None):
            read.append((len(started), self))
            return np.zeros(self.shape, np.float32)

    predictor = Predictor(trained[:1], batch_size=SIZE)
    predictor._programs[make_forward, trained[0].model] = lambda *_: Output()
    assert len(predictor.logits(IMAGES[:1].repeat(5 * SIZE, 0))) == 5 * SIZE
    assert [count for count, _ in read] == [3, 4, 5, 5, 5]
    assert [output for _, output in read] == started


def test_an_ensemble_is_the_equal_mean_of_its_calibrated_logits(trained):
    predictor = Predictor(trained, batch_size=SIZE)
    mean = np.mean([expected(each, IMAGES) for each in trained], axis=0)
    np.testing.assert_allclose(predictor.logits(IMAGES), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(predictor(IMAGES), expit(predictor.logits(IMAGES)))
    for number, each in enumerate(trained):
        alone = Predictor([each], batch_size=SIZE).logits(IMAGES)
        np.testing.assert_array_equal(predictor.select(number).logits(IMAGES), alone)


def test_the_prior_replaces_that_of_each_calibration(trained):
    predictor = Predictor(trained, prior=0.1, batch_size=SIZE)
    mean = np.mean([expected(each, IMAGES, 0.1) for each in trained], axis=0)
    np.testing.assert_allclose(predictor.logits(IMAGES), mean, rtol=1e-4, atol=1e-5)


def test_tta_is_the_mean_over_the_eight_symmetries(trained):
    turned = [
        np.rot90(some, k, (1, 2)) for some in (IMAGES, IMAGES.swapaxes(1, 2)) for k in range(4)
    ]
    mean = np.mean([expected(trained[0], each) for each in turned], axis=0)
    logits = Predictor(trained[:1], tta=True, batch_size=SIZE).logits(IMAGES)
    np.testing.assert_allclose(logits, mean, rtol=1e-4, atol=1e-5)
    assert np.abs(logits - expected(trained[0], IMAGES)).max() > 1e-3


@pytest.mark.parametrize(("name", "is_used"), [("five_block", True), ("five_block_p4m", False)])
def test_tta_is_left_out_for_networks_that_are_invariant(name, is_used):
    model = create_model(ModelConfig(name=name, features=(2, 2, 2, 2, 2), dense=2))
    images = jax.ShapeDtypeStruct((1, 96, 96, 3), np.uint8)
    weights = jax.eval_shape(
        lambda: init_weights(model, jax.random.key(0), np.zeros(3), np.ones(3), 96)
    )
    plain, chosen = (
        str(jax.make_jaxpr(make(model))(weights, images))
        for make in (make_forward, make_forward_tta)
    )
    assert (plain != chosen) == is_used


WRONG = {
    "uint8[96, 96, 3]": IMAGES[0],
    "uint8[1, 64, 64, 3]": IMAGES[:1, :64, :64],
    "uint8[1, 96, 96]": IMAGES[:1, ..., 0],
    "float32[1, 96, 96, 3]": IMAGES[:1].astype(np.float32),
    "int64[2, 96, 96, 3]": [IMAGES[:1], IMAGES[:2].astype(np.int64)],
    "uint8[3]": [np.zeros(3, np.uint8)],
    "<U1[]": "abc",
    "of type int": 7,
}


@pytest.mark.parametrize("received", WRONG)
def test_images_of_another_shape_or_type_are_one_line_that_names_both(trained, received):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Predictor(trained, batch_size=SIZE)(WRONG[received])
    assert str(error.value).startswith(f"images are {received}, expected uint8[n, 96, 96, 3]")
    assert "\n" not in str(error.value)


def test_wrong_images_are_followed_by_the_fix(trained):
    predictor = Predictor(trained, batch_size=SIZE)
    for images, fix in (
        (IMAGES[0], r"images\[None\].*numpy\.stack"),
        (list(IMAGES[:2]), r"numpy\.stack"),
        (IMAGES / 255, "0 to 255, not scaled"),
    ):
        with pytest.raises(ValueError, match=fix):
            predictor(images)


class Unhashable(Tiny):
    """A network with a field that has no hash."""

    scale: np.ndarray = None

    @nn.compact
    def __call__(self, x, train=False):
        return super().__call__(x, train) * self.scale


def test_networks_without_a_hash_predict_too():
    one, two = (make_trained(0, Unhashable(scale=np.float32([scale]))) for scale in (1, 2))
    one, two = (Predictor([each], batch_size=SIZE).raw_logits(IMAGES) for each in (one, two))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-5)


def test_options_out_of_range_are_named(trained):
    for prior in (0, 1, -0.1):
        with pytest.raises(ValueError, match=f"prior = {prior} must be above 0 and below 1"):
            Predictor(trained, prior=prior)
    with pytest.raises(ValueError, match="batch_size = 0 must be at least 1"):
        Predictor(trained, batch_size=0)


def test_the_users_options_of_jax_change_nothing(trained):
    predictor = Predictor(trained, batch_size=SIZE)
    plain = predictor.logits(IMAGES)
    with jax.enable_x64(True), jax.transfer_guard("disallow"), jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(Predictor(trained, batch_size=SIZE).logits(IMAGES), plain)


@pytest.fixture(scope="module")
def config(make_tiny_config):
    config = make_tiny_config()
    config.model.features, config.model.dense = (2, 2, 2, 2, 2), 2
    return config


@pytest.fixture(scope="module")
def runs(config, save_run, tmp_path_factory):
    """Two runs; the first has a submission, ."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, calibration in enumerate(CALIBRATIONS):
        save_run(dataclasses.replace(config, seed=seed), folder / str(seed), calibration)
    histo_jax.predict(config, folder / "0")
    return folder


def read_test_images(config):
    records = prepare(config)
    rows = np.arange(len(records.tables["test"]))
    return records.records("test", rows).images(rows)


def test_a_run_predicts_what_its_submission_holds(config, runs):
    predictor = histo_jax.load(runs / "0")
    assert (predictor.tta, predictor.batch_size) == (False, config.predict.batch_size)
    lines = [f"{value:.8g}" for value in predictor(read_test_images(config))]
    submission = (runs / "0" / "submission.csv").read_text().splitlines()[1:]
    assert [line.partition(",")[2] for line in submission] == lines


def test_runs_and_ensembles_are_loaded_from_their_folders(config, runs, tmp_path):
    images = read_test_images(config)
    predictor = histo_jax.load(runs / "0", str(runs / "1"), batch_size=4)
    assert [trained.run for trained in predictor.trained] == [str(runs / "0"), str(runs / "1")]
    assert predictor.batch_size == 4
    logits = predictor.logits(images)
    each = [histo_jax.load(runs / name, batch_size=4).logits(images) for name in ("0", "1")]
    np.testing.assert_array_equal(logits, np.mean(each, axis=0))
    # The folder of an ensemble stands for its runs, with the options that it was asked for.
    together = dataclasses.replace(
        config,
        predict=dataclasses.replace(
            config.predict, checkpoints=f"{runs / '0'},{runs / '1'}", prior=0.2, tta=True
        ),
    )
    table = histo_jax.predict(together, tmp_path / "together")
    loaded = histo_jax.load(tmp_path / "together")
    np.testing.assert_allclose(loaded(images), table["label"], rtol=1e-6)
    given = histo_jax.load(tmp_path / "together", prior=0.7, tta=False)
    assert np.abs(given(images) - loaded(images)).min() > 0.1
    with pytest.raises(UserError, match=r"differ in config\.predict\.tta \(True, False\): give"):
        histo_jax.load(tmp_path / "together", runs / "0")


def test_folders_that_cannot_be_loaded_are_named(config, runs, tmp_path):
    with pytest.raises(UserError, match="at least one run"):
        histo_jax.load()
    with pytest.raises(UserError, match="is not the folder of a run"):
        histo_jax.load(runs / "0", tmp_path)
    with pytest.raises(UserError, match=r"load\(\): duplicate run .*0; name each run once"):
        histo_jax.load(runs / "0", runs / "1" / ".." / "0")
    (tmp_path / "config.json").write_text((runs / "0" / "config.json").read_text())
    with pytest.raises(UserError, match="no checkpoint"):
        histo_jax.load(tmp_path)


@pytest.mark.parametrize(
    "counts", [(5,), (1, 0, 1, 1, 1, 1, 1, 1), (3 * SIZE + 1, 2), (SIZE, SIZE)]
)
def test_windows_of_blocks_are_predicted_in_order(counts, trained):
    """Many windows of a block, many blocks of a batch, and blocks without any."""
    rng = np.random.default_rng(0)
    predictor = Predictor(trained, batch_size=SIZE)
    blocks = [
        (rng.integers(0, 256, (130, 150, 3), np.uint8), rng.integers(0, (35, 55), (count, 2)))
        for count in counts
    ]
    logits = np.concatenate(list(predictor.window_logits(iter(blocks))), axis=1)
    windows = np.stack([
        pixels[y : y + 96, x : x + 96] for pixels, corners in blocks for y, x in corners
    ])  # fmt: skip
    np.testing.assert_allclose(logits, predictor.raw_logits(windows), atol=1e-5)


def test_no_blocks_have_no_windows(trained):
    assert list(Predictor(trained, batch_size=SIZE).window_logits(iter(()))) == []
