import dataclasses
import linecache
import sys
import types

import numpy as np
import optax
import pytest

from histo_jax import config_files, fitting, provenance, recipes, settings
from histo_jax.config import Config, ConfigFile
from histo_jax.models.cnn import FiveBlockCNN
from histo_jax.models.p4m import FiveBlockP4M
from histo_jax.run.workdir import Workdir
from histo_jax.settings import load_run_config
from histo_jax.training import step
from histo_jax.training.loop import Trainer
from histo_jax.training.losses import binary_cross_entropy
from histo_jax.training.optimizer import create_optimizer

CODE = "class Net:\n    width = 1\n"
GET_CONFIG = "from histo_jax.config import Config\ndef get_config():\n    return Config()\n"
PARTS = (FiveBlockCNN, create_optimizer, step.make_train_step, binary_cross_entropy)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's own; returns a function that writes and imports it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str) -> types.ModuleType:
        path = tmp_path / "my_module.py"
        path.write_text(text)
        module = types.ModuleType("my_module")
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "my_module", module)
        exec(compile(text, str(path), "exec"), vars(module))
        return module

    return make


def test_it_is_the_code_that_trains_and_no_other():
    names = provenance.source_hashes(*PARTS).keys()
    assert {
        "histo_jax", "histo_jax.models.cnn", "histo_jax.models.block", "histo_jax.training.step",
        "histo_jax.training.augmentation", "histo_jax.training.optimizer",
    } <= names  # fmt: skip
    assert "histo_jax.models.p4m" in provenance.source_hashes(FiveBlockP4M)
    of_others = ("histo_jax.models.p4m", "histo_jax.data", "optax", "jax", "flax", "typing")
    assert not [name for name in names if name.startswith(of_others)]


def test_a_function_of_the_users_own_counts_where_it_is_put_in(own_module, monkeypatch):
    hashes = []
    for text in ("def mixup(*_): return 1", "def mixup(*_): return 2"):
        monkeypatch.setattr(step, "mixup", own_module(text).mixup)
        hashes.append(provenance.source_hashes(*PARTS)["my_module"])
    assert hashes[0] != hashes[1]
    monkeypatch.setattr(step, "mixup", optax.adam)  # of a library
    assert "optax" not in " ".join(provenance.source_hashes(*PARTS))


def test_a_network_of_the_users_own_counts_with_its_bases(own_module):
    module = own_module(
        "from histo_jax.models.cnn import FiveBlockCNN\nclass Mine(FiveBlockCNN): pass\n"
    )
    assert {"my_module", "histo_jax.models.cnn"} <= provenance.source_hashes(module.Mine).keys()


def test_a_config_files_class_brings_the_module_of_its_base(own_module, tmp_path):
    own_module("class Base: pass\n")
    (tmp_path / "my.py").write_text(
        GET_CONFIG + "import my_module\nclass Net(my_module.Base): pass\n"
    )
    file = settings.load(str(tmp_path / "my.py")).config_file
    network = sys.modules[config_files.module_name(tmp_path / "my.py")].Net
    names = provenance.source_hashes(network, config_file=file).keys()
    assert {"my.py", "my_module"} <= names
    assert not any(name.startswith(config_files.MODULE) for name in names)


def test_what_has_no_source_is_left_out(monkeypatch):
    def no_source(_):
        raise OSError("could not get source code")

    monkeypatch.setattr(provenance.inspect, "getsource", no_source)
    assert provenance.source_hashes(*PARTS, np.add, print).keys() <= {"histo_jax"}


def test_what_a_notebook_defines_stands_for_itself():
    def hashes(width):
        cell = f"class Net:\n    def __call__(self): return {width}\ndef loss(): return helper()\n"
        cell += f"def helper(): return {width}\n"
        linecache.cache["<cell>"] = (len(cell), None, cell.splitlines(True), "<cell>")
        names = {"__name__": "__main__"}
        exec(compile(cell, "<cell>", "exec"), names)
        return provenance.source_hashes(names["Net"], names["loss"])

    one, other = hashes(1), hashes(2)
    assert one["Net"] != other["Net"]
    assert one["loss"] == other["loss"]
    assert one["helper"] != other["helper"]  # which `loss` calls


def test_of_a_config_file_only_the_code_counts(tmp_path):
    def code(text):
        (tmp_path / "my.py").write_text(text)
        return settings.load(str(tmp_path / "my.py")).config_file.code_hash

    assert code(GET_CONFIG) == code('"""Text."""\nRAW = "x"\nimport math\n' + GET_CONFIG) == ""
    before = code(GET_CONFIG + CODE)
    assert code("# said\n" + GET_CONFIG.replace("()\n", "(seed=1)\n") + "\n\n" + CODE) == before
    assert code(GET_CONFIG + CODE.replace("1", "2")) != before
    assert code(GET_CONFIG + "import math\nmath.x = 3\n")
    loss = "mine = print(lambda logits, labels: 1)\n"  # as a decorator is called on a function
    assert code(GET_CONFIG + loss) != code(GET_CONFIG + loss.replace("1", "2")) != ""
    inside = GET_CONFIG.replace("    return", "    def loss(): return 1\n    return")
    assert code(inside) != code(inside.replace("1", "2")) != ""
    assert settings.load("quickstart").config_file == ConfigFile(
        str(recipes.path("quickstart")), "quickstart"
    )


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(
        provenance.log, "warning", lambda text, *values: lines.append(text % values)
    )
    return lines


def test_changes_are_one_line_and_only_where_hashes_were_kept(tmp_path, warnings):
    old = {"histo_jax": "0.1.0", "a": "1", "b": "1", "my.py": "1"}
    new = {"histo_jax": "0.2.0", "a": "2", "b": "1", "c": "1"}
    run = Workdir(tmp_path)
    run.save_config(Config())
    provenance.warn_of_changes(run, new)
    run.save_config(Config(), old)
    provenance.warn_of_changes(run, old)
    assert not warnings
    run.save_config(Config())  # keeps them
    provenance.warn_of_changes(run, new)
    assert ": a, c (new), histo_jax (0.1.0, now 0.2.0), my.py (no longer used); " in warnings[0]
    provenance.warn_of_changes(run, {str(i): "1" for i in range(99)})
    assert " and 99 more;" in warnings[1]
    assert load_run_config(tmp_path) == Config()


def test_a_network_that_changed_after_training_is_named(tmp_path, warnings):
    run, file = Workdir(tmp_path), ConfigFile("my.py", code_hash="1")
    hashes = provenance.source_hashes(FiveBlockCNN, config_file=file)
    run.save_config(Config(), hashes | {"histo_jax": "0.1.0", "my_loss": "1"})
    provenance.warn_of_changed_network(run, FiveBlockCNN, file)
    provenance.warn_of_changed_network(run, FiveBlockCNN, None)  # the file was not executed
    assert not warnings
    edited = dataclasses.replace(file, code_hash="2")
    provenance.warn_of_changed_network(run, FiveBlockCNN, edited)
    run.save_config(Config(), hashes | {"histo_jax.models.block": "1"})
    provenance.warn_of_changed_network(run, FiveBlockCNN, file)
    assert ["my.py;" in line for line in warnings] == [True, False]
    assert "since the run was trained: histo_jax.models.block; scores" in warnings[1]


def test_a_run_that_resumes_reports_what_has_changed(tiny_config, tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda _: [])
    run = Workdir(tmp_path)
    with run.session("fit"):
        run.acquire(tiny_config)
        now = provenance.source_hashes(*PARTS)
        run.save_config(tiny_config, now | {"histo_jax.models.cnn": "other"})
    fitting.fit(tiny_config, tmp_path)
    [line] = [line for line in warnings if "code" in line]
    assert "has changed since its last start: histo_jax.models.cnn; training continues" in line
    assert run.saved_config().source == now
