"""Integrated gradients against the formula, and whether what it marks matters to the network."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import histo_jax
from histo_jax import members
from histo_jax.config import Config
from histo_jax.data.builder import prepare
from histo_jax.data.splits import make_sides
from histo_jax.models.cnn import FiveBlockCNN
from histo_jax.report.patches import look
from histo_jax.report.saliency import STEPS, integrated_gradients
from histo_jax.training.state import Weights
from histo_jax.training.step import make_forward, normalise


def test_it_is_the_formula_and_sums_to_the_logit():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (2, 96, 96, 3), np.uint8))
    model = FiveBlockCNN((3, 4, 5, 3, 2), 4, 0.0)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    weights = Weights(
        variables["params"], variables["batch_stats"], jnp.full(3, 0.7), jnp.full(3, 0.2)
    )
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


def delete(forward, weights, images, maps, share, side=8):
    """The logits after the most marked squares were wiped away to bare glass.

    White, not the mean colour: glass without tissue is what patches do show. Squares, for single
    white pixels are nothing that a network has ever seen.
    """
    count, size = len(images), 96 // side
    squares = maps.reshape(count, size, side, size, side).sum((2, 4)).reshape(count, -1)
    rank = np.argsort(np.argsort(-squares, 1), 1).reshape(count, size, size)
    wiped = (rank < share * size * size).repeat(side, 1).repeat(side, 2)[..., None]
    return np.asarray(forward(weights, np.where(wiped, np.uint8(255), images)))


@pytest.mark.parametrize("seed", [0, 1, 2] if os.environ.get("HISTO_JAX_LONG") else [0])
def test_wiping_away_what_is_marked_lowers_the_logit_faster_than_wiping_anywhere(seed, tmp_path):
    config = Config(seed=seed)
    config.data.tfds_dir = str(tmp_path / "records")
    config.data.synthetic_slides, config.data.samples_per_class = 12, 200
    config.data.validation_fraction = 0.25
    config.model.features, config.model.dense = (8, 16, 16, 16, 16), 16
    config.optimizer.learning_rate, config.fit.epochs = 3e-3, 4
    histo_jax.fit(config, tmp_path / "run")
    (member,) = members.restore(config, tmp_path / "run", SingleDeviceSharding(jax.devices()[0]))
    prepared = prepare(config)
    side = make_sides(prepared.tables, config).validation
    labels = prepared.tables[side.records]["label"].to_numpy()[side.rows]
    records = prepared.source(side.records).__getitems__(side.rows[labels == 1][:36].tolist())
    images = np.stack([record["image"] for record in records])
    _, maps = look([member], images)
    anywhere = np.random.default_rng(seed).random(maps.shape)
    forward = jax.jit(make_forward(member.model))
    before = np.asarray(forward(member.weights, images))
    for share in (0.1, 0.2, 0.3):
        marked, drawn = (
            (delete(forward, member.weights, images, where, share) - before).mean()
            for where in (maps, anywhere)
        )
        print(f"seed {seed}, {share:.0%} wiped away: marked {marked:.2f}, anywhere {drawn:.2f}")
        assert marked < 0
        assert marked < drawn
