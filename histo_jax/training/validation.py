"""Validation at the end of an epoch."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from histo_jax.distributed import consensus
from histo_jax.metrics import Calibration, binary_scores
from histo_jax.models.forward import Forward, Weights
from histo_jax.run import progress, signals
from histo_jax.training import step as steps
from histo_jax.training.placement import Dataset


class Validation(NamedTuple):
    """Result of a validation.

    Attributes:
        calibration: fitted on the logits of the validation split.
        loss: mean cross-entropy of the calibrated probabilities, nats.
        auc: area under the ROC curve.
    """

    calibration: Calibration
    loss: float
    auc: float


def predict(
    eval_step: Forward,
    weights: Weights,
    dataset: Dataset,
    batch_size: int,
    title: str,
    is_primary: bool,
) -> tuple[Float[np.ndarray, " examples"], Float[np.ndarray, " examples"]]:
    """Returns logits and labels of all examples in order, with a progress bar.

    Args:
        eval_step: see `make_eval_step`.
        weights: of the network.
        dataset: the validation split.
        batch_size: of the global batch.
        title: of the progress bar.
        is_primary: whether to show it.

    Raises:
        Preempted: a signal came, and this is the only process.
    """
    batches = dataset.eval_batches(batch_size)
    # Several processes must stop together, which the control signal of training steps ensures.
    if jax.process_count() == 1:
        batches = signals.stopping(batches)
    count = len(dataset)
    with progress.bar(title, count, unit=" img", leave=False, is_shown=is_primary) as bar:
        counted = progress.counted(bar, batches, batch_size, count)
        return steps.collect_logits(eval_step, weights, counted)


def score(
    logits: Float[np.ndarray, " examples"], labels: Float[np.ndarray, " examples"]
) -> Validation:
    """Fits the calibration and scores the calibrated probabilities, equal in all processes.

    Early stopping uses the calibrated loss, with which the run will be evaluated: otherwise it
    would stop a network whose ranking still improves while it becomes overconfident, which
    calibration corrects.
    """
    calibration = Calibration.fit(logits, labels)
    scores = binary_scores(calibration.apply(logits), labels)
    values = [*dataclasses.astuple(calibration), scores["nll"], scores["auc"]]
    # The last bits may differ between processes, and with them a decision.
    *fitted, loss, auc = consensus.broadcast_from_primary(np.array(values)).tolist()
    return Validation(Calibration(*fitted), loss, auc)
