"""The real command line, noting what it does: `traced.py TRACE --config=FILE --workdir=DIR ...`.

One line an event, `<monotonic seconds> <event> ...`; that of a step holds the SHA-1 of its batch.
"""

import hashlib
import os
import runpy
import sys
import time

TRACE = os.open(sys.argv.pop(1), os.O_CREAT | os.O_APPEND | os.O_WRONLY)


def note(*words, at=None):
    # One write a line: a kill leaves whole lines.
    os.write(TRACE, f"{at or time.monotonic():.4f} {' '.join(map(str, words))}\n".encode())


note("import")

# ruff: noqa: E402 - the kills may also hit the imports
import numpy as np

from histo_jax import evaluation, fitting, prediction
from histo_jax.run import files
from histo_jax.training import step as steps
from histo_jax.training import validation
from histo_jax.training.checkpoints import Checkpoints


def noted(place, name, *events):
    """Replaces `place.name` by one that notes an event of its arguments before, others after."""
    function = getattr(place, name)

    def wrapper(*arguments, **options):
        note(*events[0](*arguments))
        if events[0](*arguments) == ("write", "history.csv"):
            time.sleep(0.8)  # a slow disk: the save that began just before is complete earlier
        result = function(*arguments, **options)
        for event in events[1:]:
            note(*event(*arguments))
        return result

    setattr(place, name, wrapper)


def make_train_step(*arguments, make=steps.make_train_step):
    train_step, number = make(*arguments), None

    def step(state, batch):
        nonlocal number
        began = time.monotonic()
        # Read once: at every step it would wait for the device and change what is tested.
        number = (int(state.step) if number is None else number) + 1
        content = b"".join(np.asarray(batch[name]).tobytes() for name in ("image", "label"))
        note("step", number, hashlib.sha1(content).hexdigest(), at=began)
        return train_step(state, batch)

    return step


steps.make_train_step = make_train_step
noted(fitting, "prepare", lambda *_: ("prepare",))
noted(validation, "predict", lambda *_: ("validate",))
noted(evaluation, "evaluate_in", lambda *_: ("evaluate",))
noted(prediction, "predict_in", lambda *_: ("predict",))
noted(files, "write_text", lambda path, _: ("write", path.name), lambda *_: ("written",))
noted(
    Checkpoints,
    "save",
    lambda _, saved, __: ("save", int(saved.state.step)),
    lambda _, saved, __: ("begun", int(saved.state.step)),
)
runpy.run_module("histo_jax.main", run_name="__main__", alter_sys=True)
