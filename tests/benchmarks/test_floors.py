"""The floors' formulas beside numbers worked out by hand."""

import runpy
from pathlib import Path

import pytest

floors = runpy.run_path(str(Path(__file__).with_name("floors.py")))
FEATURES, DENSE = (32, 64, 128, 256, 512), 1024


def test_operations() -> None:
    # Products forward: 96*96*9*3*32 = 7,962,624; each further block 48*48*9*32*64 = 42,467,328,
    # for channels double while pixels quarter twice over; 3*3*512*1024 = 4,718,592; 1,024.
    # The first twice (no gradient of the image), the rest three times, two operations each.
    first, rest = 7_962_624, 4 * 42_467_328 + 4_718_592 + 1_024
    assert floors["operations"](FEATURES, DENSE, 64) == 64 * (4 * first + 6 * rest)
    assert floors["operations"](FEATURES, DENSE, 1) == pytest.approx(1.079e9, rel=1e-3)


def test_parameters_are_those_of_the_network() -> None:
    # 864 + 18,432 + 73,728 + 294,912 + 1,179,648 of convolutions, twice 992 channels of BatchNorm,
    # 4,608*1,024 + 1,024 and 1,024 + 1 of dense layers.
    parameters = sum(layer.parameters for layer in floors["layers"](FEATURES, DENSE))
    assert parameters == 1_567_584 + 1_984 + 4_719_616 + 1_025


def test_bytes() -> None:
    # Numbers in and out: 27,648 + 294,912; 73,728 + 147,456; 36,864 + 73,728; 18,432 + 36,864;
    # 9,216 + 18,432; 4,608 + 1,024; 1,024 + 1: together 743,937 an image.
    parameters = 6_290_209
    for batch, width in ((64, 2), (1, 4)):
        expected = 3 * batch * width * 743_937 + 16 * parameters
        assert floors["transferred"](FEATURES, DENSE, batch, width) == expected
