"""Probabilities for the test patches; the only room that knows pmap."""

import logging
import os

import jax
import numpy as np
import pandas as pd
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from scipy.special import expit

from histo_jax import command, ensemble
from histo_jax.config import Config
from histo_jax.data import loader
from histo_jax.data.records import prepare
from histo_jax.distributed import consensus
from histo_jax.errors import UserError
from histo_jax.run import progress, signals
from histo_jax.run.workdir import Workdir
from histo_jax.training.step import make_forward, read_behind

log = logging.getLogger("histo_jax")


class NoTestPatchesError(UserError):
    """The data has nothing to predict."""


def predict(config: Config, workdir: str | os.PathLike[str]) -> pd.DataFrame:
    """Predicts the test patches with the best checkpoint of `workdir`, on all local devices.

    Probabilities are calibrated, and move to `config.predict.prior` where it is set. With
    `config.predict.tta` logits are means over eight symmetries; with `config.predict.checkpoints`
    they are the equal means of these runs. Writes `submission.csv`; an old one stays until the new
    one is whole.

    Args:
        config: that of the run; lengths and folders may differ.
        workdir: folder of a run that `fit` has trained; with `predict.checkpoints` any.

    Returns:
        `id` and `label`, float64, the probability of tumour; for Kaggle's data the ids of
        `sample_submission.csv` in its order.

    Raises:
        UserError: no checkpoint, one of another model, or no test patches.
        OSError: a file cannot be written.
    """
    with command.start(config, workdir, "predict") as run:
        return predict_in(run, config)


def predict_in(run: Workdir, config: Config) -> pd.DataFrame:
    """Does the work of `predict` in an open folder."""
    folder = run.path
    devices = jax.local_devices()
    trained = ensemble.restore(config, folder, SingleDeviceSharding(devices[0]))
    prepared = prepare(config.data, config.data_seed, folder, raw_may_be_gone=True)
    consensus.check_records(config, prepared.tables)
    if "test" not in prepared.tables:
        raise NoTestPatchesError(
            f"{config.data.raw_dir or prepared.directory} has no test patches to predict: "
            "add them to config.data.raw_dir"
        )
    ids = prepared.tables["test"]["id"]
    if config.predict.checkpoints:
        run.acquire(config)
        run.save_config(config)
        run.update_status(records=prepared.name)
    # Each process predicts an equal share; what the last ones lack is filled up with the last.
    share = -(-len(ids) // jax.process_count())
    own = np.minimum(np.arange(share) + share * jax.process_index(), len(ids) - 1)
    per_device = -(-min(config.predict.batch_size, share) // len(devices))

    def logits_of(member: ensemble.TrainedModel) -> np.ndarray:
        # The weights are handed over as they are; replicated ones would be copied each time.
        forward = jax.pmap(
            make_forward(member.model, ensemble.uses_tta(config, member)),
            in_axes=(None, 0),
            devices=devices,
        )
        batches = loader.ordered_batches(prepared.source("test"), own, per_device * len(devices))
        images = (
            batch["image"].reshape(len(devices), per_device, *batch["image"].shape[1:])
            for batch in signals.stopping(batches)
        )
        outputs = read_behind(forward(member.weights, part) for part in images)
        with progress.bar(
            "predicting", share, unit=" img", leave=False, is_shown=run.is_primary
        ) as bar:
            outputs = progress.counted(bar, outputs, per_device * len(devices), share)
            # What fills up the last batch comes after all others.
            logits = np.concatenate([output.reshape(-1) for output in outputs])[:share]
        logits = multihost_utils.process_allgather(logits).reshape(-1)[: len(ids)]
        return member.calibration.apply(logits, config.predict.prior)

    log.info("compiling the prediction step")
    probabilities = expit(np.mean([logits_of(member) for member in trained], axis=0))
    table = pd.DataFrame({"id": ids, "label": probabilities})
    # Eight digits are what float32 logits can tell apart.
    run.write_text("submission.csv", table.to_csv(index=False, float_format="%.8g"))
    log.info("%d predictions in %s", len(table), folder / "submission.csv")
    return table
