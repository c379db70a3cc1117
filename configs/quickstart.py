"""Training, evaluation, prediction and report on synthetic slides, in minutes on two CPU cores.

./launch/quickstart.sh
"""

from histo_jax.config import Config


def get_config() -> Config:
    """Returns the settings."""
    config = Config()
    config.data.source = "synthetic"
    config.data.tfds_dir = "runs/records"
    config.data.synthetic_slides = 40
    config.data.validation_fraction = 0.2
    # A quarter of the channels: a sixteenth of the computation, and enough for synthetic tissue.
    config.model.features = (8, 16, 32, 64, 128)
    config.model.dense = 256
    config.optimizer.learning_rate = 1e-3
    config.fit.epochs = 8
    return config
