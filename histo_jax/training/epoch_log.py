"""The log line of an epoch and its estimate of the remaining time."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger("histo_jax")

# Cost of test-time augmentation, in forward passes.
_TTA_PASSES = 7
# Forward passes of a report: 36 patches, 24 gradients each, and a gradient costs three passes.
_REPORT_PASSES = 36 * 24 * 3
_TRAINING_PASSES = 3  # cost of a training step per image


def follow_up_passes(
    commands: Sequence[str], evaluation_count: int, test_count: int, tta: bool
) -> int:
    """Returns the approximate cost of later commands, in forward passes of one patch.

    Args:
        commands: 'evaluate', 'predict' and 'report' count.
        evaluation_count: patches that `evaluate` scores.
        test_count: patches that `predict` scores.
        tta: whether both use test-time augmentation.
    """
    count = evaluation_count * ("evaluate" in commands) + test_count * ("predict" in commands)
    return count * (_TTA_PASSES if tta else 1) + _REPORT_PASSES * ("report" in commands)


def log_epoch(
    row: Mapping[str, Any],
    epochs: int,
    images_per_second: float | None,
    seconds: float,
    passes: float,
) -> None:
    """Logs the scores of an epoch, its speed, and the longest time that the run can still take.

    Args:
        row: of the history.
        epochs: at most.
        images_per_second: of training; None = not measured.
        seconds: of the remaining epochs, validation included.
        passes: see `follow_up_passes`, on images of this epoch's size.
    """
    if images_per_second:
        seconds += passes / (_TRAINING_PASSES * images_per_second)
    log.info(
        "epoch %d/%d  loss %.4f  validation loss %.4f  validation AUC %.4f  %s img/s  "
        "at most %s left",
        row["epoch"],
        epochs,
        row["train_loss"],
        row["validation_loss"],
        row["validation_auc"],
        round(images_per_second) if images_per_second else "-",
        _duration(seconds),
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
