"""The D4-invariant network: the effect of flips and rotations on each layer."""

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histo_jax.config import ModelConfig
from histo_jax.models import create_model
from histo_jax.models.p4m import ORIENTATIONS, FiveBlockP4M, P4MBlock

SYMMETRIES = [(transposed, rotations) for transposed in (False, True) for rotations in range(4)]


def transform(x, symmetry):
    transposed, rotations = symmetry
    return np.rot90(x.swapaxes(1, 2) if transposed else x, rotations, (1, 2))


def images(sample=None):
    if sample is None:
        return np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    path = sample / "pcam_sample" / "camelyonpatch_level_2_split_train_x.h5"
    with h5py.File(path) as file:
        return (file["x"][:4].astype(np.float32) - 178) / 60


@pytest.mark.parametrize(
    ("source", "use_winograd", "train"),
    [
        ("noise", False, False),
        ("noise", False, True),
        ("noise", True, True),
        ("real", True, False),
    ],
)
def test_each_layer_is_equivariant_and_the_logit_invariant(
    source, use_winograd, train, random_variables, request
):
    x = images(request.getfixturevalue("sample") if source == "real" else None)
    model = FiveBlockP4M((3, 4, 5, 6, 7), 16, 0.0, use_winograd=use_winograd)
    variables = random_variables(model, x)

    @jax.jit
    def layers(x):
        logits, changed = model.apply(
            variables,
            x,
            train=train,
            mutable=["intermediates", "batch_stats"],
            capture_intermediates=lambda module, _: isinstance(module, P4MBlock),
            rngs={"dropout": jax.random.key(0)},
        )
        blocks = changed["intermediates"]
        return logits, [blocks[f"Block_{i}"]["__call__"][0] for i in range(5)]

    logits, outputs = layers(x)
    assert np.ptp(logits) > 1e-3
    for symmetry in SYMMETRIES:
        transformed_logits, transformed = layers(transform(x, symmetry))
        assert np.abs(transformed_logits - logits).max() <= 1e-5 * np.abs(outputs[-1]).max()
        permutations = set()
        for plain, actual in zip(outputs, transformed, strict=True):
            shape = (*plain.shape[:3], ORIENTATIONS, -1)
            plain = np.asarray(plain).reshape(shape)
            actual = np.asarray(actual).reshape(shape)
            limit = 1e-5 * np.abs(plain).max()
            expected = transform(plain, symmetry)
            # A symmetry permutes the orientations: in the same way for all features and layers.
            pairs = np.abs(actual[..., :, None, :] - expected[..., None, :, :])
            errors = pairs.max((0, 1, 2, 5))
            assert (errors.min(1) <= limit).all()
            permutations.add(tuple(errors.argmin(1)))
        (permutation,) = permutations
        assert sorted(permutation) == list(range(ORIENTATIONS))


def test_parameters_have_one_eighth_of_the_ordinary_shape():
    model = create_model(ModelConfig(name="five_block_p4m", features=(6, 8, 16, 32, 64), dense=256))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    params = jax.tree.map(lambda leaf: leaf.shape, shapes["params"])
    assert params["Block_0"]["kernel"] == (3, 3, 3, 6)
    assert params["Block_4"]["kernel"] == (3, 3, 8, 32, 64)
    assert params["Block_4"]["scale"] == (64,)
    assert params["Dense_0"]["kernel"] == (64, 256)
    statistics = jax.tree.map(lambda leaf: leaf.shape, shapes["batch_stats"])
    assert statistics["Block_4"]["var"] == (64,)


def test_a_kernel_consists_of_the_transformed_filters():
    filters = np.arange(9.0).reshape(3, 3)
    block = P4MBlock(1, jnp.float32, False)
    kernel = np.repeat(filters[:, :, None], 3, 2)[..., None]
    kernel = block.make_kernel(jnp.asarray(kernel))
    actual = {np.asarray(kernel)[:, :, 0, g].tobytes() for g in range(ORIENTATIONS)}
    expected = {transform(filters[None].astype(np.float32), s)[0].tobytes() for s in SYMMETRIES}
    assert len(expected) == 8
    assert actual == expected


@pytest.mark.parametrize("use_winograd", [False, True])
def test_orientations_share_statistics_and_gradients(use_winograd):
    """Compares with BatchNorm over an axis of orientations, by automatic differentiation."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 12, 12, 8 * 2)), jnp.float32)
    block = P4MBlock(3, jnp.float32, use_winograd)
    params = jax.jit(block.init, static_argnums=2)(jax.random.key(0), x, False)["params"]
    params = {**params, "scale": jnp.array([1.5, -0.5, 2]), "bias": jnp.array([0.1, 0.2, -0.3])}
    weights = np.random.default_rng(1).normal(size=(4, 6, 6, 24)).astype(np.float32)
    state = {"mean": jnp.zeros(3), "var": jnp.ones(3)}

    def ours(params):
        output, changed = block.apply(
            {"params": params, "batch_stats": state}, x, True, mutable=["batch_stats"]
        )
        return (output * weights).sum(), (output, changed["batch_stats"])

    def plain(params):
        kernel = block.make_kernel(params["kernel"])
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        ).reshape(4, 12, 12, 8, 3)
        mean, variance = y.mean((0, 1, 2, 3)), y.var((0, 1, 2, 3))
        y = (y - mean) / jnp.sqrt(variance + 1e-5) * params["scale"] + params["bias"]
        output = nn.relu(nn.max_pool(y.reshape(4, 12, 12, 24), (2, 2), (2, 2)))
        running = {"mean": 0.1 * mean, "var": 0.9 + 0.1 * variance}
        return (output * weights).sum(), (output, running)

    (_, actual), actual_gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    expected = jax.tree.leaves((expected, expected_gradient))
    actual = jax.tree.leaves((actual, actual_gradient))
    for one, other in zip(expected, actual, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()
