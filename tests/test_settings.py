"""Where settings come from; in this process, without training."""

import dataclasses
import inspect
import json
import os
import re
import sys
import threading

import pytest

from histo_jax import recipes, registry, settings
from histo_jax.config import Config, ConfigFile
from histo_jax.errors import UserError
from histo_jax.run.workdir import Workdir

HEAD = "from histo_jax.config import Config\n"
GOOD = HEAD + "def get_config(seed=3):\n    return Config(seed=int(seed))\n"
NEEDS = HEAD + "def get_config(rate):\n    c = Config()\n    c.seed = len(rate)\n    return c\n"


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.py"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    "name",
    ["tiny.py", "a:b/tiny.py", "12:00:00/tiny.py", "a b/c,d=1.py", "no suffix", "[x]*.py", "x:7"],
)
def test_a_config_file_that_exists_is_one_whatever_its_name(file, name):
    path = file.parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(GOOD)
    for given in (name, str(path)):
        assert settings.load(given).seed == 3
        assert settings.load(f"{given}:5").seed == 5


def test_the_argument_may_hold_colons(file):
    file.write_text(NEEDS)
    assert settings.load("tiny.py:a:b:c").seed == 5


def test_a_path_that_is_not_utf8_and_one_below_home(file, monkeypatch):
    name = os.fsdecode(b"r\xe9sum.py")
    (file.parent / name).write_text(GOOD)
    assert settings.load(name).seed == 3
    monkeypatch.setenv("HOME", str(file.parent))
    assert settings.load("~/tiny.py").seed == 3


def test_a_config_file_is_executed_once_per_load(file):
    file.write_text(GOOD + "open('count', 'a').write('x')\n")
    settings.load("tiny.py")
    assert (file.parent / "count").read_text() == "x"
    before = file.stat()
    file.write_text(GOOD.replace("=3", "=4") + "open('count', 'a').write('x')\n")
    # As if written within the same second.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert settings.load("tiny.py").seed == 4


def test_a_pipe_is_a_config_file(file):
    os.mkfifo(file.parent / "pipe")
    writer = threading.Thread(target=(file.parent / "pipe").write_text, args=(GOOD,))
    writer.start()
    assert settings.load("pipe").seed == 3
    writer.join()
    # Hypothesis reads the file of each module, and would wait for another writer.
    (file.parent / "pipe").unlink()


def test_a_recipe_goes_by_its_name_and_a_file_comes_first(file):
    assert settings.load("quickstart").data.source == "synthetic"
    (file.parent / "kaggle").mkdir()
    assert settings.load("kaggle").data.source == "kaggle"
    (file.parent / "quickstart").write_text(GOOD)
    assert settings.load("quickstart").seed == 3


BROKEN = {
    "line of a syntax error": (HEAD + "def f(:\n  pass", "tiny.py, line 2", "SyntaxError"),
    "line of an error": (HEAD + "def get_config():\n  x = 1\n  return 1 / 0", "tiny.py, line 4"),
    "exit": ("import sys\nsys.exit('no GPU')", "tiny.py, line 2", "SystemExit: no GPU"),
    "exit without a message": ("raise SystemExit", "line 1", "SystemExit"),
    "error without a message": ("assert False", "line 1", "AssertionError"),
    "relative file": ("open('ids.txt')", "line 1", "'ids.txt', relative to /"),
    "missing": ("", "get_config() is missing"),
    "no function": (HEAD + "get_config = Config()", "get_config() is not a function"),
    "argument": (NEEDS, "get_config() needs an argument", "tiny.py:ARGUMENT"),
    "class": (HEAD + "def get_config(): return Config", "histo_jax.Config, not type"),
    "group": (HEAD + "def get_config():\n c = Config()\n c.fit = 3\n return c", "config.fit = 3"),
    "field": (HEAD + "def get_config():\n c = Config()\n c.fit.epoch = 3\n return c",
              "tiny.py: unknown", "did you mean config.fit.epochs?"),
    "subclass": (HEAD + "import dataclasses\n@dataclasses.dataclass\nclass Mine(Config):\n"
                 "  more: 'int' = 1\ndef get_config(): return Mine()", "config.more"),
    "latin-1": (b"# caf\xe9\n" + GOOD.encode(), "tiny.py is not UTF-8 text"),
    "utf-16": (GOOD.encode("utf-16"), "tiny.py is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_file_is_named_with_the_line(file, name):
    text, *words = BROKEN[name]
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as error:
        settings.load("tiny.py")
    assert not [word for word in words if word not in str(error.value)], error.value


def test_other_encodings_that_the_file_declares_are_read(file):
    file.write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n" + GOOD.encode())
    assert settings.load("tiny.py").seed == 3
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert settings.load("tiny.py").seed == 3


def test_ctrl_c_while_the_file_is_read_stays_ctrl_c(file):
    file.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        settings.load("tiny.py")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("tiny.py:5:6", ["no argument", ":5:6"]),
        ("tyni.py", ["no such file or recipe", "did you mean", "tiny.py?"]),
        ("kagle", ["did you mean kaggle?"]),
        ("'tiny.py'", ["did you mean tiny.py?"]),
        ("$PLACE/tiny.py", ["did you mean /", "/tiny.py?"]),
        ("nothing/like/it", ["try --config=configs/quickstart.py"]),
        ("", ["--config=: no such file"]),
        (".", ["is a folder, not a file"]),
        ("run", ["is a run's folder", "--config=run/config.json", "--workdir=run"]),
    ],
)
def test_what_is_no_config_file(file, monkeypatch, given, words):
    monkeypatch.setenv("PLACE", str(file.parent))
    if "5:6" in given:
        file.write_text(GOOD.replace("seed=3", "").replace("seed=int(seed)", ""))
    (file.parent / "run").mkdir()
    (file.parent / "run/config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        settings.load(given)
    assert not [word for word in words if word not in str(error.value)], error.value


@pytest.fixture
def run(file):
    """A run that was trained with settings of its own, beside a file of other settings."""
    config = Config(seed=7)
    config.data.source, config.data.raw_dir, config.data.tfds_dir = "kaggle", "raw", "records"
    config.model.features, config.fit.epochs = (2, 2, 2, 2, 2), 9
    config.predict.tta, config.data.slide_map = True, str(file.parent / "slides.csv")
    folder = file.parent / "run"
    folder.mkdir()
    Workdir(folder).save_config(config)
    file.write_text(
        HEAD + "def get_config():\n    config = Config(seed=7)\n"
        "    config.data.source, config.model.dense = 'kaggle', 5\n"
        "    config.data.raw_dir, config.data.slide_map = 'elsewhere', 'slides.csv'\n"
        "    config.evaluate.split, config.predict.batch_size = 'test', 3\n    return config\n"
    )
    return folder


@pytest.mark.parametrize("mode", ["run", "fit", "prepare", "compare", *settings.READING_MODES])
def test_without_a_file_the_run_gives_all_settings(run, mode):
    config, notes = settings.resolve(None, run, mode, ())
    assert config == settings.load_run_config(run)
    assert not notes
    assert settings.load("run/config.json") == config


@pytest.mark.parametrize("mode", settings.READING_MODES)
def test_a_mode_that_reads_takes_what_the_run_is_from_the_run(run, mode):
    own = settings.load_run_config(run)
    config, [note] = settings.resolve("tiny.py", run, mode, ("model.dense",))
    assert (config.model, config.fit.epochs, config.seed) == (own.model, 9, 7)
    # A folder is the file's where it names one, else the run's, which is saved as an absolute path.
    assert (config.data.raw_dir, config.data.tfds_dir) == ("elsewhere", str(run.parent / "records"))
    assert config.data.slide_map == own.data.slide_map
    assert (config.evaluate.split, config.predict.batch_size, config.predict.tta) == (
        "test", 3, False,
    )  # fmt: skip
    assert re.search(r"run/config\.json; tiny\.py .* in model\.features, fit\.epochs$", note)


def test_paths_are_saved_as_absolute_ones_and_words_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for tissue in ("masks", "~/m.png", "auto", "all"):
        saved = str(tmp_path / tissue) if tissue == "masks" else tissue
        config = Config()
        config.heatmap.tissue, config.heatmap.slides = tissue, "a.svs,b"
        Workdir(tmp_path).save_config(config)
        own = settings.load_run_config(tmp_path)
        assert own.heatmap.tissue == saved
        assert own.heatmap.slides == f"{tmp_path}/a.svs,{tmp_path}/b"


@pytest.mark.parametrize("mode", ["run", "fit", "prepare", "compare"])
def test_a_mode_that_trains_takes_the_file_as_it_is(run, mode):
    assert settings.resolve("tiny.py", run, mode, ()) == (settings.load("tiny.py"), [])


def test_a_mode_that_reads_refuses_a_file_about_other_data(run):
    with pytest.raises(UserError, match=r"'synthetic' there and 'kaggle' in .*leave --config out"):
        settings.resolve("quickstart", run, "predict", ())
    assert settings.resolve("quickstart", run, "predict", ("data.source",))[0].seed == 7


def test_an_ensemble_remains_one_where_the_file_names_none(run):
    own = settings.load_run_config(run)
    own.predict.checkpoints = "/runs/a,/runs/b"
    Workdir(run).save_config(own)
    config, _ = settings.resolve("tiny.py", run, "predict", ())
    assert config.predict.checkpoints == "/runs/a,/runs/b"


def test_settings_that_are_nowhere(file):
    assert settings.resolve(None, None, "compare", ()) == (Config(), [])
    with pytest.raises(UserError, match=r"--workdir=nowhere is not the folder of a run"):
        settings.resolve(None, file.parent.joinpath("nowhere").relative_to(file.parent), "fit", ())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model.features": 5}, "model.features = 5 must be five whole numbers"),
        ({"fit.epochs": "3"}, "fit.epochs = '3' must be a whole number"),
        ({"fit.epochs": 0}, "fit.epochs = 0 must be at least 1"),
        ({"data": {"source": "kaggle"}}, "this one has no setting data"),
        ({"source": 3}, ""),
        ({"source": {"a": "b"}}, ""),
    ],
)
def test_a_config_json_of_somebody_else(run, values, words):
    (run / "config.json").write_text("\ufeff" + json.dumps({"version": "0.2.0"} | values))
    if not words:
        assert settings.resolve(None, run, "predict", ())[0] == Config()
        return
    with pytest.raises(UserError, match=re.escape(words)) as error:
        settings.resolve(None, run, "predict", ())
    assert "config.json" in str(error.value)


NETWORK = HEAD + (
    "import histo_jax\n"
    "@histo_jax.register_model('{name}')\n"
    "class Net:\n    pass\n"
    "def get_config(seed='3'):\n"
    "    config = Config(seed=int(seed))\n    config.model.name = '{name}'\n    return config\n"
)


@pytest.fixture
def own_network(file, monkeypatch):
    """A run whose config file registers its network, in a process that has not registered it."""
    monkeypatch.setattr(registry.MODELS, "_entries", {})
    file.write_text(NETWORK.format(name="mine"))
    run = Workdir(file.parent / "own")
    run.path.mkdir()
    run.save_config(settings.load("tiny.py:5"), {"tiny.py": "1"})
    registry.MODELS._entries.clear()
    monkeypatch.chdir("/")
    return run


@pytest.mark.parametrize("mode", ["run", "fit", *settings.READING_MODES])
def test_a_run_loads_its_config_file_where_that_registers_its_network(own_network, mode):
    config, notes = settings.resolve(None, own_network.path, mode, ())
    assert (config.model.name, config.seed, notes) == ("mine", 5, [])
    assert config.config_file == own_network.saved_config().config_file


def test_python_loads_the_config_file_of_a_run_where_it_is_needed(own_network, file):
    config = settings.load_run_config(own_network.path)
    assert config.model.name == "mine"
    registry.MODELS._entries.clear()
    settings.register_missing(config, own_network)
    assert registry.MODELS.names()[-1] == "mine"
    file.unlink()  # no longer needed: this process has it
    assert settings.load_run_config(own_network.path) == config


def test_networks_of_one_name_from_two_files_are_not_mixed_up(own_network, file):
    assert settings.load_run_config(own_network.path).model.name == "mine"
    second = file.parent / "second" / "net.py"
    second.parent.mkdir()
    second.write_text(NETWORK.format(name="mine").replace("class Net", "class Other"))
    other = Workdir(file.parent / "other")
    other.path.mkdir()
    config = own_network.saved_config().to_config()
    config.config_file = ConfigFile(str(second), code_hash="1")
    other.save_config(config)
    with pytest.raises(UserError, match="'mine' is already registered, by Net of"):
        settings.load_run_config(other.path)


def test_the_code_of_a_config_file_is_its_own_after_another_one(file):
    file.write_text(NETWORK.format(name="mine"))
    settings.load("tiny.py")
    first = registry.MODELS.get("mine")
    code = inspect.getsource(first)
    (file.parent / "next.py").write_text("\n\n\nclass Net: other = 1\n" + GOOD)
    settings.load("next.py")
    settings.load(str(file))  # by another name
    assert inspect.getsource(first) == code
    del registry.MODELS._entries["mine"]


def test_a_config_file_that_is_gone_is_named_with_the_network(own_network, file):
    file.unlink()
    with pytest.raises(UserError) as error:
        settings.load_run_config(own_network.path)
    for word in ("own/config.json", "config.model.name = 'mine'", str(file), "is gone", "--config"):
        assert word in str(error.value)
    with pytest.raises(UserError, match="is gone"):
        settings.resolve(None, own_network.path, "predict", ())
    other = file.with_name("other.py")
    other.write_text(NETWORK.format(name="mine"))
    config, _ = settings.resolve(f"{other}:5", own_network.path, "predict", ())
    assert config.model.name == "mine"


def test_a_run_without_a_config_file_names_its_missing_network(own_network):
    path = own_network.path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "config_file": None}))
    with pytest.raises(UserError, match=r"'mine' is not registered.* give --config=FILE.*import"):
        settings.load_run_config(own_network.path)


def test_a_config_file_imports_the_files_beside_it(file, monkeypatch):
    (file.parent / "beside_it.py").write_text("SEED = 7\n")
    file.write_text(
        HEAD + "import beside_it\ndef get_config():\n    return Config(seed=beside_it.SEED)\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir("/")
    assert settings.load(str(file)).seed == 7


def test_a_config_file_that_no_longer_registers_the_network_is_an_error(own_network, file):
    file.write_text(NETWORK.format(name="yours"))
    with pytest.raises(UserError, match=r"config\.model\.name = 'mine' must be one of .*yours"):
        settings.load_run_config(own_network.path)


def test_code_of_a_config_file_is_executed_or_its_loss_is_logged(file):
    file.write_text(GOOD + "open('count', 'a').write('x')\n")
    run = Workdir(file.parent / "run")
    run.path.mkdir()
    run.save_config(settings.load("tiny.py"))
    settings.resolve(None, run.path, "fit", ())
    assert (file.parent / "count").read_text() == "xx"
    settings.load_run_config(run.path)  # executes nothing: all is registered
    assert (file.parent / "count").read_text() == "xx"
    file.unlink()
    _, [note] = settings.resolve(None, run.path, "fit", ())
    assert note == f"{file}, with code that the run was trained with, is gone"


def test_a_recipe_is_found_where_the_package_has_moved(run):
    file = settings.load("quickstart").config_file
    assert (file.recipe, file.code_hash) == ("quickstart", "")
    moved = dataclasses.replace(file, path="/gone/quickstart.py")
    assert settings._path(moved) == recipes.path("quickstart")


@pytest.mark.parametrize("mode", ["run", "prepare", "compare", *settings.READING_MODES])
def test_a_run_of_version_0_1_0_is_refused_by_every_mode(run, mode):
    path = run / "config.json"
    values = json.loads(path.read_text())
    del values["version"]  # as 0.1.0 wrote it
    path.write_text(json.dumps(values))
    for given in (None, "tiny.py"):
        with pytest.raises(UserError, match=r"run/config\.json was written by histo_jax 0\.1\.0"):
            settings.resolve(given, run, mode, ())
