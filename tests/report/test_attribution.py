"""Integrated gradients against their formula, and whether marked pixels matter to the network."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import histo_jax
from histo_jax.config import Config, DataConfig
from histo_jax.data.example import PatchSpec
from histo_jax.data.splits import make_subsets
from histo_jax.metrics import Calibration
from histo_jax.models.forward import make_forward, normalise
from histo_jax.predictor import Predictor, TrainedModel
from histo_jax.preparation import prepare
from histo_jax.report.attribution import STEPS, attribute, integrated_gradients
from histo_jax.training.state import init_weights

SEEDS = (0, 1, 2) if os.environ.get("HISTO_JAX_LONG") else (0,)


class Smooth(nn.Module):
    """A small network whose gradient is unique everywhere: where values tie, a maximum's is not."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Conv(4, (8, 8), 8)(x))
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


def make_trained(seed, calibration):
    weights = init_weights(Smooth(), jax.random.key(seed), np.full(3, 0.7), np.full(3, 0.2), 96)
    return TrainedModel(
        f"run{seed}", Config(), Smooth(), weights, calibration, 0, "", PatchSpec(96)
    )


def make_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 96, 96, 3), np.uint8)


def test_attributions_are_the_formula_and_sum_to_the_logit():
    images, weights = make_images(2), make_trained(0, Calibration()).weights
    model, forward = Smooth(), jax.jit(make_forward(Smooth()))
    logits, maps = jax.jit(functools.partial(integrated_gradients, model))(weights, images)
    np.testing.assert_allclose(logits, forward(weights, images), rtol=1e-5, atol=1e-6)

    gradient = jax.jit(jax.grad(lambda x: model.apply(weights.variables, x).sum()))
    glass = np.full_like(images, 255)
    start, end = (np.asarray(normalise(weights, x)) for x in (glass, images))
    alphas = (np.arange(STEPS) + 0.5) / STEPS
    gradients = [np.asarray(gradient(start + alpha * (end - start))) for alpha in alphas]
    expected = ((end - start) * np.mean(gradients, 0)).sum(-1)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())

    added = logits - forward(weights, glass)
    np.testing.assert_allclose(maps.sum((1, 2)), added, rtol=0.05)


def test_the_attribution_of_an_ensemble_is_the_mean_of_the_calibrated_networks():
    scales, images = (2.0, 0.5), make_images(13)
    trained = [make_trained(n, Calibration(scale, 1.0, 0.4)) for n, scale in enumerate(scales)]
    maps = attribute(Predictor(trained), images)
    assert (maps.shape, maps.dtype) == ((13, 96, 96), np.float32)
    compute = jax.jit(functools.partial(integrated_gradients, Smooth()))
    each = [
        scale * compute(network.weights, images)[1]
        for scale, network in zip(scales, trained, strict=True)
    ]
    np.testing.assert_allclose(maps, np.mean(each, 0), rtol=1e-4, atol=1e-5 * abs(maps).max())


def delete_pixels(forward, weights, images, maps, fraction, square=8):
    """Returns the logits after the squares of highest attribution are replaced by bare glass.

    White, not the mean colour, because real patches contain glass. Squares, because no network has
    been trained on single white pixels.
    """
    count, size = len(images), 96 // square
    squares = maps.reshape(count, size, square, size, square).sum((2, 4)).reshape(count, -1)
    rank = np.argsort(np.argsort(-squares, 1), 1).reshape(count, size, size)
    is_deleted = (rank < fraction * size * size).repeat(square, 1).repeat(square, 2)[..., None]
    return np.asarray(forward(weights, np.where(is_deleted, np.uint8(255), images)))


def grad_cam(model, weights, images, block):
    """Features of a block, weighted by the logit's gradient for each (Selvaraju et al., 2017)."""
    x = normalise(weights, images)

    def forward(change):
        captured = []

        def add(following, arguments, keywords, context):
            output = following(*arguments, **keywords)
            if context.module.name == f"Block_{block}" and context.method_name == "__call__":
                captured.append(output + change)
                return captured[0]
            return output

        with nn.intercept_methods(add):
            logits = model.apply(weights.variables, x)
        return logits.sum(), captured[0]

    features = jax.eval_shape(lambda: forward(0.0)[1])
    gradient, features = jax.grad(forward, has_aux=True)(jnp.zeros_like(features))
    maps = nn.relu((gradient.mean((1, 2), keepdims=True) * features).sum(-1))
    return jax.image.resize(maps, images.shape[:3], "bilinear")


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def trained(request, make_tiny_config, synthetic_records, tmp_path_factory):
    """A network trained with this seed, and validation patches with tumour."""
    config, folder = make_tiny_config(), tmp_path_factory.mktemp("attribution") / "run"
    config.seed = request.param
    config.data = DataConfig(synthetic_slides=8, samples_per_class=200, validation_fraction=0.25)
    config.data.tfds_dir = synthetic_records
    histo_jax.fit(config, folder)
    prepared = prepare(config)
    subset = make_subsets(prepared.tables, config.data, config.data_seed).validation
    labels = prepared.tables[subset.records]["label"].to_numpy()[subset.rows]
    rows = subset.rows[labels == 1][:24]
    return histo_jax.load(folder), prepared.records(subset.records, rows).images(
        np.arange(len(rows))
    )


def mean_drops(forward, weights, images, maps):
    """Returns the mean change of the logit after deleting 10, 20 and 30% of the pixels."""
    before = np.asarray(forward(weights, images))
    return np.array(
        [
            (delete_pixels(forward, weights, images, maps, fraction) - before).mean()
            for fraction in (0.1, 0.2, 0.3)
        ]
    )


def test_deleting_pixels_of_high_attribution_lowers_the_logit_faster_than_random_ones(trained):
    predictor, images = trained
    model, weights = predictor.trained[0].model, predictor.trained[0].weights
    measure = functools.partial(mean_drops, jax.jit(make_forward(model)), weights, images)
    highest = measure(attribute(predictor, images))
    random = measure(np.random.default_rng(0).random(images.shape[:3]))
    print(f"integrated gradients {highest.round(2)}, random pixels {random.round(2)}")
    assert (highest < np.minimum(random, 0)).all()
    for block in range(5) if os.environ.get("HISTO_JAX_LONG") else ():
        maps = jax.jit(functools.partial(grad_cam, model, block=block))(weights, images)
        other = measure(np.asarray(maps))
        print(f"Grad-CAM of block {block + 1} {other.round(2)}")
        assert (highest < other).all()
