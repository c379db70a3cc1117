"""Calibration of logits: Platt scaling, and adjustment to another prior."""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.special import expit

Values = Float[np.ndarray, " examples"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`scale * logit + bias`, fitted on the validation split (Platt scaling; Platt, 1999).

    Attributes:
        scale: positive, so the ranking does not change; the inverse of the temperature of Guo et
            al. (2017).
        bias: logits; corrects for a prior that differs between training and validation.
        prior: fraction of positives in the data that the calibration was fitted on.
    """

    scale: float = 1.0
    bias: float = 0.0
    prior: float = 0.5

    @classmethod
    def fit(cls, logits: Values, labels: Values) -> "Calibration":
        """Fits scale and bias by minimising the negative log-likelihood.

        Uses Platt's smoothed targets (one additional example of each class), which keep the scale
        finite where the classes are perfectly separated.

        Args:
            logits: float[examples], of the positive class.
            labels: float[examples], 0 or 1.

        Returns:
            The fitted calibration.
        """
        from scipy.optimize import minimize  # not needed to apply a calibration, and slow to import

        logits = logits.astype(np.float64)
        positives = float((labels == 1).sum())
        negatives = len(labels) - positives
        targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

        def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            scale = np.exp(parameters[0])
            scaled = scale * logits + parameters[1]
            error = expit(scaled) - targets
            value = np.mean(np.logaddexp(0, scaled) - targets * scaled)
            return value, np.array([np.mean(error * logits) * scale, error.mean()])

        log_scale, bias = minimize(loss_and_gradient, np.zeros(2), jac=True, method="BFGS").x
        return cls(float(np.exp(log_scale)), float(bias), positives / len(labels))

    def apply(self, logits: np.ndarray, prior: float | None = None) -> np.ndarray:
        """Returns calibrated logits, float64.

        Args:
            logits: logits of the network.
            prior: fraction of positives in the new data; its log-odds replace those of the fitted
                prior, by Bayes' rule (Saerens et al., 2002). None: the fitted prior.
        """
        adjustment = 0.0
        if prior is not None:
            adjustment = np.log(prior / (1 - prior)) - np.log(self.prior / (1 - self.prior))
        return self.scale * logits.astype(np.float64) + self.bias + adjustment
