import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histo_jax.config import Config, ModelConfig
from histo_jax.distributed import mesh
from histo_jax.errors import UserError
from histo_jax.models import create_model
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, abstract_state, create_state, update


@pytest.fixture
def config():
    config = Config()
    config.model = ModelConfig(features=(2, 2, 2, 2, 2), dense=4)
    return config


def make(config, step, losses):
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    state = create_state(model, optimizer, step, np.full(3, 0.5), np.full(3, 0.25))
    early_stopping = EarlyStopping.create(config.early_stopping)
    for loss in losses:
        early_stopping = update(early_stopping, loss)
    history = [{"epoch": k + 1, "validation_loss": loss} for k, loss in enumerate(losses)]
    state = state.replace(step=jnp.int32(step), loss_sum=jnp.float32(0.1))
    return Checkpoint(state, early_stopping, {"step": step, "fingerprint": "f"}, history)


def restore_latest(checkpoints, config):
    like = abstract_state(config, mesh.replicated(mesh.batch_sharding()))
    return checkpoints.restore_latest(like, EarlyStopping.create(config.early_stopping))


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found.state, wanted.state)
    jax.tree.map(np.testing.assert_array_equal, found.early_stopping, wanted.early_stopping)
    assert (found.data, found.history) == (wanted.data, wanted.history)


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


def parts_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("harm", ["truncated", "removed"])
def test_any_damaged_file_is_noticed_or_does_no_harm(config, tmp_path, harm):
    """Each file of the newest checkpoint in turn: it comes back whole, or the one before does."""
    whole = tmp_path / "whole"
    with Checkpoints(whole) as checkpoints:
        checkpoints.save(make(config, 1, [0.5]), 0.5)
        checkpoints.save(make(config, 2, [0.5, 0.4]), 0.4)
    put_aside = 0
    names = parts_of(whole / "checkpoints" / "2")
    assert len(names) > 10
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        victim = folder / "checkpoints" / "2" / name
        if harm == "removed":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        with Checkpoints(folder) as checkpoints:
            found = restore_latest(checkpoints, config)
        if (folder / "damaged").exists():
            put_aside += 1
            assert_equal(found, make(config, 1, [0.5]))
        else:
            assert_equal(found, make(config, 2, [0.5, 0.4]))
    # The rest is of no consequence, such as marks of success that repeat the folder's name.
    assert put_aside >= 6


def test_training_goes_on_over_the_step_of_a_damaged_checkpoint(config, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 1, [0.5]), 0.5)
        checkpoints.save(make(config, 2, [0.5, 0.4]), 0.4)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 1, [0.5]))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 2, [0.5, 0.3]), 0.3)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 2, [0.5, 0.3]))


@pytest.mark.parametrize("part", ["state", "early_stopping", "data", "history"])
def test_a_missing_part_is_put_aside(config, tmp_path, part, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 1, [0.5]), 0.5)
        checkpoints.save(make(config, 2, [0.5, 0.4]), 0.4)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / part)
    logging.getLogger("histo_jax").addHandler(caplog.handler)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 1, [0.5]))
    logging.getLogger("histo_jax").removeHandler(caplog.handler)
    assert "checkpoint 2 is damaged and was put aside" in caplog.text


def test_a_damaged_best_is_one_line_that_says_what_to_do(config, tmp_path):
    losses = [0.3, 0.5, 0.4]
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(make(config, step, losses[:step]), losses[step - 1])
    for path in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    place = mesh.replicated(mesh.batch_sharding())
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="checkpoints/1, the best checkpoint, is damaged") as said,
    ):
        checkpoints.restore_best(config, place)
    assert "\n" not in str(said.value)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore_best(config, place), make(config, 3, losses))


def test_an_error_that_is_no_damage_moves_nothing(config, tmp_path, monkeypatch):
    place = mesh.replicated(mesh.batch_sharding())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 1, [0.3]), 0.3)
        checkpoints.wait()

        def full(*_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(checkpoints, "restore", full)
        for restore in (
            lambda: restore_latest(checkpoints, config),
            lambda: checkpoints.restore_best(config, place),
        ):
            with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
                restore()
    assert (tmp_path / "checkpoints" / "1").exists()


def test_a_damaged_metric_of_a_run_that_is_only_read_is_one_line(config, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 1, [0.3]), 0.3)
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text("{")
    with pytest.raises(UserError, match=r"damaged checkpoint .* start that run again"):
        Checkpoints(tmp_path, read_only=True)
    assert not (tmp_path / "damaged").exists()


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
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError) as said:
        checkpoints.restore_best(config, place)
    assert str(folder / "checkpoints" / "2") in str(said.value)
    assert "/proc/" not in str(said.value)


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
        pytest.raises(UserError, match=r"cannot hold checkpoints.*no array.*--workdir") as said,
    ):
        checkpoints.save(make(config, 1, [0.3]), 0.3)
    assert read == [1]
    assert "\n" not in str(said.value)


def test_a_limit_of_the_process_is_no_damage(config, tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 1, [0.3]), 0.3)
        checkpoints.wait()

        def limited(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Error opening file: Too many open files")

        monkeypatch.setattr(checkpoints._manager, "restore", limited)
        with pytest.raises(OSError, match="Too many open files"):
            restore_latest(checkpoints, config)
    assert (tmp_path / "checkpoints" / "1").exists()


def test_half_a_directory_is_no_checkpoint(config, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 1, [0.5]), 0.5)
    (tmp_path / "checkpoints" / "2").mkdir()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-1").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(restore_latest(checkpoints, config), make(config, 1, [0.5]))


@pytest.mark.parametrize("change", ["dense", "features", "fewer"])
def test_a_checkpoint_of_another_model_is_refused(config, tmp_path, change):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(config, 1, [0.5]), 0.5)
    if change == "dense":
        config.model.dense = 5
    else:
        config.model.features = (2, 2, 2, 2, 3) if change == "features" else (2, 2, 2, 2)
    place = mesh.replicated(mesh.batch_sharding())
    remedy = pytest.raises(UserError, match="checkpoint of another model")
    with Checkpoints(tmp_path) as checkpoints, remedy:
        checkpoints.restore_best(config, place)


def test_a_checkpoint_of_0_1_0_is_refused_as_such(config, tmp_path):
    old = {"weights": {"deviation": np.zeros(3, np.float32)}}
    like = abstract_state(config, mesh.replicated(mesh.batch_sharding()))
    remedy = pytest.raises(UserError, match=f"{tmp_path} was trained by histo_jax 0.1.0")
    with Checkpoints(tmp_path) as checkpoints, remedy:
        checkpoints._check_shapes(1, old, like)


def test_no_checkpoint_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match="run --mode=fit first"):
        Checkpoints.of(tmp_path)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_abstract_state_has_the_real_ones_shapes(config, decay):
    config.optimizer.ema_decay = decay
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    place = mesh.replicated(mesh.batch_sharding())
    real = create_state(model, optimizer, 0, np.zeros(3), np.ones(3), decay > 0)
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"),
        abstract_state(config, place), real,
    )  # fmt: skip
