import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from histo_jax.config import AugmentConfig, ModelConfig
from histo_jax.data.loader import Records
from histo_jax.distributed import mesh
from histo_jax.errors import UserError
from histo_jax.models import create_model
from histo_jax.training import step
from histo_jax.training.augmentation import make_augment
from histo_jax.training.losses import get_loss
from histo_jax.training.placement import on_disk
from histo_jax.training.state import create_state, update_ema

RNG = np.random.default_rng(0)
runpy.run_path(str(Path(__file__).parents[1] / "tiny_network.py"))
MODEL = create_model(ModelConfig(name="tiny"))
OPTIMIZER = optax.adam(1e-3)
MEAN, STD = np.array([0.7, 0.5, 0.6]), np.array([0.2, 0.3, 0.2])


def make_batch(size=8):
    return {
        "image": RNG.integers(0, 256, (size, 96, 96, 3), dtype=np.uint8),
        "label": RNG.integers(0, 2, size).astype(np.float32),
    }


def make_train_step(model, batch_sharding, **options):
    augment, loss = make_augment(AugmentConfig()), get_loss("binary_cross_entropy")
    return step.make_train_step(model, OPTIMIZER, batch_sharding, augment, loss, **options)


def start(batch_sharding):
    state = create_state(MODEL, OPTIMIZER, 0, MEAN, STD, 96)
    return jax.device_put(state, mesh.replicated(batch_sharding))


def test_tta_is_the_mean_logit_of_the_eight_symmetries():
    images = make_batch(3)["image"]
    weights = create_state(MODEL, OPTIMIZER, 0, MEAN, STD, 96).weights
    plain, tta = (jax.jit(step.make_forward(MODEL, how)) for how in (False, True))
    logits = [
        plain(weights, jnp.asarray(np.rot90(turned, turns, (1, 2))))
        for turned in (images, images.transpose(0, 2, 1, 3))
        for turns in range(4)
    ]
    assert np.ptp(logits, axis=0).min() > 1e-3
    np.testing.assert_allclose(tta(weights, images), np.mean(logits, 0), rtol=1e-5, atol=1e-6)


def test_normalise_centres_and_scales():
    state = create_state(MODEL, OPTIMIZER, 0, MEAN, STD, 96)
    images = make_batch(2)["image"]
    normalised = step.normalise(state.weights, jnp.asarray(images))
    np.testing.assert_allclose(normalised, (images / 255 - MEAN) / STD, rtol=1e-4, atol=1e-5)


def test_three_steps_on_four_devices_equal_one():
    batches = [make_batch() for _ in range(3)]
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        batch_sharding = mesh.batch_sharding(devices)
        train_step = make_train_step(MODEL, batch_sharding)
        state, losses = start(batch_sharding), []
        for batch in batches:
            state, metrics = train_step(state, jax.device_put(batch, batch_sharding))
            losses.append(float(metrics.loss))
        results.append((losses, jax.device_get(state.weights)))
    assert len(jax.devices()) == 4
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
    jax.tree.map(
        lambda one, four: np.testing.assert_allclose(one, four, atol=1e-5),
        results[0][1], results[1][1],
    )  # fmt: skip


def test_a_step_is_repeatable_and_counts():
    batch_sharding, batch = mesh.batch_sharding(), make_batch()
    train_step = make_train_step(MODEL, batch_sharding)
    runs = []
    for _ in range(2):
        state = start(batch_sharding)
        losses = []
        for _ in range(2):
            state, metrics = train_step(state, jax.device_put(batch, batch_sharding))
            losses.append(metrics.loss)
        assert state.step == 2
        assert state.loss_sum == losses[0] + losses[1]
        runs.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    assert train_step._cache_size() == 1


def test_the_first_loss_is_the_cross_entropy_of_the_batch():
    """Dropout and augmentation off, the loss must be the textbook formula on the logits."""
    model = create_model(ModelConfig(name="tiny", kwargs={"dropout": 0.0}))
    batch_sharding, batch = mesh.batch_sharding(jax.devices()[:1]), make_batch()
    # Flat images look the same in all eight symmetries.
    batch["image"][:] = batch["image"][:, :1, :1]
    state = create_state(model, OPTIMIZER, 0, MEAN, STD, 96)
    logits, _ = jax.jit(model.apply, static_argnames=("train", "mutable"))(
        state.weights.variables,
        step.normalise(state.weights, jnp.asarray(batch["image"])),
        train=True,
        mutable=("batch_stats",),
    )
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    expected = -np.mean(np.where(batch["label"] == 1, np.log(p), np.log(1 - p)))
    _, metrics = make_train_step(model, batch_sharding)(state, batch)
    assert float(metrics.loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_applies_no_update(value):
    batch_sharding, batch = mesh.batch_sharding(), make_batch()
    train_step = make_train_step(MODEL, batch_sharding)
    state, metrics = train_step(start(batch_sharding), jax.device_put(batch, batch_sharding))
    assert metrics.finite
    before = jax.device_get(state)
    batch["label"][3] = value
    state, metrics = train_step(state, jax.device_put(batch, batch_sharding))
    assert not metrics.finite
    assert state.step == before.step + 1
    after = jax.device_get(state).replace(step=before.step)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_padded_evaluation_equals_a_plain_loop():
    images = RNG.integers(0, 256, (13, 96, 96, 3), dtype=np.uint8)
    labels = RNG.integers(0, 2, 13)

    class Source:
        def __getitems__(self, rows):
            return [{"image": images[r], "label": labels[r]} for r in rows]

    batch_sharding = mesh.batch_sharding()
    weights = start(batch_sharding).weights
    logits, collected = step.collect_logits(
        step.make_eval_step(MODEL, batch_sharding),
        weights,
        on_disk(
            Records(Source(), np.arange(13), labels.astype(np.float32)), batch_sharding
        ).eval_batches(8),
    )
    plain = jax.jit(step.make_forward(MODEL))
    weights = jax.device_get(weights)
    expected = [float(plain(weights, image[None])[0]) for image in images]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(collected, labels)


def test_a_batch_must_divide_over_the_devices():
    with pytest.raises(UserError, match=r"fit\.batch_size = 6 is not a multiple of the 4 devices"):
        mesh.check_batch_size(6)
    mesh.check_batch_size(8)


def test_the_moving_average_follows_its_formula_with_all_statistics():
    batch_sharding = mesh.batch_sharding()
    train_step = make_train_step(MODEL, batch_sharding, ema_decay=0.9)
    state = create_state(MODEL, OPTIMIZER, 0, MEAN, STD, 96, has_ema=True)
    expected = jax.device_get(state.weights)
    state = jax.device_put(state, mesh.replicated(batch_sharding))
    for count in range(12):
        state, _ = train_step(state, make_batch())
        kept = min(0.9, (1 + count) / (10 + count))
        expected = jax.tree.map(
            lambda old, new, kept=kept: kept * old + (1 - kept) * np.asarray(new),
            expected, state.weights,
        )  # fmt: skip
    assert state.eval_weights is state.ema
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
        state.ema, expected,
    )  # fmt: skip
    moved = jax.tree.map(
        lambda one, other: float(jnp.abs(one - other).max()), state.ema, state.weights
    )
    assert moved.collections["batch_stats"]["BatchNorm_0"]["mean"] > 1e-3
    assert moved.mean == 0
    assert update_ema(None, state.weights, 0, 0.9) is None
