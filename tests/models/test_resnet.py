import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histo_jax.config import ModelConfig
from histo_jax.models import create_model
from histo_jax.models.resnet import ResidualBlock

IMAGES = jnp.zeros((1, 96, 96, 3))


def make(**kwargs):
    return create_model(ModelConfig(name="resnet18", kwargs=kwargs))


@pytest.mark.parametrize(
    # torchvision's resnet18 has 11,689,512 parameters: 512,487 more, for 999 more classes.
    ("stem", "size", "parameters"),
    [("small", 12, 11_169_345), ("imagenet", 3, 11_177_025)],
)
def test_parameters_and_shapes_are_those_of_resnet18(stem, size, parameters):
    model = make(stem=stem)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    logits, captured = jax.eval_shape(
        lambda variables: model.apply(
            variables, IMAGES, capture_intermediates=True, mutable=["intermediates"]
        ),
        variables,
    )
    assert logits.shape == (1,)
    assert logits.dtype == jnp.float32
    (last,) = captured["intermediates"]["ResidualBlock_7"]["__call__"]
    assert last.shape == (1, size, size, 512)


def test_blocks_are_initialised_to_the_identity_and_momentum_is_0_9():
    block = ResidualBlock(3, 1, jnp.float32)
    x = jnp.abs(3 + jax.random.normal(jax.random.key(1), (4, 8, 8, 3)))
    variables = jax.jit(block.init, static_argnums=2)(jax.random.key(0), x, True)

    @jax.jit
    def train(variables):
        return block.apply(
            variables, x, True, capture_intermediates=True, mutable=["intermediates", "batch_stats"]
        )

    output, changed = train(variables)
    np.testing.assert_array_equal(output, x)
    convolved = changed["intermediates"]["Conv_0"]["__call__"][0]
    mean, variance = convolved.mean((0, 1, 2)), convolved.var((0, 1, 2))
    running = changed["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(running["mean"], 0.1 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * variance, rtol=1e-3)
