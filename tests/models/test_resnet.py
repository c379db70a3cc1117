import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histo_jax.config import ModelConfig
from histo_jax.models import create_model

IMAGES = jnp.zeros((1, 96, 96, 3))


def make(**kwargs):
    return create_model(ModelConfig(name="resnet18", kwargs=kwargs))


@pytest.mark.parametrize(
    # torchvision's resnet18 has 11,689,512 parameters, 512,487 of them for 999 more classes.
    ("stem", "size", "parameters"),
    [("small", 12, 11_169_345), ("imagenet", 3, 11_177_025)],
)
def test_it_is_the_published_network(stem, size, parameters):
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


def test_blocks_begin_as_the_identity_and_statistics_move_a_tenth_of_the_way():
    model = make(width=2, stem="imagenet")
    images = 3 + jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)

    @jax.jit
    def train(variables):
        return model.apply(
            variables,
            images,
            train=True,
            capture_intermediates=True,
            mutable=["intermediates", "batch_stats"],
        )[1]

    changed = train(variables)
    blocks = [
        np.asarray(changed["intermediates"][f"ResidualBlock_{i}"]["__call__"][0]) for i in (0, 1)
    ]
    np.testing.assert_array_equal(*blocks)
    assert blocks[0].max() > 0
    stem = changed["intermediates"]["Conv_0"]["__call__"][0]
    running = changed["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(running["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-3)
