"""Scores: pure functions over arrays."""

import numpy as np
from jaxtyping import Float
from sklearn.metrics import roc_auc_score


def binary_scores(
    logits: Float[np.ndarray, " examples"], labels: Float[np.ndarray, " examples"]
) -> dict[str, float]:
    """Returns the scores of a two-class classifier over all examples at once.

    Args:
        logits: of the positive class.
        labels: 0 or 1.

    Returns:
        `count`; `auc`, area under the ROC curve by scikit-learn, nan where a class is missing;
        `nll`, mean negative log-likelihood in nats; `accuracy` at probability 0.5.
    """
    logits = logits.astype(np.float64)
    # -log sigmoid(z) = log(1 + exp(-z)) for label 1, and of -z for label 0, without overflow.
    nll = np.logaddexp(0, np.where(labels == 1, -logits, logits))
    both_classes = 0 < labels.sum() < len(labels)
    return {
        "count": len(labels),
        "auc": float(roc_auc_score(labels, logits)) if both_classes else float("nan"),
        "nll": float(nll.mean()),
        "accuracy": float(((logits > 0) == (labels == 1)).mean()),
    }
