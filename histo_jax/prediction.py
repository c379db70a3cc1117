"""Probabilities of the test patches."""

import logging
import os

import numpy as np
import pandas as pd
from scipy.special import expit

from histo_jax import ensemble, inference
from histo_jax.config import Config, validate
from histo_jax.data.records import prepare
from histo_jax.distributed import consensus, runtime
from histo_jax.errors import DataError
from histo_jax.run import files
from histo_jax.run import workdir as workdirs

log = logging.getLogger("histo_jax")


class NoTestPatchesError(DataError):
    """The data has no test patches."""


@runtime.session
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
    validate(config)
    runtime.set_up()
    folder = files.expand(workdir, "--workdir")
    workdirs.check_compatible(folder, config)
    with workdirs.session(folder, "predict"):
        predictor = ensemble.load_predictor(config, folder, config.predict.prior)
        prepared = prepare(config, folder, raw_may_be_gone=True)
        consensus.check_records(config, prepared.tables)
        if "test" not in prepared.tables:
            raise NoTestPatchesError(
                f"{config.data.raw_dir or prepared.directory} has no test patches to predict: "
                "add them to config.data.raw_dir"
            )
        ids = prepared.tables["test"]["id"]
        if config.predict.checkpoints:
            workdirs.acquire(folder, config)
            workdirs.save_config(folder, config)
            workdirs.update_status(folder, records=prepared.name)
        log.info("compiling the prediction step")
        rows = np.arange(len(ids))
        raw = inference.raw_logits(predictor, prepared.source("test"), rows, "predicting")
        probabilities = expit(predictor.calibrate(raw).mean(0))
        table = pd.DataFrame({"id": ids, "label": probabilities})
        path = folder / "submission.csv"
        # Eight digits are the precision of float32 logits.
        workdirs.write_text(path, table.to_csv(index=False, float_format="%.8g"))
    log.info("%d predictions in %s", len(table), path)
    return table
