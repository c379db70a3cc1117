"""Patches cut from your annotated slides by PatchCamelyon's rule, with the settings of `pcam.py`.

python -m histo_jax.main --config=configs/slides.py --config.data.raw_dir=FOLDER \
    --config.data.positive=CLASS --workdir=RUN

`docs/slides.md` describes annotations, and the circle of training and correcting them.
"""

from histo_jax.config import Config


def get_config() -> Config:
    """Returns the settings."""
    config = Config()
    config.data.source = "slides"
    config.data.validation_fraction = 0.2
    return config
