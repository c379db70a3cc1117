"""Probabilities of the test patches."""

import logging
import os

import numpy as np
import pandas as pd
from scipy.special import expit

from histo_jax import command, ensemble, inference, provenance
from histo_jax.config import Config
from histo_jax.data.records import prepare
from histo_jax.distributed import consensus
from histo_jax.errors import DataError
from histo_jax.run.workdir import Workdir

log = logging.getLogger("histo_jax")


class NoTestPatchesError(DataError):
    """The data has no test patches."""


def predict(config: Config, workdir: str | os.PathLike[str]) -> pd.DataFrame:
    """Predicts the test patches with the best checkpoint of `workdir`, on all local devices.

    Probabilities are calibrated, and shifted to `config.predict.prior` if it is set. With
    `config.predict.tta` the logits are means over eight symmetries; with
    `config.predict.checkpoints` they are the equal means of these runs. Writes `submission.csv`; an
    old one is replaced only when the new one is complete.

    Args:
        config: settings of the run; lengths and folders may differ.
        workdir: folder of a trained run; any folder with `predict.checkpoints`.

    Returns:
        `id`, and `label`, float64, the probability of tumour; for Kaggle's data the ids of
        `sample_submission.csv`, in its order.

    Raises:
        UserError: there is no checkpoint, or one of another model, or there are no test patches.
        OSError: a file cannot be written.
    """
    with command.start(config, workdir, "predict") as run:
        return predict_in(run, config)


def predict_in(run: Workdir, config: Config) -> pd.DataFrame:
    """Does the work of `predict` in an open folder."""
    predictor = ensemble.load_predictor(config, run.path, config.predict.prior)
    network = type(predictor.trained[0].model)
    provenance.warn_of_changed_network(run, network, config.config_file)
    prepared = prepare(config.data, config.data_seed, run.path, raw_may_be_gone=True)
    ensemble.check_size(predictor, config, prepared)
    consensus.check_records(config, prepared.tables)
    if "test" not in prepared.tables:
        raise NoTestPatchesError(
            f"{config.data.raw_dir or prepared.directory} has no test patches to predict: "
            "add them to config.data.raw_dir"
        )
    ensemble.acquire(run, config, prepared)
    log.info("compiling the prediction step")
    ids = prepared.tables["test"]["id"]
    source, rows = prepared.source("test"), np.arange(len(ids))
    raw = inference.raw_logits(predictor, source, rows, "predicting")
    table = pd.DataFrame({"id": ids, "label": expit(predictor.calibrate(raw).mean(0))})
    # Eight digits are the precision of float32 logits.
    run.write_text("submission.csv", table.to_csv(index=False, float_format="%.8g"))
    log.info("%d predictions in %s", len(table), run.path / "submission.csv")
    return table
