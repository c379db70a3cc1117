"""Kills a run repeatedly at random moments, and compares its result with an undisturbed one.

`python tests/chaos/chaos.py [--kills=50] [--seed=0]`: the real command line trains, validates,
scores and predicts a small run. SIGKILL and SIGTERM hit it while it starts, prepares, trains,
saves, validates, writes and predicts; it is rerun until it is complete. The seed decides the
moments as far as the machine keeps time. Exits with status 1 and a reason at the first error.
"""

import argparse
import collections
import dataclasses
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORK_SERVER = runpy.run_path(str(ROOT / "tests" / "fork_server.py"))["ForkServer"]
CONFIG = """
import runpy
from histo_jax.config import Config
runpy.run_path({network!r})
def get_config():
    config = Config()
    config.data.source, config.data.synthetic_slides = "synthetic", 4
    config.data.validation_fraction = 0.25
    config.model.name = "tiny"
    config.optimizer.learning_rate = 1e-3
    config.fit.batch_size, config.fit.steps_per_epoch, config.fit.epochs = 16, {steps}, {epochs}
    config.early_stopping.patience = {epochs}
    config.checkpoint.every_minutes = {interval} / 60
    return config
"""
STEPS, INTERVAL = 60, 0.3  # steps of an epoch; seconds between two saves
EXIT_SECONDS = 1.0  # seconds that a process may still work after its second signal
# A signal comes this long at most, seconds, after the event of `traced.py` that it waits for.
DELAYS = {
    "import": 6.0, "prepare": 0.6, "step": 1.5, "save": 0.25, "validate": 0.3,
    "write history.csv": 0.8, "evaluate": 1.5, "predict": 1.0, "write submission.csv": 0.004,
}  # fmt: skip
IN_TRAINING = ("save", "step", "validate", "import", "save", "write history.csv")
AFTER_TRAINING = ("evaluate", "predict", "write submission.csv")


class WrongError(Exception):
    """What the program must not do."""


def check(holds, message):
    if not holds:
        raise WrongError(message)


@dataclasses.dataclass
class Start:
    """One process: the events that `traced.py` noted, its stderr, and how and when it ended."""

    events: list  # (seconds, words)
    stderr: str
    status: int
    signalled: float  # 0: it ended by itself before
    ended: float

    @property
    def steps(self):
        return [(at, int(words[1]), words[2]) for at, words in self.events if words[0] == "step"]


class Run:
    """A workdir in which the same command is run repeatedly."""

    def __init__(self, folder, config, server):
        self.folder, self.workdir, self.server = folder, folder / "run", server
        records = f"--config.data.tfds_dir={folder}/records"
        self.command = [f"--config={config}", f"--workdir={self.workdir}", records]
        self.starts, self.highest, self.save_seconds, self.submissions = [], 0, [0.0], set()
        (self.workdir / "checkpoints").mkdir(parents=True)

    def saved(self):
        """The steps whose checkpoints are whole on disk; one lies aside while it is replaced."""
        paths = [*self.workdir.glob("replaced/*"), *self.workdir.glob("checkpoints/*")]
        return {int(path.name) for path in paths if path.name.isdigit()}

    def _launch(self, *command, stderr):
        if self.server:
            return self.server.start(*command, cwd=ROOT)
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr
        )

    def start(self, event="none", count=1, delay=0.0, signals=(), mode="run"):
        """Runs the command; `delay` seconds after the event came `count` times it is signalled."""
        trace = self.folder / f"trace{len(self.starts)}.txt"
        trace.touch()
        events, signalled, due, begun = [], 0.0, None, {}
        script, launched = Path(__file__).with_name("traced.py"), time.monotonic()
        with trace.open() as lines, (self.folder / "stderr.txt").open("w+") as stderr:
            process = self._launch(script, trace, *self.command, f"--mode={mode}", stderr=stderr)
            running = True
            while running:
                running = process.poll() is None
                now = time.monotonic()
                for at, *words in map(str.split, lines.readlines()):
                    events.append((float(at), words))
                    count -= " ".join(words).startswith(event)
                    due = float(at) + delay if due is None and count == 0 else due
                    if words[0] == "begun":
                        begun[int(words[1])] = float(at)
                if running and due is not None and now >= due and not signalled:
                    for number, pause in signals:
                        time.sleep(pause)
                        process.send_signal(number)
                    signalled = time.monotonic()
                for step in self.saved():
                    self.highest = max(self.highest, step)
                    self.save_seconds.append(now - begun.pop(step, now))
                if mode == "predict":
                    self.submissions.add((self.workdir / "submission.csv").read_bytes())
                if now - launched > 300:
                    process.kill()
                    raise WrongError("a start took more than 5 minutes")
                time.sleep(0.002 if due is None else 0)
            stderr.seek(0)
            text = process.output("stderr") if self.server else stderr.read()
            start = Start(events, text, process.returncode, signalled, time.monotonic())
        self.starts.append(start)
        check("Traceback" not in start.stderr, start.stderr)
        check(
            not (self.workdir / "quarantined").exists(),
            f"a valid checkpoint was quarantined: {start.stderr}",
        )
        check(start.signalled or start.status == 0, f"status {start.status}: {start.stderr}")
        return start


class Summary:
    """Counts of signals, resumes and losses."""

    def __init__(self):
        self.resumed, self.losses = [], []
        self.kills, self.terms, self.predictions = (collections.Counter() for _ in range(3))


def resumed(before, highest, start):
    """Returns the step that a start resumed from, after a check; None where it ended before."""
    found = re.search(r"(?:resumed from|already complete at) step (\d+)", start.stderr)
    if not found and not start.steps:
        return None
    step = int(found[1]) if found else 0
    check(step == before == highest, f"resumed from {step}; saved were {before}, at most {highest}")
    check(not start.steps or start.steps[0][1] == step + 1, f"{step}, then {start.steps[:1]}")
    return step


def lost(run, start):
    """Steps and seconds of training that this end lost: what came after the newest save."""
    since = []  # when the steps since the last save began
    for at, words in start.events:
        if words[0] == "save":
            since = []
        elif words[0] == "step":
            # A step reads the clock before it begins, so the first late one need not request
            # the save; the next does, and its result is read when two more are begun.
            late = sum(begun - since[0] > INTERVAL for begun in since)
            check(late < 4, f"step {words[1]} was begun though a save was due")
            since.append(at)
    kept = max(run.saved(), default=0)
    begun = [words for _, words in start.events if words[0] == "begun" and int(words[1]) > kept]
    check(len(begun) <= 1, f"only {kept} is saved, though these saves were begun: {begun}")
    after = [(at, step) for at, step, _ in start.steps if step > kept]
    return (after[-1][1] - kept, start.ended - after[0][0]) if after else (0, 0.0)


def plan(rng, kills, terms):
    """What hits one run, in order: (event, whether SIGTERM); the last two in its last moments."""
    hits = [(event, False) for event in (IN_TRAINING * kills)[: max(kills - 3, 0)]]
    hits += [(rng.choice(("step", "save", "validate")), True) for _ in range(terms)]
    rng.shuffle(hits)
    last = [("last write", False), (rng.choice(AFTER_TRAINING), False)]
    return [("prepare", False), *hits, *last][: kills + terms]


def disturb(run, rng, hits, epochs, summary):
    """Sends the signals of `hits` to one start each, then lets the run end; counts in `summary`."""
    for event, is_term in [*hits, ("none", False)]:
        before, highest, count, least = max(run.saved(), default=0), run.highest, 1, 0.0
        if event == "last write":  # when the last save may be whole, and history.csv not yet
            event, count, least = "write history.csv", max(epochs - before // STEPS, 1), 0.4
        elif event == "save":
            count = rng.randint(1, 3)
        twice = is_term and rng.random() < 0.5
        signals = [(signal.SIGTERM if is_term else signal.SIGKILL, 0.0)]
        signals += [(signal.SIGTERM, rng.uniform(0.01, 0.1))] * twice
        start = run.start(event, count, rng.uniform(least, DELAYS.get(event, 0)), signals)
        step = resumed(before, highest, start)
        if step is not None and before < STEPS * epochs:
            summary.resumed.append(step)
        if start.status == 0:
            return
        summary.losses.append(lost(run, start))
        if not is_term:
            check(start.status == -signal.SIGKILL, f"status {start.status}: {start.stderr}")
            unfinished = list(run.workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))
            last = start.events[-1][1][0] if start.events else "launch"
            summary.kills["a save half done" if unfinished else last] += 1
            continue
        summary.terms[f"status {start.status}"] += 1
        # The handler is gone, and the signal ends it, when it is leaving already.
        exited_at_once = twice and start.status in (128 + signal.SIGTERM, -signal.SIGTERM)
        took = (start.ended if exited_at_once else start.events[-1][0]) - start.signalled
        check(took < EXIT_SECONDS or not twice, f"worked for {took:.1f} s after the second SIGTERM")
        if not exited_at_once:
            check(start.status == 75, f"SIGTERM gave status {start.status}: {start.stderr}")
            status, saved = (run.workdir / "status.json").read_text(), max(run.saved())
            expected = f'"state": "preempted".*"step": {saved},?\n'
            check(re.search(expected, status, re.S), f"saved is {saved}, status.json says {status}")
            check(summary.losses[-1][0] == 0, "SIGTERM lost steps")


def disturb_prediction(run, rng, kills, summary):
    """Kills `--mode=predict`: its file is the old one or the new one."""
    path = run.workdir / "submission.csv"
    new = path.read_bytes()
    old = re.sub(rb",0.*", b",0.5", new)
    while sum(summary.predictions.values()) < kills:
        path.write_bytes(old)
        event = rng.choice(("import", "predict", "write submission.csv", "write submission.csv"))
        delay = rng.uniform(0, DELAYS[event])
        start = run.start(event, 1, delay, [(signal.SIGKILL, 0.0)], mode="predict")
        now = path.read_bytes()
        # What was ever there is what a kill at that moment would have left.
        parts = {*run.submissions, now} - {old, new}
        check(not parts, f"a part of submission.csv: {parts}")
        check(now == new or start.status, "predict left the old submission.csv")
        summary.predictions["old" if now == old else "new"] += start.status != 0
    run.start(mode="predict")


def contents(run, config):
    """Returns all that must be equal at the end: name -> bytes."""
    import jax
    import numpy as np
    from absl import logging

    from histo_jax.models import create_model
    from histo_jax.training.checkpoints import Checkpoints
    from histo_jax.training.optimizer import create_optimizer
    from histo_jax.training.state import EarlyStopping, abstract_state

    logging.set_verbosity(logging.ERROR)
    paths = [run.workdir / name for name in ("history.csv", "submission.csv", "evaluation.json")]
    paths += run.folder.glob("records/*/*/*/*.csv")
    found = {path.name: path.read_bytes() for path in paths}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    like = abstract_state(model, optimizer, 96, place)
    early_stopping = EarlyStopping.create(config.early_stopping)
    with Checkpoints(run.workdir) as checkpoints:
        newest = checkpoints.restore_latest(like, early_stopping)
        best = checkpoints.restore_best(config, place)
    for name, checkpoint in (("newest", newest), ("best", best)):
        trees = (checkpoint.state, checkpoint.early_stopping)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
            array = np.asarray(leaf)
            found[f"{name} checkpoint: {path} {array.dtype}{array.shape}"] = array.tobytes()
        found[f"{name} checkpoint: data"] = repr((checkpoint.data, checkpoint.history)).encode()
    return found


def compare(run, expected, batches, config):
    """Checks every batch that was ever trained on, and all files that the run left."""
    trained = [(step, batch) for start in run.starts for _, step, batch in start.steps]
    for step, batch in trained:
        check(batches[step] == batch, f"step {step} was made with another batch")
    check(dict(trained).keys() == batches.keys(), "not every step was made")
    found = contents(run, config)
    different = [name for name in found.keys() | expected if found.get(name) != expected.get(name)]
    check(not different, f"{run.workdir} differs in {different}")
    return sum(map(len, found.values()))


def chaos(folder, server, kills, terms, predictions, epochs, rng):
    began, file = time.monotonic(), folder / "config.py"
    network = str(ROOT / "tests" / "tiny_network.py")
    text = CONFIG.format(network=network, steps=STEPS, epochs=epochs, interval=INTERVAL)
    file.write_text(text)
    config = runpy.run_path(str(file))["get_config"]()
    undisturbed = Run(folder / "undisturbed", file, server)
    batches = {step: batch for _, step, batch in undisturbed.start().steps}
    check(sorted(batches) == list(range(1, epochs * STEPS + 1)), undisturbed.starts[0].stderr)
    check(
        len(undisturbed.saved()) <= 3,
        f"the latest two and the best are kept, not {undisturbed.saved()}",
    )
    expected, summary, runs, size = contents(undisturbed, config), Summary(), [], 0
    while (left := kills - sum(summary.kills.values())) > 0:
        runs.append(Run(folder / f"disturbed{len(runs)}", file, server))
        share = min(-(-terms * min(left, 10) // kills), terms - sum(summary.terms.values()))
        disturb(runs[-1], rng, plan(rng, min(left, 10), share), epochs, summary)
        if sum(summary.kills.values()) == kills:
            disturb_prediction(runs[-1], rng, predictions, summary)
        size += compare(runs[-1], expected, batches, config)
    restored = [step for step in summary.resumed if step]
    inside = [step for step in restored if step % STEPS]
    check(len(restored) >= kills // 4 and inside, f"too few starts resumed: {summary.resumed}")
    longest, seconds = (max(values) for values in zip(*summary.losses, strict=True))
    save = max(second for run in (undisturbed, *runs) for second in run.save_seconds)
    print(
        f"SIGKILL {sum(summary.kills.values())} times in {len(runs)} runs, by the last event: "
        f"{dict(summary.kills.most_common())}\n"
        f"SIGTERM: {dict(summary.terms)}\n"
        f"SIGKILL of predict left submission.csv: {dict(summary.predictions)}\n"
        f"{len(restored)} of {len(summary.resumed)} starts that trained had a step to restore "
        f"(least {min(restored)}, median {statistics.median(restored):.0f}, most {max(restored)} "
        f"of {epochs * STEPS}), {len(inside)} of them inside an epoch; each took the newest save\n"
        f"longest loss: {longest} steps; {seconds:.2f} s (a save every {INTERVAL} s, the slowest "
        f"took {save:.2f} s)\n"
        f"equal to the undisturbed run: {size:,} bytes, {len(batches)} batches a run\n"
        f"{(time.monotonic() - began) / 60:.1f} minutes"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs of run")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs of run, at most")
    parser.add_argument("--predictions", type=int, default=20, help="SIGKILLs of predict")
    parser.add_argument("--epochs", type=int, default=10, help=f"of {STEPS} steps each")
    parser.add_argument(
        "--fork",
        action="store_true",
        help="fork every start from one process that has imported: quicker, imports are not hit",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="histo_jax_chaos_"))
    sys.path.insert(0, str(ROOT))
    os.environ |= {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),  # restarts are quicker
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    counts = (options.kills, options.terms, options.predictions, options.epochs)
    server = FORK_SERVER() if options.fork else None
    DELAYS["import"] /= 6 if server else 1  # the imports are over
    try:
        chaos(folder, server, *counts, random.Random(options.seed))
    except WrongError as error:
        sys.exit(f"WRONG (seed {options.seed}, see {folder}): {error}")
    finally:
        if server:
            server.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
