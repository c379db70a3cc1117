"""PatchCamelyon with the best recipe found: the symmetric network, much augmentation, one cycle.

python -m histo_jax.main --config=configs/pcam_best.py --config.data.raw_dir=DIR --workdir=RUN

Measured on a sample of 19,171 training patches and 2,907 validation patches of other slides, two
CPU cores, three seeds: validation AUC 0.948, 0.950, 0.951, NLL 0.289, 0.280, 0.276; 30 minutes, 186
img/s; the three together 0.953 and 0.273. How it was found: tests/benchmarks/recipes.py.
"""

import runpy
from pathlib import Path

from histo_jax.config import Config


def get_config() -> Config:
    """Returns the settings."""
    config: Config = runpy.run_path(str(Path(__file__).with_name("pcam.py")))["get_config"]()
    config.model.name = "five_block_p4m"
    config.model.features = (4, 8, 16, 32, 64)
    config.model.dense = 256
    config.augment.shift = 4
    config.augment.stain = 0.3
    config.augment.brightness = 0.15
    config.augment.mixup = 0.2
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "one_cycle"
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.999
    config.fit.epochs = 16
    # The cycle is to end: its last epochs, at small steps, are the best.
    config.early_stopping.patience = 16
    return config
