import functools
import logging
import re
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histo_jax.config import Config, ModelConfig
from histo_jax.distributed import mesh
from histo_jax.errors import CheckpointError
from histo_jax.models import create_model
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, abstract_state, create_state, update

runpy.run_path(str(Path(__file__).parents[1] / "tiny_network.py"))


@pytest.fixture
def config():
    config = Config()
    config.model.name = "tiny"
    return config


@functools.cache
def parts():
    return create_model(ModelConfig(name="tiny")), create_optimizer(Config().optimizer)


@functools.cache
def state(step):
    made = create_state(*parts(), step, np.full(3, 0.5), np.full(3, 0.25), 96)
    return made.replace(step=jnp.int32(step), loss_sum=jnp.float32(0.1))


@functools.cache
def shapes():
    return abstract_state(*parts(), 96, mesh.replicated(mesh.batch_sharding()))


def make(config, step, losses):
    early_stopping = EarlyStopping.create(config.early_stopping)
    for loss in losses:
        early_stopping = update(early_stopping, loss)
    history = [{"epoch": k + 1, "validation_loss": loss} for k, loss in enumerate(losses)]
    return Checkpoint(state(step), early_stopping, {"fingerprint": "f"}, history)


def restore_latest(checkpoints, config):
    return checkpoints.restore_latest(shapes(), EarlyStopping.create(config.early_stopping))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the checkpoints of two epochs; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(make(Config(), 1, [0.5]), 0.5)
        checkpoints.save(make(Config(), 2, [0.5, 0.4]), 0.4)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual.state, expected.state)
    jax.tree.map(np.testing.assert_array_equal, actual.early_stopping, expected.early_stopping)
    assert (actual.data, actual.history) == (expected.data, expected.history)


def test_latest_two_and_best_are_kept_and_come_back_whole(config, tmp_path):
    losses = [0.5, 0.3, 0.4, 0.6, 0.7]
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(make(config, step, losses[:step]), losses[step - 1])
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "5"}
    place = mesh.replicated(mesh.batch_sharding())
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 5, losses))
        assert_equal(checkpoints.restore_best(config, place), make(config, 2, losses[:2]))


def test_a_save_inside_an_epoch_is_never_the_best(config, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 2, [0.5]), 0.5)
        for step in (3, 4, 5):
            checkpoints.save(make(config, step, [0.5]), None)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "5"}
    place = mesh.replicated(mesh.batch_sharding())
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 5, [0.5]))
        assert_equal(checkpoints.restore_best(config, place), make(config, 2, [0.5]))


def test_a_step_saved_before_its_validation_is_saved_again_with_it(config, tmp_path):
    place = mesh.replicated(mesh.batch_sharding())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 2, [0.5]), 0.5)
        checkpoints.save(make(config, 4, [0.5]), None)
        checkpoints.save(make(config, 4, [0.5, 0.4]), 0.4)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 4, [0.5, 0.4]))
        assert_equal(checkpoints.restore_best(config, place), make(config, 4, [0.5, 0.4]))


def test_a_save_that_is_killed_while_it_replaces_one_leaves_the_old(config, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 2, [0.5]), 0.5)
        checkpoints.save(make(config, 4, [0.5]), None)
    (tmp_path / "replaced").mkdir()
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "replaced" / "4")
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 4, [0.5]))


@pytest.mark.parametrize("harm", ["truncated", "removed"])
def test_any_corrupt_file_is_noticed_or_does_no_harm(config, saved, tmp_path, harm):
    """Each file of the newest checkpoint in turn: it is restored, or the one before is."""
    quarantined = 0
    newest = saved / "checkpoints" / "2"
    names = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    assert len(names) > 10
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        victim = folder / "checkpoints" / "2" / name
        if harm == "removed":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        with Checkpoints(folder) as checkpoints:
            restored = restore_latest(checkpoints, config)
        if (folder / "quarantined").exists():
            quarantined += 1
            assert_equal(restored, make(config, 1, [0.5]))
        else:
            assert_equal(restored, make(config, 2, [0.5, 0.4]))
    # The rest is of no consequence, such as marks of success that repeat the folder's name.
    assert quarantined >= 6


@pytest.mark.parametrize("part", ["state", "early_stopping", "data", "history"])
def test_a_checkpoint_without_a_part_is_quarantined_and_its_step_saved_again(
    config, run, part, caplog
):
    shutil.rmtree(run / "checkpoints" / "2" / part)
    logging.getLogger("histo_jax").addHandler(caplog.handler)
    with Checkpoints(run) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 1, [0.5]))
        if part == "state":
            checkpoints.save(make(config, 2, [0.5, 0.3]), 0.3)
    logging.getLogger("histo_jax").removeHandler(caplog.handler)
    assert "checkpoint 2 is corrupt and was moved to" in caplog.text
    [folder] = (run / "quarantined").iterdir()
    assert folder.name.startswith("2-")
    if part == "state":
        with Checkpoints(run) as checkpoints:
            assert_equal(restore_latest(checkpoints, config), make(config, 2, [0.5, 0.3]))


def truncate(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refuses(run, config, message):
    """Restoring is refused in one line, and nothing is moved."""
    before = files_in(run)
    with (
        pytest.raises(CheckpointError, match=message) as error,
        Checkpoints(run) as checkpoints,
    ):
        restore_latest(checkpoints, config)
    assert "\n" not in str(error.value)
    assert "nothing was moved" in str(error.value)
    assert files_in(run) == before


def test_if_all_checkpoints_are_corrupt_nothing_is_moved(config, run):
    for step in "12":
        truncate(run / "checkpoints" / step)
    assert_refuses(run, config, r"no checkpoint in .* can be restored \(that of step 2: ")


def test_if_the_metrics_of_all_checkpoints_are_corrupt_nothing_is_moved(config, run):
    for step in "12":
        (run / "checkpoints" / step / "metrics" / "metrics").write_text("{")
    assert_refuses(run, config, r"no checkpoint in .* can be restored \(that of step 2: JSONDec")


def test_an_error_of_the_program_moves_nothing(config, run, monkeypatch):
    """As after the upgrade of a library: every checkpoint fails alike, the third is not tried."""
    with Checkpoints(run) as checkpoints:
        checkpoints.save(make(config, 3, [0.5, 0.4, 0.5]), 0.5)
        checkpoints.save(make(config, 4, [0.5, 0.4, 0.5, 0.5]), 0.5)
    steps = []

    def restore(self, step, *_):
        steps.append(step)
        raise TypeError("unexpected keyword argument 'axes' for step " + str(step))

    monkeypatch.setattr(Checkpoints, "restore", restore)
    message = "two checkpoints in .* same error, which is not about their files .TypeError: unexp"
    assert_refuses(run, config, message)
    assert steps == [4, 3]
    # With one checkpoint only there is nothing to compare it with.
    for step in "23":
        shutil.rmtree(run / "checkpoints" / step)
    assert_refuses(run, config, r"no checkpoint in .* \(that of step 4: TypeError: unexpected")


def test_several_corrupt_checkpoints_are_quarantined_if_an_older_one_restores(config, run):
    with Checkpoints(run) as checkpoints:
        checkpoints.save(make(config, 3, [0.5, 0.4, 0.5]), 0.5)
        checkpoints.save(make(config, 4, [0.5, 0.4, 0.5, 0.5]), 0.5)
    for step in "34":
        truncate(run / "checkpoints" / step)
    with Checkpoints(run) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 2, [0.5, 0.4]))
    assert sorted(path.name[0] for path in (run / "quarantined").iterdir()) == ["3", "4"]


def test_a_corrupt_best_checkpoint_is_one_line_that_names_the_fix(config, run):
    place = mesh.replicated(mesh.batch_sharding())
    truncate(run / "checkpoints" / "2")
    with (
        Checkpoints(run) as checkpoints,
        pytest.raises(
            CheckpointError,
            match=r"checkpoints/2, the best .* cannot be restored .* corrupt",
        ) as error,
    ):
        checkpoints.restore_best(config, place)
    assert "\n" not in str(error.value)
    shutil.rmtree(run / "checkpoints" / "2")
    with Checkpoints(run) as checkpoints:
        assert_equal(checkpoints.restore_best(config, place), make(config, 1, [0.5]))


def test_an_error_that_does_not_come_from_the_files_is_raised(config, run, monkeypatch):
    place = mesh.replicated(mesh.batch_sharding())
    before = files_in(run)
    with Checkpoints(run) as checkpoints:

        def full(*_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(checkpoints, "restore", full)
        for restore in (
            lambda: restore_latest(checkpoints, config),
            lambda: checkpoints.restore_best(config, place),
        ):
            with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
                restore()
    assert files_in(run) == before


def test_corrupt_metrics_of_a_run_that_is_only_read_are_one_line(run):
    (run / "checkpoints" / "1" / "metrics" / "metrics").write_text("{")
    with pytest.raises(CheckpointError, match=r"corrupt checkpoint .* rerun the command of that"):
        Checkpoints(run, read_only=True)
    assert not (run / "quarantined").exists()


@pytest.mark.parametrize("name", ["lr=[1,2]", "a\\b*", "caf\udce9/**"])
def test_a_folder_whose_name_is_a_pattern_for_orbax_keeps_checkpoints(config, tmp_path, name):
    folder = tmp_path / name / "run"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(make(config, 1, [0.5]), 0.5)
        checkpoints.save(make(config, 2, [0.5, 0.4]), 0.4)
    with Checkpoints(folder) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 2, [0.5, 0.4]))
    with Checkpoints.of(folder, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 2
    # Nothing beside it: TensorStore makes a slash of a backslash.
    assert [path.name for path in tmp_path.iterdir()] == [name.split("/")[0]]
    (folder / "checkpoints" / "2" / "state" / "_METADATA").unlink()
    place = mesh.replicated(mesh.batch_sharding())
    with Checkpoints(folder) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore_best(config, place)
    assert str(folder / "checkpoints" / "2") in str(error.value)
    assert "/proc/" not in str(error.value)


def test_a_first_save_that_does_not_come_back_stops_the_run(config, tmp_path, monkeypatch):
    read = []

    def restore(self, step, *_):
        read.append(step)
        raise FileNotFoundError("no array")

    with Checkpoints(tmp_path / "whole") as checkpoints:
        checkpoints.save(make(config, 1, [0.3]), 0.3)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "restore", restore)
            checkpoints.save(make(config, 2, [0.3, 0.2]), 0.2)
    assert not read
    monkeypatch.setattr(Checkpoints, "restore", restore)
    with (
        Checkpoints(tmp_path / "lost") as checkpoints,
        pytest.raises(
            CheckpointError, match=r"cannot hold checkpoints.*no array.*--workdir"
        ) as error,
    ):
        checkpoints.save(make(config, 1, [0.3]), 0.3)
    assert read == [1]
    assert "\n" not in str(error.value)


def test_a_limit_of_the_process_is_not_corruption(config, run, monkeypatch):
    with Checkpoints(run) as checkpoints:

        def limited(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Error opening file: Too many open files")

        monkeypatch.setattr(checkpoints._manager, "restore", limited)
        with pytest.raises(OSError, match="Too many open files"):
            restore_latest(checkpoints, config)
    assert not (run / "quarantined").exists()


def test_half_a_directory_is_no_checkpoint(config, run):
    (run / "checkpoints" / "3").mkdir()
    (run / "checkpoints" / "4.orbax-checkpoint-tmp-1").mkdir()
    with Checkpoints(run) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 2, [0.5, 0.4]))


@pytest.mark.parametrize("change", ["channels", "fewer"])
def test_a_checkpoint_of_another_model_is_refused(config, run, change):
    place = mesh.replicated(mesh.batch_sharding())
    if change == "channels":
        config.model.kwargs = {"channels": 5}
    else:
        config.optimizer.ema_decay = 0.5
    with (
        Checkpoints(run) as checkpoints,
        pytest.raises(CheckpointError, match="checkpoint of another model"),
    ):
        checkpoints.restore_best(config, place)


def test_a_checkpoint_of_0_1_0_is_refused_as_such(run):
    old = {"weights": {"deviation": np.zeros(3, np.float32)}}
    refused = pytest.raises(CheckpointError, match=f"{re.escape(str(run))} was trained by .* 0.1.0")
    with Checkpoints(run) as checkpoints, refused:
        checkpoints._check_shapes(1, old, shapes())


def test_a_run_without_checkpoints_names_the_fix(tmp_path):
    with pytest.raises(CheckpointError, match="run --mode=fit first"):
        Checkpoints.of(tmp_path)


@pytest.mark.parametrize("has_ema", [False, True])
def test_abstract_state_has_the_shapes_of_the_real_one(has_ema):
    real = create_state(*parts(), 0, np.zeros(3), np.ones(3), 96, has_ema)
    sharding = mesh.replicated(mesh.batch_sharding())
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"),
        abstract_state(*parts(), 96, sharding, has_ema),
        real,
    )
