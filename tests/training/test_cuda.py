"""What a GPU gets, lowered for it without one."""

import re

import jax
import numpy as np
import pytest

from histo_jax.config import Config
from histo_jax.distributed import mesh
from histo_jax.models import create_model
from histo_jax.training import placement
from histo_jax.training.augmentation import make_augment
from histo_jax.training.losses import get_loss
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import abstract_state
from histo_jax.training.step import make_train_step

NETWORKS = {
    "five_block": (32, 64, 128, 256, 512),
    "five_block_p4m": (4, 8, 16, 32, 64),
}


def lower(function, *arguments):
    return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_has_bfloat16_convolutions_and_no_form_for_the_cpu(name, monkeypatch):
    config = Config()
    config.model.name, config.model.features = name, NETWORKS[name]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    sharding = mesh.batch_sharding()
    step = make_train_step(
        model, optimizer, sharding, make_augment(config.augment), get_loss(config.fit.loss)
    )
    state = abstract_state(model, optimizer, 96, mesh.replicated(sharding), False)
    batch = {
        "image": jax.ShapeDtypeStruct((64, 96, 96, 3), np.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((64,), np.float32, sharding=sharding),
    }
    convolutions = re.findall(r"stablehlo\.convolution.*", lower(step, state, batch))
    # Five forward, five for kernels, and four for the inputs of blocks 2 to 5.
    assert len(convolutions) == 14
    assert all(re.search(r"-> tensor<[\dx]+xbf16>", line) for line in convolutions)


def test_rows_of_more_pixels_than_int32_counts_are_gathered_by_their_index():
    sharding, count = mesh.batch_sharding(), 300_000
    pixels = jax.ShapeDtypeStruct((count, 27_648), np.uint8, sharding=mesh.replicated(sharding))
    positions = jax.ShapeDtypeStruct((64,), np.int32, sharding=sharding)
    assert count * 27_648 > 2**32
    program = lower(placement.make_gather(96, sharding), pixels, positions)
    (gather,) = re.findall(r"stablehlo\.gather.*", program)
    assert f"(tensor<{count}x27648xui8>, tensor<{64 // jax.device_count()}x1xi32>)" in gather
    assert str(count * 27_648) not in program
