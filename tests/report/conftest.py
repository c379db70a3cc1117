"""One small run with its page, on slides that are known."""

import pytest

import histo_jax
from histo_jax.config import Config
from histo_jax.report import report


@pytest.fixture(scope="package")
def config(tmp_path_factory):
    config = Config()
    config.data.synthetic_slides, config.data.samples_per_class = 8, 60
    config.data.validation_fraction = 0.5
    config.data.tfds_dir = str(tmp_path_factory.mktemp("records"))
    config.model.features, config.model.dense = (2, 2, 2, 2, 2), 4
    config.fit.batch_size, config.fit.epochs = 8, 2
    return config


@pytest.fixture(scope="package")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    histo_jax.fit(config, folder)
    histo_jax.evaluate(config, folder)
    report(config, folder)
    return folder
