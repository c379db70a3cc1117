"""PatchCamelyon with its official splits, as the teaching project trains.

python -m histo_jax.main --config=configs/pcam.py --config.data.raw_dir=DIR --workdir=RUN
"""

from histo_jax.config import Config


def get_config() -> Config:
    """Returns the settings."""
    config = Config()
    config.data.source = "pcam"
    return config
