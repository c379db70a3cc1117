import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from histo_jax.config import OptimizerConfig
from histo_jax.training.optimizer import create_optimizer, create_schedule


def test_one_cycle_rises_for_the_fraction_of_warmup_and_falls_to_zero():
    config = OptimizerConfig(learning_rate=0.1, schedule="one_cycle", warmup=0.25)
    rates = np.array([create_schedule(config, 100)(step) for step in range(101)])
    assert rates.argmax() == 25
    assert rates[[0, 25]] == pytest.approx([0.1 / 25, 0.1])
    assert rates[100] < 1e-5
    assert (np.diff(rates[:26]) > 0).all()
    assert (np.diff(rates[25:]) < 0).all()
    constant = create_schedule(OptimizerConfig(learning_rate=0.1), 100)
    assert {constant(0), constant(99)} == {0.1}


def test_muon_orthogonalizes_kernels_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 8, 4, 6), "bias": (6,), "logit": (6, 1)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    gradient = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def update(**settings):
        optimizer = create_optimizer(OptimizerConfig(name="muon", learning_rate=1e-2, **settings))
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    plain, decayed = update(), update(weight_decay=0.1)
    singular = np.linalg.svd(plain["kernel"].reshape(288, 6), compute_uv=False)
    # Five Newton-Schulz iterations bring the singular values of the step near to 1.
    np.testing.assert_allclose(singular / (1e-2 * 0.2 * np.sqrt(288)), 1, atol=0.35)
    adam = optax.nadam(1e-2)
    expected = adam.update(gradient, adam.init(params), params)[0]
    for name in ("bias", "logit"):
        np.testing.assert_allclose(plain[name], expected[name], rtol=1e-5)
        np.testing.assert_array_equal(decayed[name], plain[name])
    kernel = plain["kernel"] - 1e-2 * 0.1 * params["kernel"]
    np.testing.assert_allclose(decayed["kernel"], kernel, rtol=1e-4, atol=1e-7)


def test_without_decay_it_is_adam_and_with_it_only_kernels_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    gradient = jax.tree.map(lambda leaf: 0.3 * leaf, params)

    def update(optimizer):
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    adam = update(optax.adam(1e-2))
    ours = update(create_optimizer(OptimizerConfig(learning_rate=1e-2)))
    jax.tree.map(np.testing.assert_array_equal, ours, adam)
    decayed = update(create_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)))
    np.testing.assert_allclose(decayed["kernel"], adam["kernel"] - 1e-2 * 0.1, rtol=1e-5)
    np.testing.assert_array_equal(decayed["bias"], adam["bias"])
