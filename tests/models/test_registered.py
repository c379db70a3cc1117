"""Networks, losses and augmentations from outside the package."""

import inspect
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import histo_jax
from histo_jax import registry, settings
from histo_jax.config import AugmentConfig, Config
from histo_jax.config_checks import validate
from histo_jax.distributed import mesh
from histo_jax.errors import UserError
from histo_jax.models import create_model
from histo_jax.report.attribution import integrated_gradients
from histo_jax.run.saved_config import plain
from histo_jax.run.workdir import Workdir
from histo_jax.settings import load_run_config
from histo_jax.training import step
from histo_jax.training.augmentation import make_augment
from histo_jax.training.checkpoints import Checkpoint, Checkpoints
from histo_jax.training.losses import get_loss
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.parts import build_parts, check_parts
from histo_jax.training.state import EarlyStopping, create_state

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
BATCH = {
    "image": RNG.integers(0, 256, (4, 96, 96, 3), dtype=np.uint8),
    "label": np.array([0, 1, 0, 1], np.float32),
}


pytestmark = pytest.mark.usefixtures("unregister")


def check(config):
    validate(config)
    parts = build_parts(config.model, config.augment, config.fit)
    check_parts(parts, config.model, config.augment, config.fit, 96)


def train(config, steps):
    """Trains some steps on one batch, as `fit` does; returns the model, state and metrics."""
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    batch_sharding = mesh.batch_sharding()
    train_step = step.make_train_step(
        model,
        optimizer,
        batch_sharding,
        make_augment(config.augment),
        get_loss(config.fit.loss),
        config.optimizer.ema_decay,
        config.augment.mixup,
    )
    mean, std = np.full(3, 0.5), np.full(3, 0.25)
    state = create_state(model, optimizer, 0, mean, std, 96, config.optimizer.ema_decay > 0)
    state = jax.device_put(state, mesh.replicated(batch_sharding))
    for _ in range(steps):
        state, metrics = train_step(state, jax.device_put(BATCH, batch_sharding))
    assert train_step._cache_size() == 1
    return SimpleNamespace(model=model, state=state, metrics=metrics)


def test_crops_must_suit_the_network_and_be_smaller_than_the_patches():
    config = Config()
    config.model.name, config.fit.crop_epochs = "five_block_p4m", 1
    check(config)
    config.fit.crop_size = 96
    with pytest.raises(UserError, match="crop_size = 96 must be less than the 96 pixels"):
        check(config)
    config.fit.crop_size, config.fit.epochs = 64, 1
    with pytest.raises(UserError, match=r"crop_epochs = 1 must be less than .*epochs = 1"):
        check(config)
    config.model.name, config.fit.epochs = "five_block", 2
    message = r"crop_size = 64: network 'five_block' fails: .*: set .*five_block_p4m"
    with pytest.raises(UserError, match=message):
        check(config)


def test_a_network_of_a_config_file_trains_saves_predicts_and_explains(tmp_path):
    path = str(Path(__file__).with_name("groupnorm_resnet.py"))
    for _ in range(2):  # as when a notebook reruns it
        config = runpy.run_path(path)["get_config"]()
    config.model.kwargs = {"widths": [4], "groups": 2}
    config.optimizer.ema_decay = 0.5
    check(config)

    trained = train(config, 3)
    state = jax.device_get(trained.state)
    assert trained.metrics.finite
    assert state.weights.collections == {}
    assert state.weights.params["Conv_0"]["kernel"].shape == (4, 4, 3, 4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.ema.params, state.weights.params)
    assert max(jax.tree.leaves(moved)) > 0

    Workdir(tmp_path).save_config(config)
    assert load_run_config(tmp_path).model == config.model
    early_stopping = EarlyStopping.create(config.early_stopping)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(Checkpoint(trained.state, early_stopping, {}, []), 0.5)
    place = SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_best(config, place).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)

    weights, images = restored.eval_weights, BATCH["image"]
    plain, tta = (jax.jit(step.make_forward(trained.model, how)) for how in (False, True))
    logits = plain(weights, images)
    assert logits.dtype == jnp.float32
    assert jnp.abs(tta(weights, images) - logits).max() > 1e-4
    explained, maps = jax.jit(lambda x: integrated_gradients(trained.model, weights, x))(images)
    np.testing.assert_allclose(explained, logits, rtol=1e-4, atol=1e-5)
    assert maps.shape == (4, 96, 96)

    # In another process nothing is registered until the config file is executed.
    del registry.MODELS._entries["groupnorm_resnet"]
    resolved, _ = settings.resolve(path, tmp_path, "predict", {})
    assert resolved.model == config.model


class Pixel(nn.Module):
    """The smallest network: one weight per channel."""

    def logits(self, images):
        return nn.Dense(1)(images.mean((1, 2)))[:, 0]


class Counting(Pixel):
    """Has statistics, a counter, dropout and its own random stream."""

    @nn.compact
    def __call__(self, images, train):
        count = self.variable("counters", "steps", lambda: jnp.zeros((), jnp.int32))
        mean = self.variable("statistics", "mean", lambda: jnp.zeros(3))
        if train:
            count.value += 1
            mean.value = 0.5 * mean.value + 0.5 * images.mean((0, 1, 2))
            images = images + 0.01 * jax.random.normal(self.make_rng("noise"), images.shape)
        return self.logits(nn.Dropout(0.1, deterministic=not train)(images))


def test_all_collections_of_variables_are_updated_and_averaged():
    histo_jax.register_model("counting")(Counting)
    config = Config()
    config.model.name, config.optimizer.ema_decay = "counting", 0.5
    check(config)
    state = train(config, 3).state
    assert state.weights.collections.keys() == {"counters", "statistics"}
    assert state.weights.collections["counters"]["steps"] == 3
    # Counters have no moving average.
    assert state.ema.collections["counters"]["steps"] == 3
    assert state.ema.collections["counters"]["steps"].dtype == jnp.int32
    mean, ema = (w.collections["statistics"]["mean"] for w in (state.weights, state.ema))
    assert jnp.abs(mean).max() > jnp.abs(ema).max() > 0


class Column(Pixel):
    @nn.compact
    def __call__(self, images, train):
        return self.logits(images)[:, None]


class Mean(Pixel):
    @nn.compact
    def __call__(self, images, train):
        return self.logits(images).mean()


class Pair(Pixel):
    @nn.compact
    def __call__(self, images, train):
        return self.logits(images), images


class Broken(Pixel):
    @nn.compact
    def __call__(self, images, train):
        return self.logits(images) + jnp.zeros(5)


class Untrainable(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return images.mean((1, 2, 3))


class Growing(Pixel):
    @nn.compact
    def __call__(self, images, train):
        logits = self.logits(images)
        self.sow("losses", "size", logits)
        return logits


class WithoutTrain(Pixel):
    @nn.compact
    def __call__(self, images):
        return self.logits(images)


class Late(Pixel):
    """Has a variable in training only."""

    @nn.compact
    def __call__(self, images, train):
        if train:
            self.variable("late", "mean", jnp.zeros, 3)
        return self.logits(images)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Column, ["Column returns float32[2, 1]", "images of shape [2, 96, 96, 3]", "float32[2]"]),
        (Mean, ["Mean returns float32[]", "float32[2]"]),
        (Pair, ["Pair returns a tuple", "float32[2]"]),
        (Broken, ["network 'mine' fails: TypeError", "(test_registered.py, line "]),
        (Untrainable, ["network 'mine' has no parameters"]),
        (Growing, ["network 'mine' changes", "(losses)"]),
        (WithoutTrain, ["network 'mine' fails: TypeError", "'train'"]),
        (Late, ["network 'mine' fails: ", "late"]),
        (lambda images, train: images, ["model 'mine'", "subclass of flax.linen.Module"]),
    ],
)
def test_an_invalid_network_is_refused_in_one_line(network, words):
    histo_jax.register_model("mine")(network)
    config = Config()
    config.model.name = "mine"
    refuses(config, words)


def refuses(config, words):
    with pytest.raises(UserError) as error:
        check(config)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


class Fields(Pixel):
    width: int
    rates: tuple[float, ...] = (0.1,)
    sizes: list[int] | None = None
    mode: str = "a"
    anything: object = None

    @nn.compact
    def __call__(self, images, train):
        assert isinstance(self.rates, tuple)
        return self.logits(images)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"width": 3}, None),
        ({"width": 3, "rates": [1, 0.5], "sizes": [1, 2], "anything": {"a": [1]}}, None),
        ({}, ["['width'] is missing", "mine"]),
        (
            {"widht": 3},
            ["['widht'] is not a field of mine", "fields: width, rates", "did you mean width?"],
        ),
        ({"width": "3"}, ["['width'] = '3' is not of type int"]),
        ({"width": True}, ["['width'] = True is not of type int"]),
        ({"width": 3, "rates": [1, "a"]}, ["= [1, 'a'] is not of type tuple[float, ...]"]),
        ({"width": 3, "sizes": 3}, ["['sizes'] = 3 is not of type list[int] | None"]),
        ({"width": 3, "name": "x"}, ["['name'] is not a field"]),
        ({"width": 3, "mode": float("nan")}, ["config.model.kwargs = ", "finite"]),
        ({"width": 3, "anything": max}, ["config.model.kwargs = ", "finite"]),
        ({"width": 3, "anything": {1: 2}}, ["config.model.kwargs = ", "finite"]),
    ],
)
def test_kwargs_are_checked_against_the_networks_fields(kwargs, words, tmp_path):
    histo_jax.register_model("mine")(Fields)
    config = Config()
    config.model.name, config.model.kwargs = "mine", kwargs
    if words:
        return refuses(config, words)
    check(config)
    Workdir(tmp_path).save_config(config)
    assert plain(load_run_config(tmp_path)) == plain(config)
    assert load_run_config(tmp_path).model.kwargs == json.loads(json.dumps(kwargs))
    config.model.kwargs = kwargs | {"width": 4}
    with pytest.raises(UserError, match=r"model\.kwargs was .*'width': 3.* there"):
        Workdir(tmp_path).check_compatible(config)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("model.name", "resnet8", ["= 'resnet8' must be one of five_block", "mean resnet18?"]),
        (
            "model.kwargs",
            {"width": 3},
            ["['width'] is not a field of five_block; its fields: none"],
        ),
        ("fit.loss", "focal", ["config.fit.loss = 'focal' must be", "histo_jax.register_loss"]),
        ("augment.extra", ("blur",), ["config.augment.extra = 'blur' must be registered"]),
        ("augment.extra", "blur", ["config.augment.extra = 'blur' must be a tuple of text"]),
    ],
)
def test_unregistered_names_are_refused(setting, value, words):
    config = Config()
    section, _, field = setting.partition(".")
    setattr(getattr(config, section), field, value)
    refuses(config, words)


@pytest.mark.parametrize(
    ("field", "value"), [("features", (8, 8, 8, 8, 8)), ("dense", 8), ("dropout", 0.1)]
)
def test_fields_of_the_five_block_networks_are_refused_for_others(field, value):
    config = Config()
    config.model.name, config.model.kwargs = "resnet18", {"stem": "tiny"}
    refuses(config, ["['stem'] = 'tiny' is not of type Literal['small', 'imagenet']"])
    config.model.kwargs = {"width": 0}
    refuses(config, ["network 'resnet18' fails"])
    setattr(config.model, field, value)
    refuses(config, [f"config.model.{field} is not used by resnet18", "config.model.kwargs"])


def test_a_name_can_be_registered_for_one_network_only():
    histo_jax.register_model("mine")(Column)
    histo_jax.register_model("mine")(Column)
    with pytest.raises(UserError, match=r"registered, by Column of .*another"):
        histo_jax.register_model("mine")(Mean)
    with pytest.raises(UserError, match="model 'resnet18' is built in"):
        histo_jax.register_model("resnet18")(Mean)
    # Each execution of a notebook cell has a file name of its own.
    for _ in range(2):
        space = {"__name__": "__main__"}
        exec(compile("def loss(logits, labels): pass", f"cell{_}", "exec"), space)
        histo_jax.register_loss("mine")(space["loss"])
    assert registry.LOSSES.names() == ["binary_cross_entropy", "mine"]


def test_a_decorator_without_a_name_is_refused():
    register = inspect.unwrap(registry.Registry.register)  # without the checks of the tests
    with pytest.raises(UserError, match=r'write @histo_jax\.register_model\("NAME"\)'):
        register(registry.MODELS, object)


def test_training_minimises_a_registered_loss(tmp_path):
    @histo_jax.register_loss("brier")
    def brier(logits, labels):
        return (jax.nn.sigmoid(logits) - labels) ** 2

    histo_jax.register_model("counting")(Counting)
    config = Config()
    config.model.name, config.fit.loss = "counting", "brier"
    check(config)
    first = train(config, 1).metrics
    assert 0 < float(first.loss) < 1
    Workdir(tmp_path).save_config(config)
    config.fit.loss = "binary_cross_entropy"
    with pytest.raises(UserError, match=r"fit\.loss was 'brier' there"):
        Workdir(tmp_path).check_compatible(config)
    assert float(train(config, 1).metrics.loss) > 1.5 * float(first.loss)

    histo_jax.register_loss("mean")(lambda logits, labels: brier(logits, labels).mean())
    config.fit.loss = "mean"
    refuses(config, ["loss 'mean' returns shape []", "float32[2]"])
    histo_jax.register_loss("broken")(lambda logits: logits)
    config.fit.loss = "broken"
    refuses(config, ["loss 'broken' fails: TypeError"])


def test_registered_augmentations_are_applied_in_order_after_the_built_in_ones():
    @histo_jax.register_augmentation("darken")
    def darken(key, images):
        assert images.dtype == jnp.float32
        return images / 2 + jax.random.uniform(key)

    histo_jax.register_augmentation("invert")(lambda key, images: 300 - images)
    images = jnp.asarray(BATCH["image"])
    plain = make_augment(AugmentConfig(shift=2))(KEY, images).astype(jnp.float32)
    both = make_augment(AugmentConfig(shift=2, extra=("darken", "invert")))(KEY, images)
    offset = 300 - both - plain / 2
    inside = (both > 0) & (both < 255)
    assert 0 < float(offset[inside].min()) <= float(offset[inside].max()) < 1
    assert float(both.max()) == 255
    assert float(offset[inside].max() - offset[inside].min()) < 1e-3

    histo_jax.register_augmentation("crop")(lambda key, images: images[:, 1:])
    config = Config(augment=AugmentConfig(extra=("crop",)))
    refuses(config, ["augmentation 'crop' returns shape [2, 95, 96, 3]", "[2, 96, 96, 3]"])


def test_an_error_names_the_line_of_the_network():
    histo_jax.register_model("mine")(Broken)
    config = Config()
    config.model.name = "mine"
    with pytest.raises(UserError) as error:
        check(config)
    number = int(re.search(r"line (\d+)\)$", str(error.value))[1])
    assert "jnp.zeros(5)" in Path(__file__).read_text().splitlines()[number - 1]
