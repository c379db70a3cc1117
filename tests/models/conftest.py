"""Variables of networks, without compiling their initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_variables():
    """Makes random variables of a network; means and biases have both signs."""

    def make(model, images, seed=0):
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            values = rng.normal(size=leaf.shape)
            name = path[-1].key
            if name == "kernel":
                values = values / np.sqrt(np.prod(leaf.shape[:-1]))
            elif name in ("scale", "var"):
                values = 1 + 0.1 * np.abs(values)
            else:
                values = 0.3 * values
            return jnp.asarray(values, leaf.dtype)

        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        return jax.tree_util.tree_map_with_path(draw, shapes)

    return make
