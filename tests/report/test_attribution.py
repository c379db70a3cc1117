"""Integrated gradients against the formula, and whether what it marks matters to the network."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

import histo_jax
from histo_jax import ensemble
from histo_jax.config import Config
from histo_jax.data.splits import make_subsets
from histo_jax.models.cnn import FiveBlockCNN
from histo_jax.preparation import prepare
from histo_jax.report.attribution import STEPS, integrated_gradients
from histo_jax.report.patches import look
from histo_jax.training.state import Weights
from histo_jax.training.step import make_forward, normalise


def test_it_is_the_formula_and_sums_to_the_logit():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (2, 96, 96, 3), np.uint8))
    model = FiveBlockCNN((3, 4, 5, 3, 2), 4, 0.0)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    statistics = {"batch_stats": variables["batch_stats"]}
    weights = Weights(variables["params"], statistics, jnp.full(3, 0.7), jnp.full(3, 0.2))
    logits, maps = jax.jit(lambda: integrated_gradients(model, weights, images))()
    forward = make_forward(model)
    np.testing.assert_allclose(logits, forward(weights, images), rtol=1e-5)

    gradient = jax.jit(jax.grad(lambda x: model.apply(variables, x).sum()))
    start, end = (np.asarray(normalise(weights, x)) for x in (jnp.full_like(images, 255), images))
    shares = (np.arange(STEPS) + 0.5) / STEPS
    gradients = [np.asarray(gradient(start + share * (end - start))) for share in shares]
    wanted = ((end - start) * np.mean(gradients, 0)).sum(-1)
    # Where two values are equal but for rounding, either may be the maximum that has the gradient.
    assert (abs(maps - wanted) <= 1e-5 * abs(wanted).max()).mean() > 0.99

    added = logits - forward(weights, jnp.full_like(images, 255))
    np.testing.assert_allclose(maps.sum((1, 2)), added, rtol=0.05)


def delete(forward, weights, images, maps, share, subset=8):
    """The logits after the most marked squares were wiped away to bare glass.

    White, not the mean colour: glass without tissue is what patches do show. Squares, for single
    white pixels are nothing that a network has ever seen.
    """
    count, size = len(images), 96 // subset
    squares = maps.reshape(count, size, subset, size, subset).sum((2, 4)).reshape(count, -1)
    rank = np.argsort(np.argsort(-squares, 1), 1).reshape(count, size, size)
    wiped = (rank < share * size * size).repeat(subset, 1).repeat(subset, 2)[..., None]
    return np.asarray(forward(weights, np.where(wiped, np.uint8(255), images)))


def grad_cam(model, weights, images, block):
    """Features of a block, weighted by how the logit grows with each (Selvaraju et al., 2017)."""
    x = normalise(weights, images)

    def forward(change):
        seen = []

        def add(following, arguments, keywords, context):
            output = following(*arguments, **keywords)
            if context.module.name == f"Block_{block}" and context.method_name == "__call__":
                seen.append(output + change)
                return seen[0]
            return output

        with nn.intercept_methods(add):
            logits = model.apply(weights.variables, x)
        return logits.sum(), seen[0]

    features = jax.eval_shape(lambda: forward(0.0)[1])
    gradient, features = jax.grad(forward, has_aux=True)(jnp.zeros_like(features))
    maps = nn.relu((gradient.mean((1, 2), keepdims=True) * features).sum(-1))
    return jax.image.resize(maps, images.shape[:3], "bilinear")


@pytest.fixture(scope="module", params=[0, 1, 2], ids="seed {}".format)
def trained(request, tmp_path_factory):
    """A network trained from this seed, and patches with tumour that it has not seen."""
    config = Config(seed=request.param)
    folder = tmp_path_factory.mktemp("saliency")
    config.data.tfds_dir = str(folder / "records")
    config.data.synthetic_slides, config.data.samples_per_class = 12, 200
    config.data.validation_fraction = 0.25
    config.model.features, config.model.dense = (8, 16, 16, 16, 16), 16
    config.optimizer.learning_rate, config.fit.epochs = 3e-3, 4
    histo_jax.fit(config, folder / "run")
    (member,) = ensemble.restore(config, folder / "run", SingleDeviceSharding(jax.devices()[0]))
    prepared = prepare(config)
    subset = make_subsets(prepared.tables, config.data, config.data_seed).validation
    labels = prepared.tables[subset.records]["label"].to_numpy()[subset.rows]
    return member, prepared.records(subset.records, subset.rows[labels == 1][:36]).images(
        np.arange(36)
    )


def drops(member, images, maps):
    """What wiping away 10, 20 and 30% of the patches, the most marked first, adds to the logit."""
    forward = jax.jit(make_forward(member.model))
    before = np.asarray(forward(member.weights, images))
    return np.array(
        [
            (delete(forward, member.weights, images, maps, share) - before).mean()
            for share in (0.1, 0.2, 0.3)
        ]
    )


def test_wiping_away_what_is_marked_lowers_the_logit_faster_than_wiping_anywhere(trained):
    member, images = trained
    marked = drops(member, images, look([member], images)[1])
    anywhere = drops(member, images, np.random.default_rng(0).random(images.shape[:3]))
    print(f"integrated gradients {marked.round(2)}, anywhere {anywhere.round(2)}")
    assert (marked < np.minimum(anywhere, 0)).all()
    for block in range(5) if os.environ.get("HISTO_JAX_LONG") else ():
        mapped = jax.jit(functools.partial(grad_cam, member.model, block=block))
        other = drops(member, images, np.asarray(mapped(member.weights, images)))
        print(f"Grad-CAM of block {block + 1} {other.round(2)}")
        assert (marked < other).all()
