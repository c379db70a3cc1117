"""The function that all formats hold: from uint8 images to calibrated probability and logit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from histo_jax import symmetries
from histo_jax.models.fields import init_fields
from histo_jax.models.forward import Forward, make_forward
from histo_jax.predictor import Predictor, TrainedModel, make_forward_tta

# Every format computes in float32 on every device, with convolutions that it knows.
_PORTABLE = {"dtype": jnp.float32, "use_winograd": False}

# From uint8[batch, size, size, 3] to probability and logit, float32[batch] each.
Function = Callable[[Any], tuple[Any, Any]]


def make_function(predictor: Predictor, unrolled: bool = False) -> Function:
    """Returns the function that a predictor computes, with its weights inside.

    Args:
        predictor: one or several networks.
        unrolled: of test-time augmentation; without loops, which ONNX would hold as subgraphs.
    """
    networks = [
        (
            _make_forward(trained, predictor.tta, unrolled),
            trained.weights,
            *affine(trained, predictor.prior),
        )
        for trained in predictor.trained
    ]

    def function(images: Any) -> tuple[Any, Any]:
        logits = [
            forward(weights, images) * scale + bias for forward, weights, scale, bias in networks
        ]
        logit = sum(logits[1:], start=logits[0])
        if len(logits) > 1:
            logit = logit / len(logits)
        return jax.nn.sigmoid(logit), logit

    return function


def affine(trained: TrainedModel, prior: float | None) -> tuple[np.float32, np.float32]:
    """Returns scale and bias from a network's logit to the calibrated one at a prior."""
    (bias,) = trained.calibration.apply(np.zeros(1), prior)
    return np.float32(trained.calibration.scale), np.float32(bias)


def precise_logits(predictor: Predictor, images: Any) -> Any:
    """Returns the predictor's calibrated logits, float64[n], as every device computes them.

    In float32, while accelerators would compute in bfloat16; and without Winograd's convolutions,
    whose rounding on a CPU is a few times larger than that of ordinary ones.
    """
    trained = [_with_fields(each, _PORTABLE) for each in predictor.trained]
    precise = Predictor(trained, prior=predictor.prior, batch_size=predictor.batch_size)
    make = _make_precise_tta if predictor.tta else _make_precise
    return precise.calibrate(np.stack(precise.map(make, images))).mean(0)


def _make_precise(model: nn.Module, make: Callable[[nn.Module], Forward] = make_forward) -> Forward:
    forward = make(model)

    def precise(weights: Any, images: Any) -> Any:
        # By default GPUs and TPUs compute products of float32 with fewer digits.
        with jax.default_matmul_precision("highest"):
            return forward(weights, images)

    return precise


def _make_precise_tta(model: nn.Module) -> Forward:
    return _make_precise(model, make_forward_tta)


def is_averaged(trained: TrainedModel, tta: bool) -> bool:
    """Returns whether a network's logit is the mean over an image's symmetries."""
    return tta and not getattr(trained.model, "is_d4_invariant", False)


def _with_fields(trained: TrainedModel, values: dict[str, Any]) -> TrainedModel:
    own = init_fields(type(trained.model)).keys() & values.keys()
    return trained._replace(model=trained.model.clone(**{name: values[name] for name in own}))


def _make_forward(trained: TrainedModel, tta: bool, unrolled: bool) -> Forward:
    """Returns the function from weights and images to a network's own logits."""
    model = _with_fields(trained, _PORTABLE).model
    forward, is_looped = make_forward(model), is_averaged(trained, tta) and not unrolled
    if is_looped or not is_averaged(trained, tta):
        return make_forward(model, tta=is_looped)

    def forward_unrolled(weights: Any, images: Any) -> Any:
        logits = [forward(weights, symmetries.transform(images, *e)) for e in symmetries.ELEMENTS]
        return sum(logits[1:], start=logits[0]) / len(logits)

    return forward_unrolled
