"""Your own images, from a table or from class folders, with the settings of `kaggle.py`.

python -m histo_jax.main --config=configs/images.py --config.data.raw_dir=FOLDER \
    --config.data.positive=CLASS --workdir=RUN

Where labels are 0 and 1, leave `data.positive` out. `docs/data.md` describes tables and folders.
"""

from histo_jax.config import Config


def get_config() -> Config:
    """Returns the settings."""
    config = Config()
    config.data.source = "images"
    config.data.validation_fraction = 0.2
    return config
