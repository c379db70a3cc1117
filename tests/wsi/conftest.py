"""A network whose probability follows the darkness of the cell, and small made-up slides."""

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

PINK, GLASS = (200, 130, 180), (244, 244, 244)


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


@pytest.fixture(scope="session")
def write_slide():
    """Writes a tiled TIFF with a pyramid and a scale in its tags."""
    tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")

    def write(path, pixels, mpp=None, levels=1, mpp_y=None):
        with tifffile.TiffWriter(path) as file:
            for level in range(levels):
                options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib"}
                if mpp:
                    scale = 1e4 / 2**level
                    options["resolution"] = scale / mpp, scale / (mpp_y or mpp)
                    options["resolutionunit"] = "CENTIMETER"
                file.write(pixels, subfiletype=int(level > 0), metadata=None, **options)
                height, width = (side // 2 * 2 for side in pixels.shape[:2])
                halves = pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
                pixels = halves.mean((1, 3)).round().astype(np.uint8)
        return path

    return write


@pytest.fixture(scope="session")
def tissue_pixels():
    """Noisy pink tissue on glass, with a dark square."""

    def make(height, width, square=None, border=0, seed=0):
        rng = np.random.default_rng(seed)
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[:] = GLASS
        inside = slice(border, height - border), slice(border, width - border)
        pixels[inside] = PINK
        noise = rng.integers(0, 12, (height // 8 + 1, width // 8 + 1, 1)).repeat(8, 0).repeat(8, 1)
        pixels += noise[:height, :width].astype(np.uint8)
        if square:
            x, y, side = square
            pixels[y : y + side, x : x + side] = (60, 10, 80)
        return pixels

    return make
