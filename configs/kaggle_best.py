"""Kaggle's "Histopathologic Cancer Detection" with the recipe of `pcam_best.py`.

python -m histo_jax.main --config=configs/kaggle_best.py --config.data.raw_dir=DIR --workdir=RUN

Not measured yet.
"""

import runpy
from pathlib import Path

from histo_jax.config import Config


def get_config() -> Config:
    """Returns the settings."""
    config: Config = runpy.run_path(str(Path(__file__).with_name("pcam_best.py")))["get_config"]()
    config.data.source = "kaggle"
    # All 220,025, with 40.5% tumour as in the test: balanced ones would waste 42,000.
    config.data.samples_per_class = None
    return config
