"""What the user has set, in variables of the environment or before a call, changes no result."""

import logging
import os
import runpy
import subprocess
import sys
import threading
import types
import warnings

import jax
import numpy as np
import pandas as pd
import pytest
from absl import logging as absl_logging
from PIL import Image

import histo_jax
from histo_jax import environment, main
from histo_jax.config import ModelConfig
from histo_jax.distributed import runtime
from histo_jax.errors import UserError
from histo_jax.run import files

ROOT = files.Path(__file__).parents[1]
JAX_SETTINGS = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_matmul_precision": "bfloat16",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_transfer_guard": "disallow_explicit",
    "jax_debug_nans": True,
    "jax_log_compiles": True,
    "jax_default_device": 3,
}


def use_all_settings(patch: pytest.MonkeyPatch) -> None:
    """Sets what would change results, stop a run or fill the log."""
    for name, value in JAX_SETTINGS.items():
        value = jax.devices()[value] if name == "jax_default_device" else value
        jax.config.update(name, value)
    pd.set_option("mode.string_storage", "python")
    pd.set_option("display.float_format", "{:.1f}".format)
    warnings.simplefilter("error")
    np.seterr(all="raise")
    np.set_printoptions(legacy="1.13")
    patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    absl_logging.set_verbosity(absl_logging.DEBUG)


@pytest.fixture
def restored():
    """Restores what `use_all_settings` sets."""
    config = {name: jax.config.values[name] for name in JAX_SETTINGS}
    numpy, verbosity = np.geterr(), absl_logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    for name, value in config.items():
        jax.config.update(name, value)
    np.seterr(**numpy)
    np.set_printoptions(legacy=False)
    pd.reset_option("mode.string_storage")
    pd.reset_option("display.float_format")
    absl_logging.set_verbosity(verbosity)


def test_settings_of_the_user_change_no_byte_and_hold_again_afterwards(
    tiny_config, tmp_path, monkeypatch, restored, make_kaggle, capfd
):
    runpy.run_path(str(ROOT / "tests" / "tiny_network.py"))
    tiny_config.model = ModelConfig(name="tiny")
    tiny_config.fit.epochs = 1
    written = []
    for name in ("plain", "other"):
        if name == "other":
            use_all_settings(monkeypatch)
            capfd.readouterr()
        histo_jax.fit(tiny_config, tmp_path / name)
        histo_jax.predict(tiny_config, tmp_path / name)
        names = ("history.csv", "submission.csv")
        written.append([(tmp_path / name / file).read_bytes() for file in names])
    assert written[0] == written[1]
    tiny_config.data.raw_dir = str(make_kaggle(tmp_path / "raw", train=2, test=1))
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    assert len(histo_jax.prepare(tiny_config).tables["train"]) == 2
    output = capfd.readouterr()
    assert "absl" not in output.err
    assert "Compiling" not in output.err
    assert jax.config.values["jax_enable_x64"]
    assert jax.dtypes.canonicalize_dtype(float) == np.float64
    assert np.geterr()["under"] == "raise"
    assert np.get_printoptions()["legacy"] == "1.13"
    assert Image.MAX_IMAGE_PIXELS == 100
    assert pd.get_option("mode.string_storage") == "python"
    assert pd.get_option("display.float_format") is not None
    assert absl_logging.get_verbosity() == absl_logging.DEBUG
    with pytest.raises(UserWarning):
        warnings.warn("an error again", stacklevel=1)


def test_defaults_hold_until_the_last_of_several_threads_leaves():
    began, may_end = threading.Event(), threading.Event()

    def command():
        with environment.defaults():
            began.set()
            may_end.wait()

    before = Image.MAX_IMAGE_PIXELS
    thread = threading.Thread(target=command)
    with environment.defaults():
        thread.start()
        began.wait()
    assert Image.MAX_IMAGE_PIXELS is None
    may_end.set()
    thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_warning_is_logged_once_a_command(caplog):
    logger = logging.getLogger("histo_jax")
    logger.addHandler(caplog.handler)
    try:
        for _ in range(2):
            with environment.defaults():
                for _ in range(3):
                    with environment.defaults():  # as `run` calls `fit`
                        logger.warning("old records of %s", "Kaggle")
                logger.warning("old records of %s", "PatchCamelyon")
                logger.info("again")
                logger.info("again")
    finally:
        logger.removeHandler(caplog.handler)
    once = ["old records of Kaggle", "old records of PatchCamelyon", "again", "again"]
    assert [record.getMessage() for record in caplog.records] == once * 2


def test_imports_work_where_warnings_are_errors_and_a_notebooks_backend_is_missing():
    script = (
        "import runpy, histo_jax; histo_jax.compare\n"
        "with runpy.run_path('histo_jax/report/backend.py')['isolated'](): import matplotlib\n"
        "print(matplotlib.get_backend(auto_select=False))"
    )
    variables = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MPLCONFIGDIR": "/dev/null/x",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("None\n", "")


@pytest.mark.parametrize(
    ("variable", "value"), [("JAX_NUMPY_RANK_PROMOTION", "some"), ("TQDM_NCOLS", "many")]
)
def test_a_variable_that_a_library_cannot_read_is_named(variable, value):
    script = "import histo_jax\ntry: histo_jax.fit\nexcept histo_jax.UserError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {variable: value}, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"{variable}={value}" in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("flags", ["--xla_no_such_flag=1", "/no/such/file"])
def test_xla_flags_that_would_abort_the_process_are_refused(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(UserError, match=f"XLA_FLAGS={flags}: .*; correct or unset XLA_FLAGS"):
        environment.load("histo_jax.fitting")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_min_max=true")
    assert environment.load("histo_jax.fitting").fit is histo_jax.fit


def test_platforms_that_are_not_there_are_named(monkeypatch):
    def no_devices():
        raise RuntimeError("Unable to initialize backend 'cuba'")

    monkeypatch.setenv("JAX_PLATFORMS", "cuba")
    monkeypatch.setattr(jax, "devices", no_devices)
    with pytest.raises(UserError, match=r"no device \(Unable.*unset JAX_PLATFORMS=cuba"):
        runtime.set_up()


def test_an_offset_of_all_seeds_is_refused(tiny_config, tmp_path):
    jax.config.update("jax_random_seed_offset", 7)
    try:
        with pytest.raises(UserError, match=r"JAX_RANDOM_SEED_OFFSET=7 .* set it to 0"):
            histo_jax.fit(tiny_config, tmp_path)
    finally:
        jax.config.update("jax_random_seed_offset", 0)


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ("prepare", "data.raw_dir"),
        ("prepare", "data.tfds_dir"),
        ("prepare", "data.slide_map"),
        ("evaluate", "predict.checkpoints"),
        ("compare", "compare.runs"),
        ("heatmap", "heatmap.slides"),
        ("heatmap", "heatmap.tissue"),
    ],
)
def test_the_home_of_nobody_is_refused_by_the_settings_name(
    tiny_config, tmp_path, command, setting
):
    group, field = setting.split(".")
    name = "~no-such-user/folder"
    if command == "heatmap":
        pytest.importorskip("openslide", reason="the extra slides is not installed")
        tiny_config.heatmap.slides = tiny_config.data.raw_dir
    setattr(getattr(tiny_config, group), field, f"{name},{name}" if command == "compare" else name)
    arguments = [] if command == "prepare" else [tmp_path]
    with pytest.raises(UserError, match=rf"--config\.{setting}={name}: .*whole path"):
        main.load_command(command)(tiny_config, *arguments)


@pytest.mark.parametrize(
    "command", ["audit", "evaluate", "explain", "fit", "heatmap", "predict", "report"]
)
def test_a_workdir_in_the_home_of_nobody_is_refused(tiny_config, command):
    if command == "heatmap":
        pytest.importorskip("openslide", reason="the extra slides is not installed")
        tiny_config.heatmap.slides = tiny_config.data.raw_dir
    with pytest.raises(UserError, match=r"--workdir=~no-such-user/run: .*whole path"):
        main.load_command(command)(tiny_config, "~no-such-user/run")


@pytest.mark.parametrize("cause", ["no home", "relative", "not a folder"])
def test_without_a_cache_folder_compiled_programs_are_not_cached(
    cause, monkeypatch, tmp_path, caplog
):
    values = {"jax_compilation_cache_dir": None}
    config = types.SimpleNamespace(values=values, update=values.__setitem__)
    monkeypatch.setattr(runtime, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(runtime.log, "propagate", True)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if cause == "not a folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif cause == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "caches")
        monkeypatch.setenv("HOME", str(tmp_path))
    else:
        monkeypatch.setattr(files.Path, "home", no_home)
    runtime._set_up_cache()
    if cause == "relative":
        assert values["jax_compilation_cache_dir"] == str(tmp_path / ".cache/histo_jax/compiled")
        return
    assert values["jax_compilation_cache_dir"] is None
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith("compiled programs are not cached: ")
    assert "set XDG_CACHE_HOME" in message


def no_home():
    raise RuntimeError("Could not determine home directory.")
