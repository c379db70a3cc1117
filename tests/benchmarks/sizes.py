"""Sizes of the measurements: on CPU, on GPU, and in the short form for tests."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements, in patches; `steps` and `calls` of one run of an entry."""

    features: tuple[int, ...] = (32, 64, 128, 256, 512)
    dense: int = 1024
    batches: tuple[int, ...] = (64,)
    steps: int = 8
    epoch: int = 512
    large: int = 0
    large_batches: tuple[int, ...] = ()
    predict_batches: tuple[int, ...] = (256,)
    calls: int = 2
    files: int = 2048
    images: int = 2048
    matrix: int = 2048
    copy: int = 2**26
    growth: tuple[int, ...] = (1_000, 3_000, 10_000, 30_000, 100_000)


CPU = Sizes()
GPU = Sizes(
    batches=(64, 512),
    steps=100,
    epoch=8192,
    large=160_000,
    calls=20,
    files=8192,
    large_batches=(64, 256, 512, 1024, 2048),
    predict_batches=(1024,),
    matrix=8192,
    copy=2**29,
)
SHORT = Sizes(
    features=(4, 4),  # two blocks compile in less than half the time of five
    dense=8,
    batches=(8,),
    steps=2,
    epoch=16,
    large=32,
    large_batches=(8,),
    predict_batches=(8,),
    files=24,
    images=16,
    matrix=256,
    copy=2**20,
    growth=(50, 100),
)
