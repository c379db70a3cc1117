import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histo_jax.config import Config, ModelConfig
from histo_jax.errors import ExpectedError
from histo_jax.models import create_model
from histo_jax.training import sharding
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, abstract_state, create_state, update


@pytest.fixture
def config():
    config = Config()
    config.model = ModelConfig(features=(2, 2, 2, 2, 2), dense=4)
    return config


def make(config, step, losses):
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    state = create_state(model, optimizer, step, np.full(3, 0.5), np.full(3, 0.25))
    early_stopping = EarlyStopping.create(config.early_stopping)
    for loss in losses:
        early_stopping = update(early_stopping, loss)
    history = [{"epoch": k + 1, "validation_loss": loss} for k, loss in enumerate(losses)]
    state = state.replace(step=jnp.int32(step), loss_sum=jnp.float32(0.1))
    return Checkpoint(state, early_stopping, {"step": step, "fingerprint": "f"}, history)


def test_latest_two_and_best_are_kept_and_come_back_whole(config, tmp_path):
    losses = [0.5, 0.3, 0.4, 0.6, 0.7]
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(make(config, step, losses[:step]), losses[step - 1])
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "5"}
    place = sharding.replicated(sharding.batch_sharding())
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 5
        best = checkpoints.restore_best(config, place)
    wanted = make(config, 2, losses[:2])
    jax.tree.map(np.testing.assert_array_equal, best.state, wanted.state)
    jax.tree.map(np.testing.assert_array_equal, best.early_stopping, wanted.early_stopping)
    assert (best.data, best.history) == (wanted.data, wanted.history)


@pytest.mark.parametrize("change", ["dense", "features", "fewer"])
def test_a_checkpoint_of_another_model_is_refused(config, tmp_path, change):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 1, [0.5]), 0.5)
    if change == "dense":
        config.model.dense = 5
    else:
        config.model.features = (2, 2, 2, 2, 3) if change == "features" else (2, 2, 2, 2)
    place = sharding.replicated(sharding.batch_sharding())
    remedy = pytest.raises(ExpectedError, match="checkpoint of another model")
    with Checkpoints(tmp_path) as checkpoints, remedy:
        checkpoints.restore_best(config, place)


def test_no_checkpoint_names_the_remedy(tmp_path):
    with pytest.raises(ExpectedError, match="run --mode=fit first"):
        Checkpoints.of(tmp_path)


def test_abstract_state_has_the_real_ones_shapes(config):
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    place = sharding.replicated(sharding.batch_sharding())
    real = create_state(model, optimizer, 0, np.zeros(3), np.ones(3))
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"),
        abstract_state(model, optimizer, place), real,
    )  # fmt: skip
