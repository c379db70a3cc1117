"""Writes the records of a config's data."""

from histo_jax.config import Config
from histo_jax.config_checks import validate
from histo_jax.data import records


def prepare(config: Config) -> records.Prepared:
    """Returns the records of `config.data`, writing them first where they are missing.

    `prepare(config).tables["train"]` has a row for each training patch with `id`, `label` and
    `slide`, and `prepare(config).records("train", rows).images(positions)` reads pixels.

    A process that is killed leaves nothing that looks complete. Of several processes one writes,
    and the others wait for it.

    Args:
        config: `data`, and the seed of synthetic slides, decide.

    Raises:
        UserError: a setting is wrong, the data is missing or wrong, or several records fit, and no
            setting selects one.
        OSError: `data.tfds_dir` cannot be written, or the disk is full.
    """
    validate(config)
    return records.prepare(config.data, config.data_seed)
