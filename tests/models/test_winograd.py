"""The Winograd block against the plain formulation: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from histo_jax.models import winograd_block

EPSILON = 1e-5
# Height, channels, features: few channels; 4x4 tiles; an even and an odd number of 2x2 tiles; one
# tile. Small heights, since two values of a window that
# differ by rounding only would make the gradient ambiguous.
SHAPES = [(32, 3, 16), (24, 16, 8), (12, 8, 16), (14, 8, 16), (2, 16, 8)]
SEVERAL_CHUNKS = 24 * 24 * 8


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )


def plain_train(x, kernel, scale, bias):
    y = convolve(x, kernel)
    mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2))
    y = (y - mean) / jnp.sqrt(variance + EPSILON) * scale + bias
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jax.nn.relu(y), mean, variance


def draw(shape, dtype):
    height, channels, features = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, height, height, channels))
    kernel = rng.normal(size=(3, 3, channels, features)) / np.sqrt(9 * channels)
    scale, bias = rng.normal(size=(2, features))  # of both signs
    weights = rng.normal(size=(4, height // 2, height // 2, features))
    return [jnp.asarray(v, dtype) for v in (x, kernel, scale, bias, weights)]


def assert_close(expected, actual, tolerance):
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert one.shape == other.shape
        assert jnp.abs(one - other).max() <= tolerance * jnp.abs(one).max()


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        *((shape, np.float64, 1e-10) for shape in SHAPES),
        *((shape, np.float32, 1e-4) for shape in SHAPES[:2]),
    ],
)
def test_training_equals_the_plain_formulation(shape, dtype, tolerance, monkeypatch, request):
    if dtype == np.float64:
        # Together with several chunks; float32 with one.
        request.getfixturevalue("float64")
        monkeypatch.setattr(winograd_block, "CHUNK_ELEMENTS", SEVERAL_CHUNKS)
    *arguments, weights = draw(shape, dtype)

    def outputs_and_gradients(block):
        def total(*arguments):
            outputs = block(*arguments)
            return (outputs[0] * weights).sum(), outputs

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(*arguments)

    (_, outputs), gradients = outputs_and_gradients(lambda *a: winograd_block.train_block(*a, 1))
    (_, expected), expected_gradients = outputs_and_gradients(plain_train)
    assert outputs[0].dtype == dtype
    assert_close(expected, outputs, tolerance)
    assert_close(expected_gradients, gradients, tolerance)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [SHAPES[0], *SHAPES[2:]])  # inference has no 4x4 tiles
def test_inference_equals_the_plain_formulation(shape, monkeypatch):
    monkeypatch.setattr(winograd_block, "CHUNK_ELEMENTS", SEVERAL_CHUNKS)
    x, kernel, scale, bias, _ = draw(shape, np.float64)
    y = convolve(x, kernel) * scale + bias
    expected = jax.nn.relu(
        lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    )
    assert_close(expected, jax.jit(winograd_block.infer_block)(x, kernel, scale, bias), 1e-10)


def test_one_of_several_equal_maxima_gets_the_gradient():
    x = jnp.zeros((2, 4, 4, 3))  # all values are equal
    kernel, scale = jnp.ones((3, 3, 3, 16)), jnp.ones(16)

    def total(bias):
        return winograd_block.train_block(x, kernel, scale, bias, 1)[0].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.ones(16)), 2 * 2 * 2)


@pytest.mark.parametrize("images", [1, 7, 60])
def test_images_are_split_into_equal_chunks(images):
    x = jnp.zeros((images, 48, 48, 1))
    chunks = winograd_block._split(x, 64)
    assert chunks.shape[0] * chunks.shape[1] == images
    assert chunks.shape[1] == 1 or chunks[0].size * 64 <= winograd_block.CHUNK_ELEMENTS
