"""A small network behind a real server on loopback, in a thread of the tests' process."""

import asyncio
import contextlib
import io
import threading
import time
import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import histo_jax
from histo_jax import environment, registry
from histo_jax.config import Config
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.run import files
from histo_jax.run.workdir import Workdir
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, create_state

HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Darkness(nn.Module):
    """Dark centres are positive."""

    @nn.compact
    def __call__(self, images, train):
        scale = self.param("scale", nn.initializers.constant(-1.0), ())
        ramp = jnp.linspace(-0.5, 0.5, images.shape[1])
        return scale * (images[:, 32:64, 32:64].mean((1, 2, 3)) + 0.1 * images.mean((2, 3)) @ ramp)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with this network that was evaluated, as far as the server reads it."""
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    histo_jax.register_model("tests_serve_network")(Darkness)
    config = Config()
    config.data.source = "kaggle"
    config.model.name = "tests_serve_network"
    folder = tmp_path_factory.mktemp("served") / "dark run"
    folder.mkdir()
    Workdir(folder).save_config(config)
    statistics = np.full(3, 0.7), np.full(3, 0.2)
    state = create_state(
        create_model(config.model), create_optimizer(config.optimizer), 0, *statistics, 96, False
    )
    calibration = Calibration(2.0, -1.0)
    data = {"fingerprint": "", "image_size": 96, "calibration": vars(calibration)}
    with Checkpoints(folder) as checkpoints:
        early_stopping = EarlyStopping.create(config.early_stopping)
        checkpoints.save(Checkpoint(state, early_stopping, data, []), 0.5)
    scores = {
        "split": "validation", "count": 250, "auc": 0.934, "auc_low": 0.912, "auc_high": 0.951,
        "interval_over": "slides", "slide_disjoint": True, "patient_disjoint": None,
        "checkpoint_step": int(state.step), "threshold_at_95_specificity": 0.25,
    }  # fmt: skip
    files.write_json(folder / "evaluation_validation.json", scores)
    yield folder
    del registry.MODELS._entries["tests_serve_network"]


@pytest.fixture(scope="session")
def predictor(run):
    return histo_jax.load(run, batch_size=8)


@pytest.fixture(scope="session")
def start(run, predictor):
    """Starts a server; yields its address and its service."""
    from histo_jax.serve import application, model_info, server
    from histo_jax.serve.limits import Limits
    from histo_jax.serve.service import Service
    from histo_jax.serve.slide_folder import SlideFolder

    @contextlib.contextmanager
    def start(token=None, slides=None, predictor=predictor, wait=True, **limits):
        info = model_info.describe(predictor, [run])
        limits = Limits(**limits)
        service = Service(predictor, info, SlideFolder(slides), limits)
        app = application.create(service, HOSTS, token)
        listener = server.bind("127.0.0.1", 0)
        running = server.Server(app, limits.receive_seconds)
        thread = threading.Thread(target=running.serve_until_signal, args=(listener,))
        with environment.defaults():
            thread.start()
            deadline = time.monotonic() + 60
            while wait and not service.is_ready and time.monotonic() < deadline:
                assert service.failure is None
                time.sleep(0.01)
            url = server.url(listener)
            yield types.SimpleNamespace(url=url, service=service, app=app, running=running)
            running.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

    return start


@pytest.fixture(scope="module")  # not of the session: it holds the settings of a command
def served(start, slide_folder):
    with start(slides=str(slide_folder), receive_seconds=30) as server:
        yield server


@pytest.fixture(scope="session")
def slide_folder(tmp_path_factory, write_slide, tissue_pixels):
    """A folder with a slide, and a link to a slide outside of it."""
    pytest.importorskip("openslide", reason="the extra slides is not installed")
    outside = tmp_path_factory.mktemp("outside") / "secret.tif"
    folder = tmp_path_factory.mktemp("slides")
    pixels = tissue_pixels(640, 512, (128, 256, 160))
    for path in (folder / "case 1.tif", outside):
        write_slide(path, pixels, 0.972)
    (folder / "link.tif").symlink_to(outside)
    return folder


@pytest.fixture(scope="module")
def client(served):
    httpx = pytest.importorskip("httpx2", reason="launch/install.sh test installs it")
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def patches():
    """uint8[5, 96, 96, 3], the darker the later."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (5, 96, 96, 3))
    return (noise + np.array([200, 180, 150, 120, 60])[:, None, None, None]).astype(np.uint8)


def content(pixels, kind="TIFF", **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def encode():
    return content


@pytest.fixture(scope="session")
def form(patches):
    """The form of these patches, as TIFF."""
    return [("files", (f"p{n}.tif", content(image))) for n, image in enumerate(patches)]


@pytest.fixture
def run_async():
    return asyncio.run
