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
from torch.nn.functional import conv2d, linear, max_pool2d, relu

SYMMETRIES = list(itertools.product((False, True), repeat=3))  # transpose, flip rows, flip columns


def transform(x, transpose, flip_rows, flip_columns):
    """Returns images [..., height, width] under a symmetry of the square."""
    x = x.transpose(-2, -1) if transpose else x
    return x.flip([axis for axis, flips in ((-2, flip_rows), (-1, flip_columns)) if flips])


def expand(kernel):
    """Returns the ordinary kernel [3, 3, inputs, outputs] of a convolution over p4m."""
    places, kernel = torch.arange(9).reshape(3, 3), kernel.flatten(0, 1)
    actions = torch.stack([transform(places, *symmetry).flatten() for symmetry in SYMMETRIES])
    copies = kernel[actions]
    if kernel.ndim == 4:  # its inputs have eight orientations, too
        composed = actions[:, actions.argsort()].transpose(0, 1)
        order = (composed[:, :, None] == actions).all(-1).int().argmax(-1)
        copies = kernel[actions[:, :, None], order[:, None]].flatten(2, 3)
    return copies.permute(1, 2, 0, 3).flatten(2).unflatten(0, (3, 3))


def layers(tensors, is_p4m):
    """Yields name, weight and bias of each layer, with BatchNorm folded into convolutions."""
    for name in [key[7:-7] for key in tensors if key.endswith(".kernel")]:
        weight, norm = tensors[f"params.{name}.kernel"], name.replace("Conv_", "BatchNorm_")
        bias = tensors[f"params.{norm}.bias"]
        if weight.ndim > 2:
            weight = expand(weight) if is_p4m else weight
            mean, var = (tensors[f"batch_stats.{norm}.{kind}"] for kind in ("mean", "var"))
            scale = tensors[f"params.{norm}.scale"] / (var + 1e-5).sqrt()
            repeats = weight.shape[-1] // len(scale)
            weight, bias = weight * scale.repeat(repeats), (bias - mean * scale).repeat(repeats)
        order = (3, 2, 0, 1) if weight.ndim == 4 else (1, 0)
        yield name.replace(".", "_"), weight.permute(order).contiguous(), bias


class Network(torch.nn.Module):
    """One network: from pixels, float[batch, 3, size, size] from 0 to 1, to calibrated logits."""

    def __init__(self, config, tensors, tta, prior):
        super().__init__()
        self.name = config["model"]["name"]
        self.is_p4m = self.name == "five_block_p4m"
        self.views = SYMMETRIES if tta and not self.is_p4m else SYMMETRIES[:1]
        self.weights, self.biases = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        for name, weight, bias in layers(tensors, self.is_p4m):
            self.weights[name], self.biases[name] = weight, bias
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None])
        calibration = config["calibration"]
        self.scale, self.bias = calibration["scale"], calibration["bias"]
        if prior is not None:
            new, fitted = (math.log(p / (1 - p)) for p in (prior, calibration["prior"]))
            self.bias += new - fitted

    def layer(self, x, name, stride=1):
        weight, bias = self.weights[name], self.biases[name]
        if weight.ndim == 2:
            return linear(x, weight, bias)
        return conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def five_block(self, x):
        for i in range(5):
            x = relu(max_pool2d(self.layer(x, f"Block_{i}"), 2))
        if self.is_p4m:  # the mean over orientations and positions
            x = x.unflatten(1, (8, -1)).mean((1, 3, 4))
        x = x.movedim(1, -1).flatten(1)
        return self.layer(relu(self.layer(x, "Dense_0")), "Dense_1")

    def resnet18(self, x):
        stem = "Conv_0"
        if self.weights[stem].shape[-1] == 3:
            x = relu(self.layer(x, stem))
        else:
            x = max_pool2d(relu(self.layer(x, stem, 2)), 3, 2, 1)
        for i in range(8):
            name, stride = f"ResidualBlock_{i}_Conv_", 2 if i in (2, 4, 6) else 1
            y = self.layer(relu(self.layer(x, f"{name}0", stride)), f"{name}1")
            x = relu(y + (self.layer(x, f"{name}2", stride) if f"{name}2" in self.weights else x))
        return self.layer(x.mean((2, 3)), "Dense_0")

    def forward(self, x):
        x = (x - self.mean) / self.std
        network = self.resnet18 if self.name == "resnet18" else self.five_block
        logits = [network(transform(x, *symmetry))[:, 0] for symmetry in self.views]
        return torch.stack(logits).mean(0) * self.scale + self.bias


class Exported(torch.nn.Module):
    """All networks: from uint8[batch, size, size, 3] to calibrated probabilities and logits."""

    def __init__(self, config, tensors):
        super().__init__()
        self.size, self.networks = config["patch"]["size"], torch.nn.ModuleList()
        for number, each in enumerate(config["networks"]):
            own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{number}.")}
            self.networks.append(Network(each, own, config["tta"], config["prior"]))

    def logits(self, pixels):
        return torch.stack([network(pixels) for network in self.networks]).mean(0)

    def forward(self, images):
        size = self.size
        if images.dtype != torch.uint8 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images must be uint8[batch, {size}, {size}, 3], from 0 to 255")
        logits = self.logits(images.permute(0, 3, 1, 2).float() / 255)
        return logits.sigmoid(), logits


def load(folder=Path(__file__).parent):
    """Returns the exported network of a folder, ready to predict."""
    config = json.loads((Path(folder) / "config.json").read_text())
    tensors = load_file(Path(folder) / "model.safetensors")
    return Exported(config, tensors).eval().requires_grad_(False)
