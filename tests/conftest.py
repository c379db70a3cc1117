"""Four fake devices, shapes checked at run time, and small data and slides."""

import atexit
import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import runpy
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Many tests compile the same small programs; all workers share what the first makes here.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="histo_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from jaxtyping import install_import_hook

# Before the package is imported: every annotated shape and dtype is checked in every test.
install_import_hook(
    # An int may stand where a float is asked for, as everywhere in Python.
    "histo_jax",
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import numpy as np
import pandas as pd
import pytest
from absl import flags
from PIL import Image

from histo_jax import environment, main, registry
from histo_jax.config import Config
from histo_jax.data import splits
from histo_jax.data.records import prepare
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.run.workdir import Workdir
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, create_state

# Grain reads flags, which nobody parses under pytest.
flags.FLAGS.mark_as_parsed()
# As the command line sets them; tests add the handlers that they need.
logging.getLogger("histo_jax").setLevel(logging.INFO)
logging.getLogger("histo_jax").propagate = False


def draw_patch(rng: np.random.Generator, label: int) -> np.ndarray:
    """A noisy patch whose centre is darker where the label is 1."""
    image = rng.integers(150, 230, (96, 96, 3)).astype(np.uint8)
    if label:
        image[32:64, 32:64] -= 90
    return image


@pytest.fixture(scope="session")
def make_kaggle() -> Callable[..., Path]:
    """Makes a folder in Kaggle's layout; every file's id is the SHA-1 of its pixels."""

    def make(folder: Path, train: int = 40, test: int = 7, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        csv_names = {"train": "train_labels.csv", "test": "sample_submission.csv"}
        for split, count in (("train", train), ("test", test)):
            (folder / split).mkdir(parents=True)
            rows = []
            for index in range(count):
                image = draw_patch(rng, index % 2)
                name = hashlib.sha1(image.tobytes()).hexdigest()
                Image.fromarray(image).save(folder / split / f"{name}.tif")
                rows.append((name, index % 2 if split == "train" else 0))
            pd.DataFrame(rows, columns=["id", "label"]).to_csv(
                folder / csv_names[split], index=False
            )
        return folder

    return make


@pytest.fixture(scope="session")
def kaggle_dir(tmp_path_factory: pytest.TempPathFactory, make_kaggle) -> Path:
    return make_kaggle(tmp_path_factory.mktemp("raw") / "kaggle")


@pytest.fixture
def tiny_config(make_tiny_config: Callable[[], Config]) -> Config:
    return make_tiny_config()


@pytest.fixture(scope="session")
def make_tiny_config(kaggle_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """A network of a few thousand parameters on the made folder; records are shared."""
    return lambda: _tiny_config(kaggle_dir, tmp_path_factory.getbasetemp() / "records")


def _tiny_config(kaggle_dir: Path, records: Path) -> Config:
    config = Config()
    config.data.source = "kaggle"
    config.data.raw_dir = str(kaggle_dir)
    config.data.tfds_dir = str(records)
    config.data.validation_fraction = 0.25
    config.model.features = (4, 4, 4, 4, 4)
    config.model.dense = 8
    config.optimizer.learning_rate = 1e-2
    config.fit.batch_size = 8
    config.fit.epochs = 2
    config.predict.batch_size = 8
    return config


@pytest.fixture(scope="session")
def synthetic_records(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of records of synthetic slides; who asks for the same slides finds them made."""
    return str(tmp_path_factory.getbasetemp() / "synthetic")


@dataclasses.dataclass
class Ended:
    """How a command ended in this process."""

    status: int
    stdout: str
    stderr: str  # with what is logged, and warnings


@pytest.fixture(scope="session")
def run_command() -> Callable[..., Ended]:
    """Runs the command line in this process, which has the heavy imports behind it."""
    return _run_command


@pytest.fixture(scope="session")
def fork_server():
    """Starts real processes that have the heavy imports behind them, see `fork_server.py`."""
    file = Path(__file__).with_name("fork_server.py")
    server = runpy.run_path(str(file))["ForkServer"]()
    yield server
    server.close()


@pytest.fixture(scope="module")
def chromium():
    """A real Chromium, by Playwright; without one, skips, and under CI (`CI` is set) fails."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        message = "needs Chromium on the PATH, as `apt install chromium` brings it"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with sync_playwright() as playwright:
        # Without a sandbox: containers and CI run as root, and the page is our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Makes logs valid text: they may hold names that are not, which pytest-xdist cannot send."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture
def log(caplog):
    """What the package logs; its logger does not propagate in the tests."""
    logger = logging.getLogger("histo_jax")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "histo_jax")
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def unregister():
    """Removes what a test registers, and nothing else."""
    registries = (registry.MODELS, registry.LOSSES, registry.AUGMENTATIONS, registry.SOURCES)
    before = [entries.names() for entries in registries]
    yield
    for entries, names in zip(registries, before, strict=True):
        for name in set(entries.names()) - set(names):
            del entries._entries[name]


def _run_command(*options: object) -> Ended:
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    logger, handler = logging.getLogger("histo_jax"), logging.StreamHandler(stderr)
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        warnings.catch_warnings(record=True) as caught,
    ):
        environment.reset_warnings()
        logger.addHandler(handler)
        try:
            status = main.main(["histo_jax", *map(str, options)])
        except SystemExit as leave:
            status = leave.code if isinstance(leave.code, int) else 1
        finally:
            logger.removeHandler(handler)
    messages = [f"{warning.message}\n" for warning in caught]
    return Ended(status, stdout.getvalue(), "".join([stderr.getvalue(), *messages]))


@pytest.fixture(scope="session")
def sample() -> Path:
    """The unpacked folder of real patches."""
    name = os.environ.get("HISTO_JAX_SAMPLE")
    if not name:
        message = "HISTO_JAX_SAMPLE names no folder of real patches"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(name)


@pytest.fixture(scope="session")
def save_run():
    """Saves an untrained network as the best checkpoint of a run.

    Whatever reads checkpoints need not wait for a training.
    """
    return _save_run


def _save_run(config: Config, folder: Path, calibration: Calibration) -> Path:
    folder.mkdir()
    Workdir(folder).save_config(config)
    prepared = prepare(config.data, config.data_seed, folder)
    subsets = splits.make_subsets(prepared.tables, config.data, config.data_seed)
    state = create_state(
        create_model(config.model),
        create_optimizer(config.optimizer),
        config.seed,
        *splits.channel_stats(prepared.tables[subsets.train.records], subsets.train.rows),
        prepared.image_size,
        config.optimizer.ema_decay > 0,
    )
    data = {
        "fingerprint": splits.fingerprint(
            prepared.tables, subsets, config.seed, config.fit.batch_size
        ),
        "image_size": prepared.image_size,
        "calibration": dataclasses.asdict(calibration),
    }
    early_stopping = EarlyStopping.create(config.early_stopping)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(Checkpoint(state, early_stopping, data, []), 0.5)
    return folder


@pytest.fixture(scope="session")
def write_slide():
    """Writes a tiled TIFF with a pyramid and a scale in its tags."""
    tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")

    def write(path, pixels, mpp=None, levels=1, mpp_y=None):
        with tifffile.TiffWriter(path) as file:
            for level in range(levels):
                options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib"}
                if mpp:
                    scale = 1e4 / 2**level
                    options["resolution"] = scale / mpp, scale / (mpp_y or mpp)
                    options["resolutionunit"] = "CENTIMETER"
                file.write(pixels, subfiletype=int(level > 0), metadata=None, **options)
                height, width = (side // 2 * 2 for side in pixels.shape[:2])
                halves = pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
                pixels = halves.mean((1, 3)).round().astype(np.uint8)
        return path

    return write


@pytest.fixture(scope="session")
def tissue_pixels():
    """Noisy pink tissue on glass, with a dark square."""

    def make(height, width, square=None, border=0, seed=0):
        rng = np.random.default_rng(seed)
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[:] = (244, 244, 244)
        inside = slice(border, height - border), slice(border, width - border)
        pixels[inside] = (200, 130, 180)
        noise = rng.integers(0, 12, (height // 8 + 1, width // 8 + 1, 1)).repeat(8, 0).repeat(8, 1)
        pixels += noise[:height, :width].astype(np.uint8)
        if square:
            x, y, side = square
            pixels[y : y + side, x : x + side] = (60, 10, 80)
        return pixels

    return make
