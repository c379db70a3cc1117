"""The exported network in PyTorch; needs torch and safetensors alone.

from model import load
network = load()  # of the folder of this file
probability, logit = network(images)  # images: uint8[batch, size, size, 3], RGB
"""

import itertools
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import Module, Parameter
from torch.nn.functional import conv2d, linear, max_pool2d, relu

SYMMETRIES = list(itertools.product((False, True), repeat=3))  # transpose, flip rows, flip columns


def transform(x, transpose, flip_rows, flip_columns):
    """Returns an image or a batch [..., height, width] under a symmetry of the square."""
    x = x.transpose(-2, -1) if transpose else x
    axes = [axis for axis, is_flipped in ((-2, flip_rows), (-1, flip_columns)) if is_flipped]
    return x.flip(axes) if axes else x


def expand(kernel):
    """Returns the ordinary kernel [3, 3, inputs, outputs] of a convolution over p4m."""
    places = torch.arange(9).reshape(3, 3)
    actions = [transform(places, *symmetry).flatten() for symmetry in SYMMETRIES]
    number = {tuple(action.tolist()): i for i, action in enumerate(actions)}
    orientations = []
    for action in actions:
        turned = kernel.flatten(0, 1)[action]
        if turned.ndim == 4:  # its inputs have eight orientations, too
            order = [number[tuple(other[action.argsort()].tolist())] for other in actions]
            turned = turned[:, order].flatten(1, 2)
        orientations.append(turned)
    return torch.stack(orientations, 2).flatten(2).unflatten(0, (3, 3))


def layers(tensors, is_p4m):
    """Yields name and value of PyTorch's weights: with BatchNorm folded into convolutions."""
    for name in [key[:-7] for key in tensors if key.endswith(".kernel")]:
        kernel, norm = tensors[f"{name}.kernel"], name.replace("Conv_", "BatchNorm_")
        if f"{norm}.scale" not in tensors:
            yield name, "weight", kernel.T
            yield name, "bias", tensors[f"{name}.bias"]
            continue
        kernel, stats = expand(kernel) if is_p4m else kernel, norm.replace("params", "batch_stats")
        scale = tensors[f"{norm}.scale"] / (tensors[f"{stats}.var"] + 1e-5).sqrt()
        bias = tensors[f"{norm}.bias"] - tensors[f"{stats}.mean"] * scale
        repeats = kernel.shape[-1] // len(scale)
        yield name, "weight", (kernel * scale.repeat(repeats)).permute(3, 2, 0, 1)
        yield name, "bias", bias.repeat(repeats)


class Network(Module):
    """One network: from pixels, float[batch, 3, size, size] from 0 to 1, to calibrated logits."""

    def __init__(self, config, tensors, tta, prior):
        super().__init__()
        self.name, self.tta = config["model"]["name"], tta
        self.is_p4m = self.name == "five_block_p4m"
        for name, kind, value in layers(tensors, self.is_p4m):
            key = f"{name.removeprefix('params.')}_{kind}".replace(".", "_")
            self.register_parameter(key, Parameter(value.contiguous()))
        self.scale, self.bias, fitted = (
            config["calibration"][k] for k in ("scale", "bias", "prior")
        )
        if prior is not None:
            self.bias += math.log(prior / (1 - prior)) - math.log(fitted / (1 - fitted))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None])

    def apply_layer(self, x, name, stride=1):
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        if weight.ndim == 2:
            return linear(x, weight, bias)
        return conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def five_block(self, x):
        for i in range(5):
            x = relu(max_pool2d(self.apply_layer(x, f"Block_{i}"), 2))
        if self.is_p4m:  # the mean over orientations and positions
            x = x.unflatten(1, (8, -1)).mean((1, 3, 4))
        else:
            x = x.permute(0, 2, 3, 1).flatten(1)
        return self.apply_layer(relu(self.apply_layer(x, "Dense_0")), "Dense_1")

    def resnet18(self, x):
        is_small = self.Conv_0_weight.shape[-1] == 3
        x = relu(self.apply_layer(x, "Conv_0", 1 if is_small else 2))
        x = x if is_small else max_pool2d(x, 3, 2, 1)
        for i in range(8):
            name, stride = f"ResidualBlock_{i}", 2 if i in (2, 4, 6) else 1
            y = relu(self.apply_layer(x, f"{name}_Conv_0", stride))
            has_projection = hasattr(self, f"{name}_Conv_2_weight")
            x = self.apply_layer(x, f"{name}_Conv_2", stride) if has_projection else x
            x = relu(x + self.apply_layer(y, f"{name}_Conv_1"))
        return self.apply_layer(x.mean((2, 3)), "Dense_0")

    def forward(self, x):
        x = (x - self.mean) / self.std
        network = self.resnet18 if self.name == "resnet18" else self.five_block
        views = SYMMETRIES if self.tta and not self.is_p4m else SYMMETRIES[:1]
        logits = [network(transform(x, *symmetry))[:, 0] for symmetry in views]
        return torch.stack(logits).mean(0) * self.scale + self.bias


class Exported(Module):
    """All networks: from uint8[batch, size, size, 3] to calibrated probabilities and logits."""

    def __init__(self, networks):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def logits(self, pixels):
        return torch.stack([network(pixels) for network in self.networks]).mean(0)

    def forward(self, images):
        logits = self.logits(images.permute(0, 3, 1, 2).float() / 255)
        return logits.sigmoid(), logits


def load(folder=Path(__file__).parent):
    """Returns the exported network of a folder, ready to predict."""
    config = json.loads((Path(folder) / "config.json").read_text())
    tensors = load_file(Path(folder) / "model.safetensors")
    networks = []
    for number, each in enumerate(config["networks"]):
        own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{number}.")}
        networks.append(Network(each, own, config["tta"], config["prior"]))
    return Exported(networks).eval()
