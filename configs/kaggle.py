"""Kaggle's "Histopathologic Cancer Detection", as the teaching project trains it.

python -m histo_jax.main --config=configs/kaggle.py --config.data.raw_dir=DIR --workdir=RUN
"""

from histo_jax.config import Config


def get_config() -> Config:
    """Returns the settings."""
    config = Config()
    config.data.source = "kaggle"
    config.data.samples_per_class = 80_000
    return config
