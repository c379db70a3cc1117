import math

import pytest

from histo_jax.config import EarlyStoppingConfig
from histo_jax.training.state import EarlyStopping, update


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "best", "best_step", "without", "stops"),
    [
        ([], 2, 0.0, math.inf, 0, 0, False),
        ([0.5], 2, 0.0, 0.5, 1, 0, False),
        ([0.5, 0.4, 0.3], 2, 0.0, 0.3, 3, 0, False),
        ([0.5, 0.6], 2, 0.0, 0.5, 1, 1, False),
        ([0.5, 0.6, 0.7], 2, 0.0, 0.5, 1, 2, True),
        ([0.5, 0.6, 0.4, 0.7], 2, 0.0, 0.4, 3, 1, False),
        ([0.5, 0.5, 0.5], 2, 0.0, 0.5, 1, 2, True),
        ([0.5, 0.45, 0.41], 2, 0.1, 0.5, 1, 2, True),
        ([0.5, 0.45, 0.39], 2, 0.1, 0.39, 3, 0, False),
        ([0.5, math.nan, math.nan], 2, 0.0, 0.5, 1, 2, True),
        ([math.nan, 0.5], 2, 0.0, 0.5, 2, 0, False),
    ],
)
def test_early_stopping(losses, patience, min_delta, best, best_step, without, stops):
    state = EarlyStopping.create(EarlyStoppingConfig(patience=patience, min_delta=min_delta))
    for loss in losses:
        state = update(state, loss)
    assert state.best_loss == best
    assert state.best_step == best_step
    assert state.epochs_without_improvement == without
    assert state.should_stop is stops


def test_update_leaves_its_argument_as_it_was():
    state = EarlyStopping.create(EarlyStoppingConfig())
    update(state, 0.5)
    assert state.best_loss == math.inf
    assert state.step == 0
