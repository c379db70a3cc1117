"""The same batches, and so the same run, wherever the pixels lie."""

import contextlib
import io
import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest

import histo_jax
from histo_jax import fitting
from histo_jax.config import ModelConfig
from histo_jax.data import loader
from histo_jax.data.loader import Records
from histo_jax.distributed import memory, mesh
from histo_jax.distributed.mesh import replicated
from histo_jax.errors import UserError
from histo_jax.run import signals
from histo_jax.training import loop, placement
from histo_jax.training.checkpoints import Checkpoints

runpy.run_path(str(Path(__file__).parents[1] / "tiny_network.py"))
PLACEMENTS = ("device", "host", "disk")
IMAGES = np.random.default_rng(0).integers(0, 256, (300, 96, 96, 3), np.uint8)
ROWS = np.random.default_rng(1).permutation(300)[:270]  # more than are read at once
LABELS = (ROWS % 2).astype(np.float32)


class Source:
    def __getitems__(self, rows):
        return [{"image": IMAGES[row], "label": row % 2} for row in rows]


RECORDS = Records(Source(), ROWS, LABELS)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("setting", PLACEMENTS)
def test_batches_are_the_same_from_everywhere_on_any_number_of_devices(setting, devices):
    batch_sharding = mesh.batch_sharding(jax.devices()[:devices])
    few = Records(Source(), ROWS[:10], LABELS[:10])
    examples, validation = placement.place(setting, [RECORDS, few], 96, batch_sharding)
    order = loader.training_order(len(ROWS), 8, seed=3)
    for step, batch in zip((40, 41, 42), examples.training_batches(8, 3, 40), strict=False):
        assert batch.keys() == {"image", "label"}
        assert all(array.sharding == batch_sharding for array in batch.values())
        np.testing.assert_array_equal(batch["image"], IMAGES[ROWS[order[step]]])
        np.testing.assert_array_equal(batch["label"], LABELS[order[step]])
    batches = list(validation.eval_batches(8))
    assert [batch["image"].sharding for batch in batches] == [batch_sharding] * 2
    assert [batch["mask"].sum() for batch in batches] == [8, 2]
    images, labels = (
        np.concatenate([np.asarray(batch[name])[batch["mask"]] for batch in batches])
        for name in ("image", "label")
    )
    np.testing.assert_array_equal(images, IMAGES[ROWS[:10]])
    np.testing.assert_array_equal(labels, LABELS[:10])


def test_devices_gather_without_communication():
    batch_sharding = mesh.batch_sharding()
    pixels = jax.ShapeDtypeStruct((30, 27648), np.uint8, sharding=replicated(batch_sharding))
    positions = jax.ShapeDtypeStruct((8,), np.int32, sharding=batch_sharding)
    program = placement.make_gather(96, batch_sharding).lower(pixels, positions).compile().as_text()
    assert "gather" in program
    assert not any(word in program for word in ("all-", "collective", "permute"))


# --- selection ------------------------------------------------------------------------------------

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("on_device", "on_host", "selected"),
    [(4.1, 0, "device"), (3.9, 4.1, "host"), (3.9, 3.9, "disk"), (None, 4.1, "host")],
)
def test_auto_selects_what_fits_first_and_logs_why(on_device, on_host, selected, monkeypatch, log):
    free = None if on_device is None else int(on_device * GB)
    monkeypatch.setattr(memory, "free_on_devices", lambda _: free)
    monkeypatch.setattr(memory, "free_on_host", lambda: int(on_host * GB))
    gpus = [mock.Mock(spec=jax.Device, platform="gpu")] * 4
    assert placement._select("auto", 3 * GB, gpus) == selected
    [message] = log.messages
    assert f"data.placement: {selected}" in message
    assert "3.00 GB" in message
    if selected == "device":
        assert "pixels need 3.00 GB on each of 4 devices, 4.10 GB free" in message
    else:
        known = "unknown" if on_device is None else f"{on_device:.2f} GB"
        assert f"more than 75% of the free memory on each of 4 devices ({known} free)" in message
    if selected == "disk":
        assert "and in memory (3.90 GB free)" in message


@pytest.mark.parametrize(("on_host", "selected"), [(4.1, "host"), (3.9, "disk")])
def test_auto_makes_no_copies_for_devices_that_share_main_memory(on_host, selected, monkeypatch):
    monkeypatch.setattr(memory, "free_on_host", lambda: int(on_host * GB))
    assert placement._select("auto", 3 * GB, jax.devices()) == selected


@pytest.mark.parametrize(("setting", "where"), [("device", "on the device"), ("host", "in memory")])
def test_an_explicit_placement_may_fill_the_free_memory_and_no_more(setting, where, monkeypatch):
    monkeypatch.setattr(memory, "free_on_devices", lambda _: 3 * GB)
    monkeypatch.setattr(memory, "free_on_host", lambda: 3 * GB)
    assert placement._select(setting, 3 * GB, jax.devices()[:1]) == setting
    with pytest.raises(UserError) as error:
        placement._select(setting, 4 * GB, jax.devices()[:1])
    message = f"config.data.placement = '{setting}' needs 4.00 GB {where}, but 3.00 GB are free"
    assert message in str(error.value)
    assert "'disk'" in str(error.value)


def test_free_memory_of_devices(monkeypatch):
    def device(platform, **stats):
        made = mock.Mock(spec=jax.Device, platform=platform)
        made.memory_stats.return_value = stats or None
        return made

    one = device("gpu", bytes_limit=100, bytes_in_use=30)
    other = device("gpu", bytes_limit=100, bytes_in_use=40)
    assert memory.free_on_devices([one, other]) == 60
    assert memory.free_on_devices([one, device("gpu")]) is None
    monkeypatch.setattr(memory, "free_on_host", lambda: 100)
    assert memory.free_on_devices([device("cpu")] * 4) == 25


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_within_a_containers_limit(version, monkeypatch, tmp_path):
    (tmp_path / "membership").write_text(
        "0::/a/b\n" if version == 2 else "5:cpu:/a\n4:memory:/a/b\n0::/\n"
    )
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    before = memory.free_on_host()
    assert before > 1_000_000
    top = tmp_path if version == 2 else tmp_path / "memory"
    limit, used, prefix = (
        ("memory.max", "memory.current", "") if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )  # fmt: skip
    unlimited = "max" if version == 2 else "9223372036854771712"
    for group, most in (("a", "1000"), ("a/b", unlimited)):
        (top / group).mkdir(parents=True)
        (top / group / limit).write_text(f"{most}\n")
        (top / group / used).write_text("700\n")
        (top / group / "memory.stat").write_text(
            f"{prefix}active_file 50\n{prefix}inactive_file 150\nanon 500\n"
        )
    assert memory.free_on_host() == 500


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_loading_shows_a_bar_only_on_a_terminal(terminal, monkeypatch):
    written = io.StringIO()
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(written, "isatty", lambda: terminal, raising=False)
    with contextlib.redirect_stderr(written):
        placement.place("host", [RECORDS], 96, mesh.batch_sharding())
    assert ("270/270" in written.getvalue()) == terminal
    assert bool(written.getvalue()) == terminal


@pytest.mark.parametrize("setting", ["device", "host"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_the_loading(setting, number, status):
    read = []

    class Interrupted(Source):
        def __getitems__(self, rows):
            read.append(len(rows))
            if len(read) == 2:
                os.kill(os.getpid(), number)
            return super().__getitems__(rows)

    many = Records(Interrupted(), np.arange(6000) % 300, np.zeros(6000, np.float32))
    with signals.watch(ctrl_c=True), pytest.raises(signals.Preempted) as left:
        placement.place(setting, [many], 96, mesh.batch_sharding(jax.devices()[:1]))
    assert left.value.code == status
    assert sum(read) < 4000


# --- a whole run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(make_tiny_config, tmp_path_factory):
    """One run from each place, on one device: its folder, state, events and compiled functions.

    From its first step on, nothing goes to the device unless it is put there.
    """
    return {
        setting: _watched_run(setting, make_tiny_config(), tmp_path_factory.mktemp(setting))
        for setting in PLACEMENTS
    }


def _watched_run(setting, config, folder):
    config.data.placement, config.model = setting, ModelConfig(name="tiny")
    config.fit.steps_per_epoch = 5
    one_device = mesh.batch_sharding(jax.devices()[:1])
    events, compiled, metrics_of = [], {}, []

    def guarded(make):
        def make_train_step(*arguments):
            train_step = compiled["train"] = make(*arguments)

            def step(state, batch):
                jax.config.update("jax_transfer_guard_host_to_device", "disallow")
                # `fit` sets its own in this thread, and at its end what was there before.
                jax.transfer_guard_host_to_device("disallow").__enter__()
                state, metrics = train_step(state, batch)
                metrics_of.append(metrics)
                events.append(f"step {len(metrics_of)}")
                return state, metrics

            return step

        return make_train_step

    def read(values, read=loop._read):
        numbers = [number for number, metrics in enumerate(metrics_of, 1) if metrics is values]
        events.append(f"read {numbers[0]}" if numbers else "read sum")
        return read(values)

    def remembered(name, make):
        def remember(*arguments):
            compiled[f"{name}{sum(key.startswith(name) for key in compiled)}"] = make(*arguments)
            return list(compiled.values())[-1]

        return remember

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.mesh, "batch_sharding", lambda: one_device)
        patch.setattr(fitting.steps, "make_train_step", guarded(fitting.steps.make_train_step))
        make_eval_step = remembered("eval", fitting.steps.make_eval_step)
        patch.setattr(fitting.steps, "make_eval_step", make_eval_step)
        patch.setattr(placement, "make_gather", remembered("gather", placement.make_gather))
        patch.setattr(loop, "_read", read)
        try:
            histo_jax.fit(config, folder)
        finally:
            jax.config.update("jax_transfer_guard_host_to_device", "allow")
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore_best(config, replicated(one_device)).state
    return SimpleNamespace(folder=folder, state=state, events=events, compiled=compiled)


def test_runs_from_everywhere_are_equal_to_the_byte(runs):
    assert len({(run.folder / "history.csv").read_bytes() for run in runs.values()}) == 1
    for run in runs.values():
        jax.tree.map(np.testing.assert_array_equal, run.state, runs["device"].state)


def test_the_guard_of_these_runs_bites():
    with jax.transfer_guard_host_to_device("disallow"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            jax.jit(lambda x: x)(np.zeros(3))
        jax.device_put(np.zeros(3))


@pytest.mark.parametrize("setting", PLACEMENTS)
def test_nothing_is_compiled_twice(runs, setting):
    subsets = {"gather0": 1, "gather1": 1} if setting == "device" else {}
    sizes = {name: made._cache_size() for name, made in runs[setting].compiled.items()}
    assert sizes == {"train": 1, "eval0": 1, **subsets}


@pytest.mark.parametrize("setting", PLACEMENTS)
def test_the_loop_reads_once_a_step_and_two_steps_behind(runs, setting):
    epoch = (
        "step 1, step 2, step 3, read 1, step 4, read 2, step 5, read 3, read 4, read 5, read sum"
    )
    later = [
        f"{word} {int(number) + 5 if number != 'sum' else 'sum'}"
        for word, number in (event.split() for event in epoch.split(", "))
    ]
    assert runs[setting].events == epoch.split(", ") + later
