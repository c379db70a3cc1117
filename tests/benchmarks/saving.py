"""The cost of a checkpoint: epochs of the quickstart's network with and without one, interleaved.

    .venv/bin/python tests/benchmarks/saving.py [ROUNDS]

An epoch has 32 steps of 64 patches. The checkpoint at its end is written in the background, which
slows the next steps; so the time of an epoch is measured until the first step of the next epoch.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from configs.quickstart import get_config
from histo_jax.distributed import mesh
from histo_jax.models import create_model
from histo_jax.training.augmentation import make_augment
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.losses import get_loss
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, create_state
from histo_jax.training.step import make_train_step

STEPS = 32


def main(rounds: int) -> None:
    config = get_config()
    batch_sharding = mesh.batch_sharding()
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    state = create_state(model, optimizer, 0, np.full(3, 0.5), np.full(3, 0.25), 96)
    state = jax.device_put(state, mesh.replicated(batch_sharding))
    train_step = make_train_step(
        model, optimizer, batch_sharding, make_augment(config.augment), get_loss(config.fit.loss)
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (config.fit.batch_size, 96, 96, 3), np.uint8),
        "label": rng.integers(0, 2, config.fit.batch_size).astype(np.float32),
    }
    batch = jax.device_put(batch, batch_sharding)
    early_stopping = EarlyStopping.create(config.early_stopping)

    def epoch(state, save):
        start = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = train_step(state, batch)
            metrics.loss.block_until_ready()
        if save:
            data = {"fingerprint": ""}
            checkpoints.save(Checkpoint(state, early_stopping, data, []), 1 / int(state.step))
        return state, time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        for save in (False, True):  # warm-up
            state, _ = epoch(state, save)
        checkpoints.wait()
        ratios, plain, saving = [], [], []
        for _ in range(rounds):
            # Pairs of epochs: the checkpoint of the first one is written during the second.
            times = {}
            for save in (False, True):
                state, first = epoch(state, save)
                state, second = epoch(state, False)
                times[save] = first + second
                checkpoints.wait()
            plain.append(times[False] / 2)
            saving.append(times[True] - times[False])
            ratios.append(saving[-1] / plain[-1])
    print(
        f"{rounds} rounds, {os.cpu_count()} cores, {jax.default_backend()}, jax {jax.__version__}"
    )
    print(f"epoch without checkpoint {statistics.median(plain):.3f} s")
    print(f"cost of one checkpoint   {statistics.median(saving):.3f} s")
    low, *_, high = statistics.quantiles(ratios, n=4)
    print(f"relative to the epoch    {statistics.median(ratios):.2%} ({low:.2%} to {high:.2%})")
    print(
        f"parameters               {sum(p.size for p in jax.tree.leaves(state.weights.params)):,}"
    )
    assert jnp.isfinite(state.loss_sum)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
