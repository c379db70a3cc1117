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
