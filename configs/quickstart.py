"""The whole main job in a few minutes on two cores, on drawn slides."""

from histo_jax.config import Config


def get_config() -> Config:
    """Returns the settings."""
    config = Config()
    config.data.source = "synthetic"
    config.data.synthetic_slides = 40
    config.data.validation_fraction = 0.2
    config.model.features = (16, 32, 64, 128, 256)
    config.model.dense = 256
    config.optimizer.learning_rate = 1e-3
    config.fit.epochs = 5
    return config
