"""From uint8 images to calibrated probabilities: one trained network, or an ensemble of several.

Everything that uses trained networks uses them through `Predictor`, and only this module knows
`jax.pmap`. It reads checkpoints, and knows nothing else of training.
"""

import hashlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float, Float32, UInt8
from scipy.special import expit

from histo_jax import environment, exported
from histo_jax.config import Config
from histo_jax.config_values import folders
from histo_jax.data.example import PatchSpec
from histo_jax.data.source_adapter import patch_spec
from histo_jax.distributed import runtime
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration
from histo_jax.models import create_model, windows
from histo_jax.models.forward import Weights, make_forward, read_behind
from histo_jax.run import files
from histo_jax.settings import load_run_config
from histo_jax.training.checkpoints import Checkpoints

Value = TypeVar("Value")

# Scales of networks that may work together: published ones of the same scanner differ by a percent.
_SCALE_TOLERANCE = 0.1

Batch = UInt8[np.ndarray, "batch size size 3"]
# From a network to the function of its weights and of uint8 images that is to be computed.
MakeFunction = Callable[[nn.Module], Callable[[Weights, Any], Any]]


class TrainedModel(NamedTuple):
    """A trained network.

    Attributes:
        run: folder of the run that trained it.
        config: settings of that run.
        model: maps normalised images to logits.
        weights: those of the best checkpoint, on the first local device.
        calibration: fitted to these weights.
        step: training step of the checkpoint.
        fingerprint: of the training and validation examples, see `splits.fingerprint`.
        patch: size and scale of the patches that it was trained on.
    """

    run: str
    config: Config
    model: nn.Module
    weights: Weights
    calibration: Calibration
    step: int
    fingerprint: str
    patch: PatchSpec

    def digest(self) -> str:
        """Returns the SHA-256 of calibration and weights."""
        digest = hashlib.sha256(repr(self.calibration).encode())
        for leaf in jax.tree.leaves(self.weights):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()


def read_best(run: Path, config: Config, read_only: bool = True) -> TrainedModel:
    """Reads the best checkpoint of a run.

    Args:
        run: its folder.
        config: its settings.
        read_only: leave the folder as it is: another process may be training there.

    Raises:
        CheckpointError: there is no checkpoint, or it is corrupt or of another model.
    """
    with Checkpoints.of(run, read_only) as checkpoints:
        best = checkpoints.restore_best(config, SingleDeviceSharding(jax.local_devices()[0]))
    return TrainedModel(
        run=str(run),
        config=config,
        model=create_model(config.model),
        weights=best.state.eval_weights,
        calibration=Calibration(**best.data.get("calibration", {})),
        step=int(best.state.step),
        fingerprint=best.data["fingerprint"],
        patch=patch_spec(config.data, best.image_size),
    )


def read_runs(runs: Sequence[Path], source: str) -> list[TrainedModel]:
    """Reads the best checkpoint of each run; the runs may still be training.

    Args:
        runs: their folders.
        source: what names them, for error messages.

    Raises:
        UserError: a folder is given twice, is not the folder of a run, or has no usable checkpoint.
    """
    _check_duplicates(runs, source)
    return [read_best(run, load_run_config(run)) for run in runs]


def _check_duplicates(runs: Sequence[Path], source: str) -> None:
    real = [run.resolve() for run in runs]
    for number, run in enumerate(runs):
        if real[number] in real[:number]:
            raise UserError(f"{source}: duplicate run {run}; name each run once")


def run_folders(checkpoints: str) -> list[Path]:
    """Returns the folders that `config.predict.checkpoints` names."""
    return [
        files.expand(run, "--config.predict.checkpoints").absolute() for run in folders(checkpoints)
    ]


class Predictor:
    """Applies trained networks to images, on all local devices.

    The logit of an ensemble is the equal mean of its networks' calibrated logits.

    Example:
        >>> predictor = histo_jax.load("runs/a", "runs/b")
        >>> predictor(images)  # uint8[3, size, size, 3]
        array([0.02, 0.97, 0.51])

    Args:
        trained: at least one network.
        tta: test-time augmentation: each network's logit is the mean over an image's eight
            symmetries. Networks that are invariant to them skip it.
        prior: share of tumour among the images, above 0 and below 1; None = as in validation.
        batch_size: images in one call of a network, over all local devices together. One program
            is compiled for it, and smaller batches are padded.

    Attributes:
        trained: the networks.
        tta: as given.
        prior: as given.
        batch_size: as given.
        patch: size and scale of the patches that the networks take.

    Raises:
        UserError: the networks take patches of different sizes or scales.
        ValueError: `prior` or `batch_size` is out of range.
    """

    def __init__(
        self,
        trained: Sequence[TrainedModel],
        *,
        tta: bool = False,
        prior: float | None = None,
        batch_size: int = 256,
    ) -> None:
        if prior is not None and not 0 < prior < 1:
            raise ValueError(f"prior = {prior} must be above 0 and below 1, or None")
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1")
        self.trained, self.batch_size = tuple(trained), batch_size
        self.tta, self.prior = tta, prior
        self.patch = _common_patch(self.trained)
        self._devices = jax.local_devices()
        self._programs: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"Predictor({', '.join(trained.run for trained in self.trained)})"

    def __call__(self, images: Any) -> Float[np.ndarray, " n"]:
        """Returns the calibrated probabilities of tumour, float64[n].

        Args:
            images: uint8[n, size, size, 3], RGB, of the size that `patch` names; or an iterable of
                such batches of any lengths.

        Raises:
            ValueError: images of another shape or dtype.
        """
        return expit(self.logits(images))

    def logits(self, images: Any) -> Float[np.ndarray, " n"]:
        """Returns the calibrated logits, float64[n]; for arguments and errors see `__call__`."""
        return self.calibrate(self.raw_logits(images)).mean(0)

    def raw_logits(
        self, images: Any, batch_size: int | None = None
    ) -> Float32[np.ndarray, "networks n"]:
        """Returns each network's own logits, before calibration.

        Args:
            images: see `__call__`.
            batch_size: instead of the predictor's own; each compiles a program.
        """
        make = make_forward_tta if self.tta else make_forward
        return np.stack(self.map(make, images, batch_size))

    def calibrate(
        self, logits: Float32[np.ndarray, "networks n"]
    ) -> Float[np.ndarray, "networks n"]:
        """Returns each network's calibrated logits, float64, shifted to the predictor's prior."""
        pairs = zip(self.trained, logits, strict=True)
        return np.stack([trained.calibration.apply(own, self.prior) for trained, own in pairs])

    def select(self, number: int) -> "Predictor":
        """Returns the predictor of one of the networks; the compiled programs are shared."""
        selected = Predictor(
            [self.trained[number]], tta=self.tta, prior=self.prior, batch_size=self.batch_size
        )
        selected._programs = self._programs
        return selected

    def map(
        self, make: MakeFunction, images: Any, batch_size: int | None = None
    ) -> list[np.ndarray]:
        """Computes a function of each network over all images.

        Args:
            make: returns, for a network, the function `(weights, uint8[batch, size, size, 3]) ->
                array[batch, ...]`. A program is compiled for each pair of `make` and network.
            images: see `__call__`.
            batch_size: instead of the predictor's own.

        Returns:
            For each network array[n, ...].
        """
        devices, size = len(self._devices), self.patch.size
        per_device = -(-(batch_size or self.batch_size) // devices)
        counts: list[int] = []

        def dispatch() -> Iterator[list[jax.Array]]:
            for batch, count in _padded_batches(images, devices * per_device, size):
                counts.append(count)
                parts = batch.reshape(devices, per_device, size, size, 3)
                # The weights are passed as they are: replicated ones would be copied each time.
                yield [self._program(make, t.model)(t.weights, parts) for t in self.trained]

        with runtime.jax_defaults():
            outputs = list(read_behind(dispatch()))
            if not outputs:
                return [_empty(make(t.model), t.weights, size) for t in self.trained]
        flat = (
            # pmap returns [devices, per_device, ...].
            [output.reshape(-1, *output.shape[2:]) for output in by_batch]
            for by_batch in zip(*outputs, strict=True)
        )
        return [np.concatenate(by_batch)[: sum(counts)] for by_batch in flat]

    def window_logits(
        self, blocks: Iterable[tuple[UInt8[np.ndarray, "height width 3"], np.ndarray]]
    ) -> Generator[Float32[np.ndarray, "networks n"], None, None]:
        """Yields the logits of windows that overlap, before calibration, a batch at a time.

        A block of pixels is copied to the devices once, and its windows are cut there. At most
        `windows.SLOTS` blocks are held at a time.

        Args:
            blocks: pixels, all of one size, and int[k, 2], y and x of the upper left corner of each
                window in them.

        Yields:
            The logits of the next windows, in the order of the blocks.
        """
        devices = len(self._devices)
        per_device = -(-self.batch_size // devices)
        make = make_forward_tta if self.tta else make_forward
        counts: list[int] = []

        def dispatch() -> Iterator[list[jax.Array]]:
            for slots, corners, count in windows.batches(blocks, devices * per_device):
                counts.append(count)
                parts = corners.reshape(devices, per_device, 3)
                yield [
                    self._program(make, t.model, cuts_windows=True)(t.weights, slots, parts)
                    for t in self.trained
                ]

        with runtime.jax_defaults():
            for number, outputs in enumerate(read_behind(dispatch())):
                yield np.stack([output.reshape(-1)[: counts[number]] for output in outputs])

    def _program(self, make: MakeFunction, model: nn.Module, cuts_windows: bool = False) -> Any:
        """Returns the compiled function; networks of one architecture share it."""
        use = ("windows",) if cuts_windows else ()
        key: Any = make, model, *use
        try:
            hash(key)
        except TypeError:  # the network has a field without a hash
            key = make, id(model), *use
        if key not in self._programs:
            function = make(model)
            if cuts_windows:
                function = windows.on_windows(function, self.patch.size)
            axes = (None, None, 0) if cuts_windows else (None, 0)
            self._programs[key] = jax.pmap(function, in_axes=axes, devices=self._devices)
        return self._programs[key]


def load(
    *workdirs: str | os.PathLike[str],
    tta: bool | None = None,
    prior: float | None = None,
    batch_size: int | None = None,
) -> Predictor:
    """Returns the predictor of one run, or the ensemble of several.

    Example:
        >>> predictor = histo_jax.load("runs/kaggle")
        >>> probabilities = predictor(images)  # uint8[n, size, size, 3] to float64[n]

    Args:
        workdirs: folders of runs that `fit` has trained, whose best checkpoints are read; of
            ensembles that `evaluate` or `predict` has worked in, which stand for their runs; or
            that `export` has written.
        tta: see `Predictor`; None = the runs' `config.predict.tta`.
        prior: see `Predictor`; None = the runs' `config.predict.prior`.
        batch_size: see `Predictor`; None = `config.predict.batch_size` of the first run.

    Raises:
        UserError: a folder is not that of a run, a run has no usable checkpoint or is given twice,
            an exported folder was changed or its network is not registered, or the runs' settings
            differ where an argument is None.
        ValueError: `prior` or `batch_size` is out of range.
    """
    if not workdirs:
        raise UserError("load() needs the folder of at least one run")
    with environment.defaults(), runtime.jax_defaults():
        runtime.set_up()
        paths = [files.expand(workdir, "workdir").absolute() for workdir in workdirs]
        _check_duplicates(paths, "load()")
        exports = {path: exported.read(path) for path in paths if exported.is_exported(path)}
        options = [
            exports[path].options if path in exports else load_run_config(path).predict
            for path in paths
        ]
        tta = _common("tta", [each.tta for each in options], tta)
        prior = _common("prior", [each.prior for each in options], prior)
        runs: list[Path] = []
        for path, each in zip(paths, options, strict=True):
            if path not in exports:
                runs += run_folders(each.checkpoints) or [path]
        trained = read_runs(runs, "load()")
        for path, export in exports.items():
            trained += [_unpack(path, network, export.patch) for network in export.networks]
    if batch_size is None:
        batch_size = options[0].batch_size
    return Predictor(trained, tta=bool(tta), prior=prior, batch_size=batch_size)


def _unpack(folder: Path, network: exported.Network, patch: PatchSpec) -> TrainedModel:
    """Returns a network of a folder that `export` has written."""
    return TrainedModel(
        run=str(folder),
        config=network.config,
        model=create_model(network.config.model),
        weights=jax.device_put(network.weights, jax.local_devices()[0]),
        calibration=network.calibration,
        step=network.step,
        fingerprint=network.fingerprint,
        patch=patch,
    )


def _common(name: str, values: Sequence[Value], given: Value | None) -> Value:
    """Returns the value that was given, else the one that all runs share."""
    if given is not None:
        return given
    if any(value != values[0] for value in values):
        raise UserError(
            f"the runs differ in config.predict.{name} ({', '.join(map(str, values))}): "
            f"give load(..., {name}=...)"
        )
    return values[0]


def make_forward_tta(model: nn.Module) -> Callable[[Weights, Any], Any]:
    """Returns `make_forward` with test-time augmentation, unless the network is D4-invariant."""
    return make_forward(model, tta=not getattr(model, "is_d4_invariant", False))


def _common_patch(trained: Sequence[TrainedModel]) -> PatchSpec:
    """Returns what all networks' patches have in common; the scale of the first that knows it."""
    first = trained[0]
    scaled = next((each for each in trained if each.patch.mpp), first)
    for each in trained:
        size, mpp = each.patch.size, each.patch.mpp
        if size != first.patch.size:
            raise UserError(
                f"{first.run} takes patches of {first.patch.size} pixels and {each.run} of {size}: "
                "use runs of one size together"
            )
        if mpp and not math.isclose(mpp, scaled.patch.mpp or mpp, rel_tol=_SCALE_TOLERANCE):
            raise UserError(
                f"{scaled.run} takes patches of {scaled.patch.mpp} micrometres per pixel and "
                f"{each.run} of {mpp} (config.data.mpp): use runs of one scale together"
            )
    return first.patch._replace(mpp=scaled.patch.mpp)


def _empty(
    function: Callable[[Weights, Any], Any], weights: Weights, image_size: int
) -> np.ndarray:
    """Returns the function's output for no images."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.uint8)
    output = jax.eval_shape(function, weights, images)
    return np.zeros((0, *output.shape[1:]), output.dtype)


def _padded_batches(images: Any, size: int, image_size: int) -> Iterator[tuple[Batch, int]]:
    """Yields batches of one size, each with the number of its images; the last is padded."""
    batch, count = np.empty((size, image_size, image_size, 3), np.uint8), 0
    for part in _parts(images, image_size):
        start = 0
        while start < len(part):
            taken = part[start : start + size - count]
            # Copied, because an iterable may reuse its memory for the next batch.
            batch[count : count + len(taken)] = taken
            start, count = start + len(taken), count + len(taken)
            if count == size:
                yield batch, count
                batch, count = np.empty_like(batch), 0
    if count:
        batch[count:] = batch[count - 1]
        yield batch, count


def _parts(images: Any, size: int) -> Iterator[Batch]:
    """Yields the batches that a user gave, checked."""
    if hasattr(images, "__array__"):
        yield _check_images(images, size)
        return
    if not isinstance(images, Iterable):
        raise ValueError(
            f"images are of type {type(images).__name__}, expected {_expected(size)}, or an "
            "iterable of such batches"
        )
    for batch in images:
        yield _check_images(batch, size)


def _expected(size: int) -> str:
    return f"uint8[n, {size}, {size}, 3]"


def _hint(array: np.ndarray, shape: tuple[int, ...]) -> str:
    """Returns how to convert what users often give."""
    if array.dtype == np.uint8 and array.shape == shape:
        return "; for one image give images[None], for a list of images numpy.stack(images)"
    is_float = np.issubdtype(array.dtype, np.floating)
    return "; values are 0 to 255, not scaled" if is_float else ""


def _check_images(images: Any, size: int) -> Batch:
    array, shape = np.asarray(images), (size, size, 3)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != shape:
        received = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
        raise ValueError(f"images are {received}, expected {_expected(size)}{_hint(array, shape)}")
    return array
