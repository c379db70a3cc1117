"""A network whose probability follows the darkness of the cell."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import histo_jax
from histo_jax import registry
from histo_jax.config import Config
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.run.workdir import Workdir
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, create_state


class Darkness(nn.Module):
    """Dark centres are positive; a little of the whole window, by position, shows any shift."""

    @nn.compact
    def __call__(self, images, train):
        scale = self.param("scale", nn.initializers.constant(-1.0), ())
        ramp = jnp.linspace(-0.5, 0.5, images.shape[1])
        centre = images[:, 32:64, 32:64].mean((1, 2, 3))
        rows, columns = images.mean((2, 3)) @ ramp, images.mean((1, 3)) @ ramp
        return scale * (centre + 0.003 * rows + 0.002 * columns)


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    """A run with this network, without records, which maps do not need."""
    pytest.importorskip("openslide", reason="the extra slides is not installed")
    histo_jax.register_model("darkness")(Darkness)
    config = Config()
    config.data.source = "kaggle"
    config.model.name = "darkness"
    config.predict.batch_size = 32
    folder = tmp_path_factory.mktemp("wsi")
    Workdir(folder).save_config(config)
    statistics = np.full(3, 0.7), np.full(3, 0.2)
    state = create_state(
        create_model(config.model), create_optimizer(config.optimizer), 0, *statistics, 96, False
    )
    data = {
        "fingerprint": "",
        "image_size": 96,
        "calibration": dataclasses.asdict(Calibration(2.0, -1.0)),
    }
    early_stopping = EarlyStopping.create(config.early_stopping)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(Checkpoint(state, early_stopping, data, []), 0.5)
    yield folder
    del registry.MODELS._entries["darkness"]


@pytest.fixture(scope="package")
def predictor(run):
    return histo_jax.load(run)
