"""What a config selects by name: networks, sources, losses and augmentations.

A config file, or a module that it imports, adds its own:

    @histo_jax.register_model("my_network")
    class MyNetwork(flax.linen.Module): ...

This module imports nothing heavy: names are checked before JAX is loaded.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from histo_jax.errors import ConfigError, did_you_mean

Entry = TypeVar("Entry")


class Registry:
    """Entries of one kind by name.

    Args:
        kind: what an entry is, for messages.
        built_in: the module that registers each entry of the package; imported when it is needed.
    """

    def __init__(self, kind: str, built_in: Mapping[str, str]) -> None:
        self._kind, self._built_in = kind, built_in
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Returns a decorator that registers a class or function under `name`.

        The same class or function may be registered again, as when a notebook's cell or a config
        file is executed twice; the last one is used.

        Raises:
            ConfigError: the name is taken by another class or function, or is missing.
        """
        if not isinstance(name, str):
            raise ConfigError(
                f"histo_jax.register_{self._kind} needs a name: write "
                f'@histo_jax.register_{self._kind}("NAME")'
            )

        def add(entry: Entry) -> Entry:
            if self.is_built_in(name) and _module(entry) != self._built_in[name]:
                raise ConfigError(f"{self._kind} {name!r} is built in: choose another name")
            origin = _origin(self._entries.get(name, entry))
            if origin != _origin(entry):
                raise ConfigError(
                    f"{self._kind} {name!r} is already registered, by {' of '.join(origin)}: "
                    "choose another name"
                )
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        """Returns all names, those of the package first."""
        return list(dict.fromkeys([*self._built_in, *self._entries]))

    def is_built_in(self, name: str) -> bool:
        """Whether an entry belongs to the package."""
        return name in self._built_in

    def get(self, name: str) -> Any:
        """Returns the entry of a name that `check` accepts."""
        if name not in self._entries:
            importlib.import_module(self._built_in[name])
        return self._entries[name]

    def check(self, field: str, name: str) -> None:
        """Refuses a name that is not registered.

        Args:
            field: of the config, for the message.
            name: the name.

        Raises:
            ConfigError: names the field, all registered names, and the closest one.
        """
        names = self.names()
        if name in names:
            return
        known = f"one of {', '.join(names)}, or registered" if names else "registered"
        raise ConfigError(
            f"config.{field} = {name!r} must be {known} in the config file by "
            f"histo_jax.register_{self._kind}{did_you_mean(name, names)}"
        )


def _module(entry: Any) -> str | None:
    return getattr(entry, "__module__", None)


def _origin(entry: Any) -> tuple[str, str]:
    """Returns the name and the file of a class or function."""
    name = getattr(entry, "__qualname__", repr(entry))
    if _module(entry) == "__main__":  # a notebook has another file for each execution of a cell
        return name, "__main__"
    candidates = [entry]
    if isinstance(entry, type):
        candidates = [entry.__call__, *filter(inspect.isfunction, vars(entry).values())]
    codes = (getattr(inspect.unwrap(each), "__code__", None) for each in candidates)
    return name, next((code.co_filename for code in codes if code), "?")


MODELS = Registry(
    "model",
    {
        "five_block": "histo_jax.models.cnn",
        "five_block_p4m": "histo_jax.models.p4m",
        "resnet18": "histo_jax.models.resnet",
    },
)
LOSSES = Registry("loss", {"binary_cross_entropy": "histo_jax.training.losses"})
AUGMENTATIONS = Registry("augmentation", {})
SOURCES = Registry(
    "source",
    {
        "synthetic": "histo_jax.data.sources.synthetic",
        "kaggle": "histo_jax.data.sources.kaggle",
        "pcam": "histo_jax.data.sources.pcam",
        "images": "histo_jax.data.sources.images",
        "slides": "histo_jax.data.sources.slides",
    },
)


def register_model(name: str) -> Callable[[Entry], Entry]:
    """Registers a network under a name for `config.model.name`.

    A class of Flax Linen modules; a call maps images, float32[batch, height, width, 3] with mean 0
    and standard deviation 1, and `train`, a bool, to logits, float32[batch]. Its fields are set by
    `config.model.kwargs`, but for `dtype`, which becomes bfloat16 on accelerators and float32 on
    CPU. With the class attribute `is_d4_invariant = True` it is not averaged over flips and
    rotations in prediction.
    """
    return MODELS.register(name)


def register_loss(name: str) -> Callable[[Entry], Entry]:
    """Registers a loss under a name for `config.fit.loss`.

    A function of logits, float32[batch], and labels, float32[batch] from 0 to 1 (in between with
    mixup), to the loss of each example, float32[batch].
    """
    return LOSSES.register(name)


def register_augmentation(name: str) -> Callable[[Entry], Entry]:
    """Registers an augmentation under a name for `config.augment.extra`.

    A function of a random key and images, float32[batch, height, width, 3] from 0 to 255, to images
    of the same shape and range.
    """
    return AUGMENTATIONS.register(name)


def register_source(name: str) -> Callable[[Entry], Entry]:
    """Registers a source of patches under a name for `config.data.source`.

    A class that is created with `config.data`, in which `split_seed` is never None. Its method
    `splits()` returns a dict of iterables of `histo_jax.Example`: "train", and optionally
    "validation" and "test". Where an iterable has a length, the progress bar shows it.

    Its method `fingerprint()` is optional. It returns a hash of what the source reads, so that
    changed data is noticed, or None where that is not known. Without the method, the source's code
    and `data.raw_dir` identify the data. `histo_jax.data.sources` lists other optional attributes.
    """
    return SOURCES.register(name)
