"""Every setting as a typed field with its unit and reason, and the check of all of them.

Field types stay real objects (no postponed annotations): the command line parses by them.
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from histo_jax.errors import UserError, closest
from histo_jax.registry import AUGMENTATIONS, LOSSES, MODELS, Registry

SOURCES = ("synthetic", "kaggle", "pcam")
ON_DAMAGED = ("stop", "skip")
PLACEMENTS = ("auto", "device", "host", "disk")
SCHEDULES = ("constant", "one_cycle")
SPLIT_RULES = ("auto", "slide", "image")
EVALUATION_SPLITS = ("validation", "test")

# Of a URL's two slashes `pathlib` keeps one. `user@host:/` is scp's.
_URL = re.compile(
    r"[a-z][a-z0-9+.-]+://|[^/]+@[^/]+:/|"
    r"(abfss?|adl|az|dbfs|file|ftps?|gcs|gs|hdfs|hf|https?|memory|oss|s3[an]?|sftp|ssh|wasbs?):/",
    re.IGNORECASE,
)
NO_URL = "a folder, not a URL: mount the bucket or copy it, and give the path"


def names(text: str) -> list[str]:
    """Returns what stands between the commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def folders(text: str) -> list[str]:
    """Returns the folders that `text` lists, separated by commas.

    A folder whose own name has commas is found where it exists; of several readings the longest
    name wins, and a slash at its end (`a/,b`) ends a name before.
    """
    pieces, found = text.split(","), []
    while pieces:
        for count in range(len(pieces), 0, -1):
            name = ",".join(pieces[:count])
            # Blanks around a name belong to it only where there is such a folder.
            name = name if _is_folder(name) else name.strip()
            if count == 1 or _is_folder(name):
                break
        found.append(name)
        pieces = pieces[count:]
    return [name for name in found if name]


def _is_folder(name: str) -> bool:
    try:
        return bool(name.strip()) and Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, no such home, not a path
        return False


def is_url(path: str) -> bool:
    """Whether `path` is the address of a bucket or a server, and no path of this machine."""
    return bool(_URL.match(path.strip()))


def parse_fold(fold: str) -> tuple[int, int]:
    """Returns K and N of 'K/N'.

    Raises:
        ValueError: it is not of this form, or K is not from 1 to N, or N is below 2.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", fold, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]) or int(match[2]) < 2:
        raise ValueError(fold)
    return int(match[1]), int(match[2])


def _is_fold(fold: str) -> bool:
    try:
        return bool(parse_fold(fold))
    except ValueError:
        return False


def _option(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass
class DataConfig:
    """Which patches, where they lie, and who trains and who validates."""

    source: str = _option("synthetic", f"where the patches come from: {', '.join(SOURCES)}")
    raw_dir: str | None = _option(
        None,
        "folder of the raw files as downloaded; None = use what is already in tfds_dir, "
        "for pcam after downloading it",
    )
    tfds_dir: str = _option(
        "~/tensorflow_datasets", "folder for the prepared records; about the size of the raw files"
    )
    records: str | None = _option(
        None,
        "name of the prepared records in tfds_dir to use, as the log gives it; None = those of "
        "raw_dir, of the run, or the only ones",
    )
    samples_per_class: int | None = _option(
        None, "labelled patches drawn from each class before the split; None = all"
    )
    validation_fraction: float = _option(0.1, "share of the drawn patches that validates, 0 to 1")
    split_by: str = _option(
        "auto",
        "keep whole slides, or only whole images, on one side: slide, image, "
        "auto = slide where slides are known; pcam's official splits are kept",
    )
    split_seed: int | None = _option(
        None,
        "seed of sampling, split and synthetic slides, for runs that differ in seed alone; "
        "None = seed",
    )
    fold: str | None = _option(
        None,
        "K/N: validate on fold K of N, by slide where slides are known, and train on the others; "
        "validation_fraction is not used; of pcam the training split is divided. None = no folds",
    )
    slide_map: str | None = _option(
        None,
        "slides of Kaggle's patches: a CSV id,wsi, or a folder with PatchCamelyon's files and "
        "their _meta.csv, in which the patches are looked up by their pixels",
    )
    on_damaged: str = _option(
        "stop",
        "training patches that are damaged, or missing in slide_map: stop, or skip = leave them "
        "out and list them",
    )
    allow_leak: bool = _option(False, "train even on patches that are in the test set")
    placement: str = _option(
        "auto",
        "where fit keeps the pixels of both sides: device = in the memory of each device, "
        "host = in memory, disk = in the records, read ahead; auto = the first of them that fits "
        "into three quarters of what is free. evaluate and predict make one pass, from the records",
    )
    synthetic_slides: int = _option(
        40, "slides that the synthetic source draws for training; a quarter as many for the test"
    )


@dataclasses.dataclass
class ModelConfig:
    """The network."""

    name: str = _option(
        "five_block",
        f"network: {', '.join(MODELS.names())}, or one that the config file registers",
    )
    features: tuple[int, ...] = _option(
        (32, 64, 128, 256, 512),
        "channels of each block, for five_block_p4m in each of eight orientations; every block "
        "halves height and width",
    )
    dense: int = _option(1024, "units of the dense layer before the logit")
    dropout: float = _option(0.4, "share of the dense units dropped in training, 0 to 1")
    kwargs: dict = dataclasses.field(
        default_factory=dict,
        metadata={
            "help": "fields of any other network than five_block and five_block_p4m, by name, as "
            'JSON values, such as {"width": 32} for resnet18'
        },
    )


@dataclasses.dataclass
class AugmentConfig:
    """What is done to training patches besides flips and quarter turns, anew in every step."""

    shift: int = _option(0, "pixels by which a patch is moved at most, 0 to 4")
    stain: float = _option(
        0.0, "share by which the amount of each dye is changed at most, 0 to below 1"
    )
    brightness: float = _option(0.0, "optical density that is added or taken at most")
    mixup: float = _option(
        0.0, "patches are mixed in pairs by shares from Beta(this, this); 0 = they are not"
    )
    extra: tuple[str, ...] = _option(
        (), "augmentations that the config file registers, applied in this order after the others"
    )


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = _option(1.5e-4, "step size, per step; the peak of a schedule")
    schedule: str = _option(
        "constant",
        "how the step size changes: constant, or one_cycle = up to the peak and down to nothing "
        "by cosines, over all of fit.epochs",
    )
    warmup: float = _option(0.3, "share of the steps in which one_cycle goes up, 0 to 1")
    weight_decay: float = _option(
        0.0, "share of each kernel that is taken off per step, times the step size"
    )
    ema_decay: float = _option(
        0.0,
        "predict with a moving average of the weights, of which each step keeps this share, 0 to "
        "below 1; 0 = with the weights themselves",
    )


@dataclasses.dataclass
class FitConfig:
    """How much is trained at once and for how long."""

    batch_size: int = _option(64, "patches in one step, over all devices together")
    epochs: int = _option(15, "passes over the training patches at most")
    steps_per_epoch: int | None = _option(
        None, "steps between two validations; None = one pass over the training patches"
    )
    loss: str = _option(
        "binary_cross_entropy",
        f"what training minimises: {', '.join(LOSSES.names())}, or one that the config file "
        "registers",
    )


@dataclasses.dataclass
class EarlyStoppingConfig:
    """When training ends before its last epoch."""

    patience: int = _option(4, "epochs without a better validation loss before training stops")
    min_delta: float = _option(0.0, "a loss must be lower than the best by more than this, nats")


@dataclasses.dataclass
class CheckpointConfig:
    """When the state is saved, besides each epoch's end."""

    every_minutes: float = _option(5.0, "minutes between two saves at most")


@dataclasses.dataclass
class EvaluateConfig:
    """What `evaluate` scores."""

    split: str = _option("validation", f"which side: {', '.join(EVALUATION_SPLITS)}")


@dataclasses.dataclass
class PredictConfig:
    """How `predict` runs, and `evaluate` alike."""

    tta: bool = _option(
        False,
        "test-time averaging: the mean of the logits of a patch's eight flips and quarter turns, "
        "for about seven times the time; five_block_p4m gives all eight the same",
    )
    batch_size: int = _option(
        256, "patches in one call of predict, over all local devices together"
    )
    checkpoints: str = _option(
        "",
        "folders of runs, separated by commas, whose equal mean is used instead of the workdir's "
        "own network; the name of a folder that exists may hold commas, too",
    )
    prior: float | None = _option(
        None,
        "share of tumour among the patches that predict is for, 0 to 1; None = as in validation",
    )


@dataclasses.dataclass
class CompareConfig:
    """What `compare` compares."""

    runs: str = _option("", "folders of two runs that `evaluate` has scored, separated by a comma")


@dataclasses.dataclass
class ExplainConfig:
    """What `explain` shows."""

    ids: str = _option(
        "", "ids of patches, separated by commas; none = those of the report's galleries"
    )


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The Python file that settings come from.

    Attributes:
        path: absolute.
        recipe: its name, if it is one of the package's.
        argument: of `get_config`, if it was given one.
        code_hash: SHA-256 of the code in it that registers or changes something; '' without any.
    """

    path: str
    recipe: str | None = None
    argument: str | None = None
    code_hash: str = ""


@dataclasses.dataclass
class Config:
    """All settings of one run."""

    seed: int = _option(0, "seed of everything random: sampling, split, order, weights, dropout")
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    early_stopping: EarlyStoppingConfig = dataclasses.field(default_factory=EarlyStoppingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    predict: PredictConfig = dataclasses.field(default_factory=PredictConfig)
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    explain: ExplainConfig = dataclasses.field(default_factory=ExplainConfig)

    @property
    def data_seed(self) -> int:
        """The seed of sampling, split and synthetic slides."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @property
    def config_file(self) -> ConfigFile | None:
        """The file that these settings come from; not a setting itself."""
        return vars(self).get(_CONFIG_FILE)

    @config_file.setter
    def config_file(self, file: ConfigFile | None) -> None:
        vars(self)[_CONFIG_FILE] = file


_CONFIG_FILE = "_config_file"  # attribute that is not a field
_FRACTION = "above 0 and below 1"
_BELOW_ONE = "at least 0 and below 1"
_NOT_NEGATIVE = "at least 0 and finite"
_POSITIVE = "above 0 and finite"

# The fields that take one of a few words.
_CHOICES: dict[str, tuple[str, ...]] = {
    "data.source": SOURCES,
    "data.split_by": SPLIT_RULES,
    "data.on_damaged": ON_DAMAGED,
    "data.placement": PLACEMENTS,
    "optimizer.schedule": SCHEDULES,
    "evaluate.split": EVALUATION_SPLITS,
}

# The limits, each `(field, holds, what it must be)`; fields that are None have no limit.
_LIMITS: tuple[tuple[str, Any, str], ...] = (
    ("seed", lambda v: 0 <= v < 2**31, "at least 0 and at most 2147483647"),
    ("data.raw_dir", bool, "a folder, or None"),
    ("data.tfds_dir", bool, "a folder"),
    ("data.samples_per_class", lambda v: v >= 1, "at least 1, or None for all"),
    ("data.validation_fraction", lambda v: 0 < v < 1, _FRACTION),
    ("data.split_seed", lambda v: 0 <= v < 2**31, "at least 0 and at most 2147483647, or None"),
    ("data.fold", _is_fold, "K/N, such as 1/5: K from 1 to N, and N at least 2"),
    ("data.slide_map", bool, "a CSV file, a folder, or None"),
    ("data.synthetic_slides", lambda v: v >= 2, "at least 2"),
    (
        "model.features",
        lambda v: len(v) == 5 and min(v) >= 1,
        "five whole numbers, each at least 1, such as (32, 64, 128, 256, 512)",
    ),
    ("model.dense", lambda v: v >= 1, "at least 1"),
    ("model.dropout", lambda v: 0 <= v < 1, _BELOW_ONE),
    ("model.kwargs", lambda v: _is_json(v), "a dict of finite numbers, text, None, lists, dicts"),
    ("augment.shift", lambda v: 0 <= v <= 4, "at least 0 and at most 4"),
    ("augment.stain", lambda v: 0 <= v < 1, _BELOW_ONE),
    ("augment.brightness", lambda v: 0 <= v < 1, _BELOW_ONE),
    ("augment.mixup", lambda v: 0 <= v < math.inf, _NOT_NEGATIVE),
    ("optimizer.learning_rate", lambda v: 0 < v < math.inf, _POSITIVE),
    ("optimizer.warmup", lambda v: 0 < v < 1, _FRACTION),
    ("optimizer.weight_decay", lambda v: 0 <= v < math.inf, _NOT_NEGATIVE),
    ("optimizer.ema_decay", lambda v: 0 <= v < 1, _BELOW_ONE),
    ("fit.batch_size", lambda v: v >= 1, "at least 1"),
    ("fit.epochs", lambda v: v >= 1, "at least 1"),
    ("fit.steps_per_epoch", lambda v: v >= 1, "at least 1, or None for one pass"),
    ("early_stopping.patience", lambda v: v >= 1, "at least 1"),
    ("early_stopping.min_delta", lambda v: 0 <= v < math.inf, _NOT_NEGATIVE),
    ("checkpoint.every_minutes", lambda v: 0 < v < math.inf, _POSITIVE),
    ("predict.batch_size", lambda v: v >= 1, "at least 1"),
    ("predict.prior", lambda v: 0 < v < 1, f"{_FRACTION}, or None"),
    ("data.raw_dir", lambda v: not is_url(v), NO_URL),
    ("data.tfds_dir", lambda v: not is_url(v), NO_URL),
    ("data.slide_map", lambda v: not is_url(v), NO_URL),
    ("predict.checkpoints", lambda v: not any(map(is_url, names(v))), NO_URL),
    ("compare.runs", lambda v: not any(map(is_url, names(v))), NO_URL),
    ("compare.runs", lambda v: len(folders(v)) in (0, 2), "two folders, separated by a comma"),
)


def flat(config: Config) -> dict[str, Any]:
    """Returns every setting by its dotted name, as in `{'fit.batch_size': 64}`."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, value

    return dict(walk(config, ""))


def set_field(config: Config, name: str, value: Any) -> None:
    """Sets the setting with this dotted name."""
    *groups, field = name.split(".")
    setattr(functools.reduce(getattr, groups, config), field, value)


def describe() -> list[tuple[str, Any, str]]:
    """Returns `(dotted name, default, help)` of every setting, in order."""
    defaults = flat(Config())

    def walk(kind: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(field.type):
                yield from walk(field.type, f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, defaults[prefix + field.name], field.metadata["help"]

    return list(walk(Config, ""))


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the annotated type; a type that cannot be checked fits any value."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, option) for option in options)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in options)
    if origin is tuple and options[-1] is not ...:
        return isinstance(value, tuple) and _all_fit(value, options)
    if origin in (tuple, list, Sequence):
        return isinstance(value, tuple) and _all_fit(value, options[:1] * len(value))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    try:
        return isinstance(value, tuple if kind is list else origin or kind)
    except TypeError:
        return True


def _all_fit(values: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    return len(values) == len(kinds) and all(map(fits, values, kinds))


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    is_number = isinstance(value, float) and math.isfinite(value)
    return is_number or value is None or isinstance(value, bool | int | str)


_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a dict",
    types.NoneType: "None",
    tuple[int, ...]: "five whole numbers such as (32, 64, 128, 256, 512)",
    tuple[str, ...]: "a tuple of text such as ('blur', 'noise')",
}


def type_name(kind: Any) -> str:
    """Returns a field's type in words, as in 'a whole number or None'."""
    if isinstance(kind, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(kind)))
    return _TYPE_NAMES.get(kind) or f"of type {kind.__name__}"


def likely_field(name: str) -> str | None:
    """Returns the dotted name of the field that a name that is not a field's most likely means."""
    known = [field for field, _, _ in describe()]
    group, _, rest = name.partition(".")
    same_last = [f for f in known if f.rpartition(".")[2] == name.rpartition(".")[2].lower()]
    if same_last:
        return same_last[0]
    siblings = _fields_of(group)
    if not siblings:
        return closest(name, known, cutoff=0.75)
    match = closest(rest, siblings)
    return f"{group}.{match}" if match else None


def _fields_of(group: str) -> list[str]:
    known = (field for field, _, _ in describe())
    return [field.partition(".")[2] for field in known if field.startswith(f"{group}.")]


def unknown_field(name: str) -> str:
    """Returns the message about a dotted name that is no field's, with what is likely meant."""
    match, group = likely_field(name), name.partition(".")[0]
    hint = ""
    if match:
        hint = f"; did you mean config.{match}?"
    elif siblings := _fields_of(group):
        hint = f"; config.{group} has {', '.join(siblings)}"
    return f"unknown config field: config.{name}{hint} (see --help)"


def check_types(node: Any, prefix: str = "") -> None:
    """Checks that settings have the fields of their class and each a value of its type.

    Args:
        node: a `Config`, or one of its groups.
        prefix: of the group's fields, as in `fit.`.

    Raises:
        UserError: names the field.
    """
    # A subclass of the user's own may have other defaults, not other fields.
    own = next(kind for kind in type(node).__mro__ if kind.__module__ == __name__)
    unknown = vars(node).keys() - {field.name for field in dataclasses.fields(own)} - {_CONFIG_FILE}
    if unknown:
        raise UserError(unknown_field(prefix + min(unknown)))
    for field in dataclasses.fields(own):
        value = getattr(node, field.name)
        if not fits(value, field.type):
            known = type(value) in (*_TYPE_NAMES, tuple)
            but = "" if known else f", not {type_name(type(value))}"
            raise UserError(
                f"config.{prefix}{field.name} = {value!r} must be {type_name(field.type)}{but}"
            )
        if dataclasses.is_dataclass(field.type):
            check_types(value, f"{prefix}{field.name}.")


def validate(config: Config, typed: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """Checks every setting's type and range.

    Args:
        config: the settings.
        typed: values as the user typed them, by dotted name, which messages then show.

    Raises:
        UserError: names the first field that is wrong, its value and what it must be.
    """
    if not isinstance(config, Config):
        raise UserError(
            f"the config is a {type(config).__name__}; get_config() must return histo_jax.Config"
        )
    check_types(config)
    values = flat(config)
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            match = closest(values[name], choices)
            hint = f"; did you mean {match}?" if match else ""
            raise UserError(
                f"config.{name} = {values[name]!r} must be one of {', '.join(choices)}{hint}"
            )
    for name, holds, wanted in _LIMITS:
        if values[name] is not None and not holds(values[name]):
            value = typed.get(name) or repr(values[name])
            raise UserError(f"config.{name} = {value} must be {wanted}")
    for registry, field, name in _registered_names(config):
        registry.check(field, name)


def unregistered(config: Config) -> list[tuple[str, str]]:
    """Returns the field and the name of what a config names and nobody has registered."""
    return [
        (f, name) for registry, f, name in _registered_names(config) if name not in registry.names()
    ]


def _registered_names(config: Config) -> list[tuple[Registry, str, str]]:
    return [
        (MODELS, "model.name", config.model.name),
        (LOSSES, "fit.loss", config.fit.loss),
        *((AUGMENTATIONS, "augment.extra", name) for name in config.augment.extra),
    ]
