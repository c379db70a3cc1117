"""From logits to probabilities that can be taken at their word."""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit

Values = Float[np.ndarray, " examples"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`scale * logit + shift`, fitted on validation (Platt, "Probabilistic outputs", 1999).

    Attributes:
        scale: above 0, so that no ranking changes; its inverse is the temperature of Guo et al.
        shift: logits; takes up what the share of tumour in training and here differ by.
        prior: share of tumour where it was fitted.
    """

    scale: float = 1.0
    shift: float = 0.0
    prior: float = 0.5

    @classmethod
    def fit(cls, logits: Values, labels: Values) -> "Calibration":
        """Returns the one of the lowest negative log-likelihood.

        Labels are moved by Platt's prior, one example of each class, which keeps the scale finite
        where the classes are apart.
        """
        logits = logits.astype(np.float64)
        positives = float((labels == 1).sum())
        negatives = len(labels) - positives
        targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            scale = np.exp(parameters[0])
            scaled = scale * logits + parameters[1]
            error = expit(scaled) - targets
            value = np.mean(np.logaddexp(0, scaled) - targets * scaled)
            return value, np.array([np.mean(error * logits) * scale, error.mean()])

        log_scale, shift = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
        return cls(float(np.exp(log_scale)), float(shift), positives / len(labels))

    def apply(self, logits: np.ndarray, prior: float | None = None) -> np.ndarray:
        """Returns calibrated logits, float64.

        Args:
            logits: of the network.
            prior: share of tumour where they are used; None = as where it was fitted. By Bayes'
                rule its log odds replace the fitted ones (Saerens et al. 2002).
        """
        moved = 0.0
        if prior is not None:
            moved = np.log(prior / (1 - prior)) - np.log(self.prior / (1 - self.prior))
        return self.scale * logits.astype(np.float64) + self.shift + moved
