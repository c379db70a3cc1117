"""The formulas of the roofline, compared with numbers worked out by hand."""

import runpy
from pathlib import Path

import pytest

roofline = runpy.run_path(str(Path(__file__).with_name("roofline.py")))
FEATURES, DENSE = (32, 64, 128, 256, 512), 1024


def test_operations() -> None:
    # Products of the forward pass: 96*96*9*3*32 = 7,962,624 in the first block;
    # 48*48*9*32*64 = 42,467,328 in each other one; 3*3*512*1024 = 4,718,592 and 1,024 in the dense
    # layers. The first block counts twice (no gradient of the image), the others three times, with
    # two operations per product.
    first, rest = 7_962_624, 4 * 42_467_328 + 4_718_592 + 1_024
    assert roofline["operations"](FEATURES, DENSE, 64) == 64 * (4 * first + 6 * rest)
    assert roofline["operations"](FEATURES, DENSE, 1) == pytest.approx(1.079e9, rel=1e-3)


def test_parameters_are_those_of_the_network() -> None:
    # Convolutions 864 + 18,432 + 73,728 + 294,912 + 1,179,648; BatchNorm twice 992 channels; dense
    # layers 4,608*1,024 + 1,024 and 1,024 + 1.
    parameters = sum(layer.parameters for layer in roofline["layers"](FEATURES, DENSE))
    assert parameters == 1_567_584 + 1_984 + 4_719_616 + 1_025


def test_bytes() -> None:
    # Inputs and outputs: 27,648 + 294,912; 73,728 + 147,456; 36,864 + 73,728; 18,432 + 36,864;
    # 9,216 + 18,432; 4,608 + 1,024; 1,024 + 1: together 743,937 per image.
    parameters = 6_290_209
    for batch, width in ((64, 2), (1, 4)):
        expected = 3 * batch * width * 743_937 + 16 * parameters
        assert roofline["transferred"](FEATURES, DENSE, batch, width) == expected
