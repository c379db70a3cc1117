"""Functions of images as ONNX graphs: every rule, and the simplification."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from histo_jax.export.builder import ConversionError
from histo_jax.export.conversion import convert
from histo_jax.export.onnx import make_model

SHAPE = (12, 12, 3)


def run(function, *batches):
    """The outputs of the converted function for each batch, and its operators."""
    graph = convert(lambda x: (function(x),) * 2, SHAPE, ("probability", "logit"))
    model = make_model(graph, SHAPE[0], {})
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs = [session.run(["logit"], {"images": images})[0] for images in batches]
    return outputs, [node.op_type for node in model.graph.node]


class Layers(nn.Module):
    """Layers that users' networks have, one after the other."""

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32) / 255
        x = nn.gelu(nn.Conv(8, (3, 3), kernel_dilation=2)(x))
        x = nn.silu(nn.GroupNorm(2)(x))
        x = nn.leaky_relu(nn.Conv(8, (3, 3), feature_group_count=8, padding="VALID")(x))
        x = nn.elu(nn.LayerNorm()(nn.max_pool(x, (3, 3), (2, 2), "SAME")))
        x = jnp.concatenate([x, jnp.flip(x, 1)[:, :, ::-1], x.swapaxes(1, 2)], -1)
        x = nn.avg_pool(jnp.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0))), (2, 2), (2, 2))
        x = x * nn.sigmoid(nn.Dense(24)(x.mean((1, 2))))[:, None, None, :]
        x = x.reshape(x.shape[0], -1, 24)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x)
        x = jnp.clip(nn.softplus(x), 0.1, 2.0) - jnp.where(x > 1, x, jnp.tanh(x) ** 3)
        x = x.max(1) - x.min(1) + jnp.sqrt(jnp.square(x).sum(1)) + jnp.log1p(jnp.abs(x[:, 0]))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=True)(x))[:, 0]


def test_each_layer_that_a_rule_knows_computes_the_same():
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), np.uint8)
    shapes = jax.eval_shape(Layers().init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    # Compiling the initialisers would take longer than the test itself.
    variables = jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(s.dtype), shapes)
    expected = jax.jit(Layers().apply)(variables, images)
    outputs, _ = run(lambda x: Layers().apply(variables, x), images[:1], images)
    for logits in outputs:
        np.testing.assert_allclose(logits, expected[: len(logits)], rtol=1e-4, atol=1e-5)


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x.astype(jnp.float32), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def windows(x):
    return [
        jax.lax.slice(x, (0, i, j, 0), x.shape, (1, 2, 2, 1)) for i in range(2) for j in range(2)
    ]


def test_batch_norm_and_pooling_become_one_convolution_and_one_pooling():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, *SHAPE), np.uint8)
    kernel, scale, bias = rng.normal(size=(3, 3, 3, 4)), rng.normal(size=4), rng.normal(size=4)

    def function(x):
        y = (convolve(x, kernel.astype(np.float32)) - bias) * scale / 2 + bias
        a, b, c, d = windows(y)
        return nn.relu(jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))).sum((1, 2, 3))

    with jax.enable_x64(False):
        expected = function(images)
        (logits,), ops = run(function, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    assert ops.count("Conv") == ops.count("MaxPool") == 1
    assert not {"Mul", "Add", "Sub", "Div", "Max", "Slice"} & set(ops)


def test_a_convolution_that_is_used_twice_is_not_folded():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, *SHAPE), np.uint8)
    kernel = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)

    def function(x):
        y = convolve(x, kernel)
        pooled = jnp.maximum(*windows(y)[:2]).mean((1, 2, 3))
        return (y * np.float32(3)).sum((1, 2, 3)) - pooled

    (logits,), _ = run(function, images)
    np.testing.assert_allclose(logits, function(images), rtol=1e-5)


class Sorting(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Head(name="Head")(x.astype(jnp.float32))


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sort(x.reshape(x.shape[0], -1))[:, 0]


def test_a_refusal_names_the_operation_and_its_layer():
    with pytest.raises(ConversionError, match="the operation 'sort'") as error:
        convert(lambda x: (Sorting().apply({}, x),), SHAPE, ("logit",))
    assert error.value.layer == "Sorting/Head"
