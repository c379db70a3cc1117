"""Each format computes what the predictor does, for any number of images."""

import functools
import importlib.util
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

import histo_jax
from histo_jax import exported, registry
from histo_jax.config import Config, ModelConfig
from histo_jax.data.example import PatchSpec
from histo_jax.errors import CheckpointError, UserError
from histo_jax.export import onnx as onnx_format
from histo_jax.export import parity, processes, stablehlo, torchscript
from histo_jax.export import safetensors as safetensors_format
from histo_jax.export.function import precise_logits
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.models.forward import Weights
from histo_jax.predictor import Predictor, TrainedModel, load

SIZE = 64
PATCH = PatchSpec(SIZE, 32, 0.972)
SMALL = {"features": (4, 8, 8, 8, 32), "dense": 512}
CONFIGS = {
    "plain": ModelConfig(**SMALL),
    "p4m": ModelConfig(name="five_block_p4m", features=(2, 2, 4, 4, 8), dense=128),
    "resnet18": ModelConfig(name="resnet18", kwargs={"width": 8, "stem": "imagenet"}),
}


@functools.cache
def trained(name: str) -> TrainedModel:
    """A network that was not trained, with every parameter and statistic drawn."""
    config = Config(model=CONFIGS[name])
    return make_trained(create_model(config.model), config)


def make_trained(model: nn.Module, config: Config, patch: PatchSpec = PATCH) -> TrainedModel:
    images = jnp.zeros((1, patch.size, patch.size, 3))
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    rng = np.random.default_rng(len(jax.tree.leaves(variables)))

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":  # keeps the size of the activations
            return (values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))).astype(leaf.dtype)
        scaled = {"scale": 1 + 0.2 * values, "var": 1 + 0.2 * np.abs(values)}
        return scaled.get(name, 0.2 * values).astype(leaf.dtype)

    drawn = jax.tree_util.tree_map_with_path(draw, variables)
    params = drawn.pop("params", {})
    mean, std = np.array([0.7, 0.5, 0.7], np.float32), np.array([0.2, 0.3, 0.2], np.float32)
    weights = jax.device_put(Weights(params=params, collections=drawn, mean=mean, std=std))
    calibration = Calibration(1.3, -0.2, 0.4)
    return TrainedModel("run", config, model, weights, calibration, 7, "fingerprint", patch)


COUNTS = (1, 7, 256, 1000)
FEW = (1, 7)  # for eight passes
# Networks, test-time augmentation, prior.
CASES = {
    "plain with tta": (("plain",), True, None),
    "p4m with a prior": (("p4m",), False, 0.1),
    "resnet18": (("resnet18",), False, None),
    "ensemble": (("plain", "p4m"), False, 0.2),
}
ON_CASES = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (1000, SIZE, SIZE, 3), np.uint8)


def make_predictor(case):
    names, tta, prior = CASES[case]
    networks = [trained(name) for name in names]
    return Predictor(networks, tta=tta, prior=prior, batch_size=8 if tta else 200)


@pytest.fixture(scope="module")
def expected(images):
    return {case: make_predictor(case).logits(images[: max(counts(case))]) for case in CASES}


def counts(case):
    """The ensemble of both networks stands for the largest batch of each."""
    return FEW if "tta" in case else COUNTS if case == "ensemble" else COUNTS[:3]


def contents(case):
    predictor = make_predictor(case)
    networks = [
        exported.Network(t.config, t.weights, t.calibration, t.step, t.fingerprint)
        for t in predictor.trained
    ]
    return exported.Exported(networks, predictor.tta, predictor.prior, PATCH, ("normal", "tumor"))


def check(probability, logit, expected, tolerance=1e-4):
    relative = np.abs(logit - expected) / np.maximum(1, np.abs(expected))
    assert relative.max() < tolerance
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-expected)), atol=tolerance)


@pytest.fixture(scope="module")
def has_torch():
    if importlib.util.find_spec("torch") is None:
        message = "PyTorch is not installed: pip install histo_jax[torch]"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


@ON_CASES
def test_onnx_computes_the_same_in_a_file_of_the_size_of_its_weights(
    case, images, expected, tmp_path
):
    path = tmp_path / "model.onnx"
    onnx_format.write(path, make_predictor(case), SIZE, {"class_names": "normal,tumor"})
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    weights = sum(4 * int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert path.stat().st_size <= 1.1 * weights
    # Each network's weights once: p4m's expanded ones, and no BatchNorm.
    assert weights <= 1.01 * sum(expanded_bytes(name) for name in CASES[case][0])
    assert [opset.version for opset in model.opset_import] == [18]
    assert {p.key: p.value for p in model.metadata_props} == {"class_names": "normal,tumor"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", SIZE, SIZE, 3],
    )
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        (name, "tensor(float)", ["batch"]) for name in ("probability", "logit")
    ]
    for count in counts(case):
        probability, logit = session.run(["probability", "logit"], {"images": images[:count]})
        assert logit.dtype == np.float32
        check(probability, logit, expected[case][:count])


def expanded_bytes(name):
    """Bytes of the weights of ordinary layers without BatchNorm, with a bias for each output."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained(name).weights.params):
        is_kernel, is_block = path[-1].key == "kernel", "Block_" in str(path[0])
        copies = 8 if name == "p4m" and is_block else 1
        total += 4 * leaf.size * (copies if is_kernel or path[-1].key == "bias" else 0)
    return total


def test_stablehlo_takes_any_number_of_images_on_every_platform(images, tmp_path):
    config = Config(model=ModelConfig(features=(1, 1, 1, 1, 1), dense=2))
    patch, images = PatchSpec(32, 32, 0.972), images[:, :32, :32]
    predictor = Predictor([make_trained(create_model(config.model), config, patch)])
    stablehlo.write(tmp_path / "model", predictor, patch.size)
    program = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    expected = precise_logits(predictor, images)
    for count in COUNTS:
        check(*program.call(images[:count]), expected[:count], 1e-5)


@ON_CASES
def test_stablehlo_computes_the_same_and_holds_weights_once(case, images, expected, tmp_path):
    path = tmp_path / "model.stablehlo"
    stablehlo.write(path, make_predictor(case), SIZE)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    check(*jax.jit(program.call)(images[:7]), expected[case][:7], 1e-5)
    weights = sum(
        4 * leaf.size
        for name in CASES[case][0]
        for leaf in jax.tree.leaves(trained(name).weights.variables)
    )
    assert path.stat().st_size <= 1.1 * weights + 60_000  # the program itself


@ON_CASES
def test_load_reads_safetensors_back(case, images, expected, tmp_path):
    written = contents(case)
    safetensors_format.write(tmp_path, written, written.pack())
    loaded = load(tmp_path)
    assert (loaded.tta, loaded.prior) == CASES[case][1:]
    loaded.batch_size = make_predictor(case).batch_size  # compiled already
    np.testing.assert_allclose(loaded.logits(images[:7]), expected[case][:7], rtol=1e-5, atol=1e-6)


@ON_CASES
def test_pytorch_computes_the_same(case, images, expected, tmp_path, has_torch):
    import torch

    written = contents(case)
    safetensors_format.write(tmp_path, written, written.pack())
    specification = importlib.util.spec_from_file_location("model", tmp_path / "model.py")
    model = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(model)
    network = model.load()
    for count in counts(case):
        probability, logit = network(torch.from_numpy(images[:count]))
        check(probability.numpy(), logit.numpy(), expected[case][:count])
    for wrong in (torch.rand(1, SIZE, SIZE, 3), torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be uint8\[batch, 64, 64, 3\]"):
            network(wrong)


def test_torchscript_has_two_logits_whose_softmax_is_the_probability(
    images, expected, tmp_path, has_torch
):
    import torch

    torchscript.write(tmp_path / "wsinfer", contents("ensemble"), contents("ensemble").pack())
    network = torch.jit.load(tmp_path / "wsinfer" / "torchscript_model.pt")
    for count in FEW:
        pixels = torch.from_numpy(images[:count]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            logits = network(pixels)
        assert not logits[:, 0].any()
        check(logits.softmax(1)[:, 1].numpy(), logits[:, 1].numpy(), expected["ensemble"][:count])
    assert sorted(path.name for path in (tmp_path / "wsinfer").iterdir()) == [
        "config.json",
        "torchscript_model.pt",
    ]


def test_wsinfer_accepts_the_description(tmp_path):
    """Its schema of version 1.0, from wsinfer-zoo 0.6.2."""
    described = torchscript.describe(contents("plain with tta"))
    assert described["spec_version"] == "1.0"
    assert described["num_classes"] == len(described["class_names"]) == 2
    assert (described["patch_size_pixels"], described["spacing_um_px"]) == (SIZE, 0.972)
    assert [step["name"] for step in described["transform"]] == ["Resize", "ToTensor", "Normalize"]


def test_a_missing_or_corrupt_file_is_named(tmp_path):
    written = contents("plain with tta")
    safetensors_format.write_config(tmp_path, written, written.pack())
    with pytest.raises(UserError, match=r"has no model\.safetensors: rerun --mode=export"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(written.pack()[:-100])
    with pytest.raises(UserError, match="is corrupt"):
        load(tmp_path)


def test_changed_files_are_refused(tmp_path):
    written = contents("resnet18")
    safetensors_format.write(tmp_path, written, written.pack())
    config, weights = (tmp_path / name for name in ("config.json", "model.safetensors"))
    values, content = json.loads(config.read_text()), bytearray(weights.read_bytes())
    config.write_text(json.dumps(values))  # as another program writes the same values
    exported.read(tmp_path)
    for change in ({"networks": []}, {"prior": 0.2}, {"sha256": None}):
        config.write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match="is corrupt"):
            load(tmp_path)
    config.write_text(json.dumps(values))
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="is corrupt"):
        load(tmp_path)


class Odd(nn.Module):
    """Variables that a file format or a path may not hold as they are."""

    units: int = 2

    @nn.compact
    def __call__(self, x, train):
        scale = self.param("scale", nn.initializers.ones, ())
        x = nn.Dense(self.units, name="head.first", param_dtype=jnp.bfloat16)(x.mean((1, 2)))
        return (x * scale).sum(1)


class Fixed(nn.Module):
    """A network without parameters."""

    @nn.compact
    def __call__(self, x, train):
        return x.mean((1, 2, 3))


@pytest.mark.parametrize("network", [Odd, Fixed])
def test_any_variables_of_a_registered_network_are_read_back(network, tmp_path, unregister):
    histo_jax.register_model("own")(network)
    own = make_trained(network(), Config(model=ModelConfig(name="own")))
    each = exported.Network(own.config, own.weights, own.calibration, 7, "")
    written = exported.Exported([each], False, None, PATCH, ("normal", "tumor"))
    safetensors_format.write(tmp_path, written, written.pack())
    (found,) = exported.read(tmp_path).networks
    jax.tree.map(np.testing.assert_array_equal, found.weights, own.weights)
    assert [leaf.dtype for leaf in jax.tree.leaves(found.weights)] == [
        leaf.dtype for leaf in jax.tree.leaves(own.weights)
    ]


def test_a_network_that_is_missing_or_has_changed_is_named(tmp_path, unregister):
    histo_jax.register_model("own")(Odd)
    own = make_trained(Odd(3), Config(model=ModelConfig(name="own")))
    each = exported.Network(own.config, own.weights, own.calibration, 7, "")
    written = exported.Exported([each], False, None, PATCH, ("normal", "tumor"))
    safetensors_format.write(tmp_path, written, written.pack())
    with pytest.raises(CheckpointError, match=r"code of the network 'own': params.head.first"):
        load(tmp_path)
    del registry.MODELS._entries["own"]
    with pytest.raises(UserError, match=r"'own', which is not registered: import the module"):
        load(tmp_path)


def test_a_folder_is_loaded_once(tmp_path):
    written = contents("resnet18")
    safetensors_format.write(tmp_path, written, written.pack())
    with pytest.raises(UserError, match=r"load\(\): duplicate run"):
        load(tmp_path, tmp_path)


def test_logits_that_are_not_finite_are_refused(monkeypatch):
    monkeypatch.setattr(parity, "precise_logits", lambda *_: np.array([0, np.nan, np.inf]))
    patches = parity.Patches(np.zeros((3, SIZE, SIZE, 3), np.uint8), "")
    with pytest.raises(CheckpointError, match="run: the logits of 2 of 3 patches are not finite"):
        parity.measure(make_predictor("resnet18"), patches, {})


def test_every_config_is_covered():
    assert {name for names, _, _ in CASES.values() for name in names} == set(CONFIGS)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise processes.ProcessError("OSError: [Errno 28] No space left on device: 'x'")

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(processes, "run", fail)
    with pytest.raises(OSError, match=r"No space left on device.*torchscript_model.pt"):
        torchscript.write(tmp_path / "wsinfer", contents("resnet18"), contents("resnet18").pack())
    monkeypatch.setattr(parity, "precise_logits", lambda *_: np.zeros(1))
    monkeypatch.setattr(parity.run_files, "write_bytes", full)
    patches = parity.Patches(np.zeros((1, SIZE, SIZE, 3), np.uint8), "")
    with pytest.raises(OSError, match=r"No space left on device.*images.npy"):
        parity.measure(make_predictor("resnet18"), patches, {})
