import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from histo_jax.config import ModelConfig
from histo_jax.models import create_model
from histo_jax.models.block import max_pool, norm_pool_relu

SHAPE = (8, 32, 32, 3)  # the smallest square that can be halved five times


def test_max_pool_equals_the_windowed_maximum():
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, 5))
    np.testing.assert_array_equal(max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))


def test_the_default_network_has_the_shapes_of_the_original():
    model = create_model(ModelConfig())
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    channels = [3, 32, 64, 128, 256, 512]
    for block in range(5):
        assert shapes[f"Block_{block}"] == {
            "kernel": (3, 3, channels[block], channels[block + 1]),
            "scale": (channels[block + 1],),
            "bias": (channels[block + 1],),
        }
    assert shapes["Dense_0"]["kernel"] == (3 * 3 * 512, 1024)
    assert shapes["Dense_1"]["kernel"] == (1024, 1)


def test_blocks_equal_convolution_norm_relu_pool(random_variables):
    model = create_model(ModelConfig(features=(4, 5, 6, 7, 8), dense=9))
    images = jax.random.normal(jax.random.key(1), SHAPE)
    variables = random_variables(model, images)
    params, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def reference(x):
        for block in range(5):
            x = jax.lax.conv_general_dilated(
                x,
                params[f"Block_{block}"]["kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            norm, running = params[f"Block_{block}"], stats[f"Block_{block}"]
            x = (x - running["mean"]) / jnp.sqrt(running["var"] + 1e-5)
            x = jnp.maximum(x * norm["scale"] + norm["bias"], 0)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(8, -1)
        x = jnp.maximum(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
        return (x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])[:, 0]

    expected = reference(images)
    actual = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_training_updates_running_statistics_and_applies_dropout(random_variables):
    model = create_model(ModelConfig(features=(4, 4, 4, 4, 4), dense=64, dropout=0.5))
    images = 3 + jax.random.normal(jax.random.key(1), SHAPE)
    variables = random_variables(model, images)
    old = variables["batch_stats"]["Block_0"]

    @jax.jit
    def train(key):
        return model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )

    logits, changed = train(jax.random.key(1))
    assert not np.allclose(logits, train(jax.random.key(2))[0])
    infer = jax.jit(model.apply)
    np.testing.assert_array_equal(infer(variables, images), infer(variables, images))
    x = jax.lax.conv_general_dilated(
        images,
        variables["params"]["Block_0"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    running = changed["batch_stats"]["Block_0"]
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = 0.9 * old["mean"] + 0.1 * mean, 0.9 * old["var"] + 0.1 * variance
    np.testing.assert_allclose(running["mean"], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(running["var"], expected[1], rtol=1e-4)


def test_gradient_of_norm_pool_relu_equals_autodiff():
    y, scale, bias = (
        jax.random.normal(jax.random.key(key), shape)
        for key, shape in enumerate([(3, 8, 8, 5), (5,), (5,)])
    )
    weights = jax.random.normal(jax.random.key(3), (3, 4, 4, 5))

    def plain(y, scale, bias):
        y = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + 1e-5) * scale + bias
        return nn.relu(nn.max_pool(y, (2, 2), (2, 2)))

    def total(block):
        return lambda *arguments: (block(*arguments) * weights).sum()

    expected = jax.jit(jax.grad(total(plain), (0, 1, 2)))(y, scale, bias)
    block = total(lambda *a: norm_pool_relu(*a, 1)[0])
    actual = jax.jit(jax.grad(block, (0, 1, 2)))(y, scale, bias)
    for one, other in zip(expected, actual, strict=True):
        assert jnp.abs(one - other).max() <= 1e-4 * jnp.abs(one).max()
