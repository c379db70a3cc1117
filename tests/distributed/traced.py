"""The real command line, noting each step: `traced.py TRACE DIE_AT --config=FILE ...`.

One JSON line a step: its number, the SHA-1 of each of this process's patches, the loss. At step
DIE_AT the process kills itself, at -1 before its first prediction; at step -DIE_AT it gets SIGTERM;
0 is never. After step 1 the moments (a tenth of the gradient) and BatchNorm's statistics go into
TRACE.npz, before the first step of all the state into TRACE.begin.npz. The first process prepares
for HISTO_JAX_TRACED_SECONDS longer; to another the validation loss seems to grow by
HISTO_JAX_TRACED_GROWTH each time.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from histo_jax import fitting, predictor
from histo_jax.distributed import consensus, processes
from histo_jax.training import step as steps
from histo_jax.training import validation

TRACE, DIE_AT = Path(sys.argv.pop(1)), int(sys.argv.pop(1))


def make_train_step(*arguments, make=steps.make_train_step):
    train_step, number = make(*arguments), None

    def step(state, batch):
        nonlocal number
        if number is None:
            number = int(state.step)
            np.savez(f"{TRACE}.begin.npz", *jax.tree.leaves(jax.device_get(state)))
        number += 1
        if number == abs(DIE_AT):
            os.kill(os.getpid(), signal.SIGKILL if DIE_AT > 0 else signal.SIGTERM)
        shards = sorted(batch["image"].addressable_shards, key=lambda s: s.index[0].start or 0)
        images = np.concatenate([np.asarray(shard.data) for shard in shards])
        state, metrics = train_step(state, batch)
        if number == 1:
            noted = {"moments": state.opt_state[0].mu, "statistics": state.weights.collections}
            np.savez(
                f"{TRACE}.npz", **{k: ravel_pytree(jax.device_get(v))[0] for k, v in noted.items()}
            )
        ids = [hashlib.sha1(image.tobytes()).hexdigest() for image in images]
        with TRACE.open("a") as trace:
            trace.write(json.dumps([number, ids, float(metrics.loss)]) + "\n")
        return state, metrics

    return step


def read_behind(outputs, read=predictor.read_behind):
    if DIE_AT == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(outputs)


def prepare(*args, prepare=fitting.prepare):
    if jax.process_index() == 0:
        time.sleep(float(os.environ.get("HISTO_JAX_TRACED_SECONDS", 0)))
    return prepare(*args)


def binary_scores(logits, labels, scores=validation.binary_scores):
    found = scores(logits, labels)
    if jax.process_index():
        global grown
        grown += float(os.environ.get("HISTO_JAX_TRACED_GROWTH", 0))
        found["nll"] += grown
    return found


if not os.environ.get("HISTO_JAX_LONG"):
    processes._HEARTBEAT_SECONDS = 10  # the tests wait for it
consensus._VISIBLE_SECONDS = 2
steps.make_train_step, predictor.read_behind = make_train_step, read_behind
fitting.prepare, validation.binary_scores, grown = prepare, binary_scores, 0.0
runpy.run_module("histo_jax.main", run_name="__main__", alter_sys=True)
