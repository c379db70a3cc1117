"""Every setting: a typed field with its default, its unit, its meaning, and its limits.

Annotations are not postponed: the command line parses values by the types of the fields.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from histo_jax.config_values import (
    BELOW_ONE,
    FRACTION,
    LOCAL_PATH,
    LOCAL_PATHS,
    NOT_NEGATIVE,
    POSITIVE,
    Limit,
    at_least,
    folders,
    is_fold,
    is_json,
    names,
)
from histo_jax.registry import LOSSES, MODELS, SOURCES

_FILE_ATTRIBUTE = "_config_file"
# What `heatmap.tissue` may be besides a path.
TISSUE_WORDS = ("auto", "all")
EXPORT_FORMATS = ("onnx", "stablehlo", "safetensors", "torchscript")
_SEED = Limit(lambda value: 0 <= value < 2**31, "at least 0 and at most 2147483647")
_SEED_OR_NONE = Limit(_SEED.holds, f"{_SEED.expected}, or None")


def _metadata(help_text: str, *limits: Limit, choices: Sequence[str] = ()) -> dict[str, Any]:
    return {"help": help_text, "limits": limits, "choices": choices}


def _option(default: Any, help_text: str, *limits: Limit, choices: Sequence[str] = ()) -> Any:
    metadata = _metadata(help_text, *limits, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DataConfig:
    """The patches, where they are stored, and how they are split."""

    source: str = _option(
        "synthetic",
        f"where the patches come from: {', '.join(SOURCES.names())}, or a source that the config "
        "file registers",
    )
    raw_dir: str | None = _option(
        None,
        "folder of the downloaded files; None = use the records in tfds_dir (pcam downloads "
        "its files if there are none)",
        Limit(bool, "a folder, or None"),
        LOCAL_PATH,
    )
    tfds_dir: str = _option(
        "~/tensorflow_datasets",
        "folder of the prepared records, which take about as much space as the raw files",
        Limit(bool, "a folder"),
        LOCAL_PATH,
    )
    records: str | None = _option(
        None,
        "name of the records in tfds_dir to use, as logged; None = those of raw_dir, those of the "
        "run, or the only ones",
    )
    samples_per_class: int | None = _option(
        None,
        "labelled patches sampled from each class before the split; None = all",
        at_least(1, ", or None for all"),
    )
    table: str | None = _option(
        None,
        "table, a .csv, .tsv or .parquet file: for the images source with a column path and, where "
        "known, label, slide, patient, split; for slides with slide, annotation and, where known, "
        "patient, split, mpp; None = images.csv or slides.csv in raw_dir, else its folders",
        Limit(bool, "a file, or None"),
        LOCAL_PATH,
    )
    positive: str | None = _option(
        None,
        "name of the positive class of the images source, where labels are not 0 and 1; names of "
        "the positive annotation classes of the slides source, separated by commas",
        Limit(bool, "the name of a class, or None"),
    )
    exclude: str = _option(
        "",
        "slides: names of annotation classes whose area takes no part, separated by commas; "
        "QuPath's Ignore* never does",
    )
    min_overlap: float = _option(
        0.0,
        "slides: fraction of the label region that a positive annotation must cover, 0 to below "
        "1; at least one pixel",
        BELOW_ONE,
    )
    per_slide: int | None = _option(
        1000,
        "slides: patches of each class taken from a slide at most; None = all",
        at_least(1, ", or None for all"),
    )
    image_size: int | None = _option(
        None,
        "height and width in pixels to which the images source scales its images, and of the "
        "patches of slides: a multiple of 32 from 32 to 512; None = 96 for slides, else the "
        "images' own size, which must then be the same for all",
        Limit(
            lambda value: value % 32 == 0 and 32 <= value <= 512,
            "a multiple of 32 from 32 to 512, or None",
        ),
    )
    label_region: int | None = _option(
        None,
        "width in pixels of the square in the patch's centre that the label describes; None = 32 "
        "for kaggle, pcam, slides and synthetic, else the whole patch",
        at_least(1, ", or None"),
    )
    mpp: float | None = _option(
        None,
        "width of a pixel in micrometres; None = 0.972 for kaggle, pcam and slides, 1.0 for "
        "synthetic, else not known",
        Limit(POSITIVE.holds, f"{POSITIVE.expected}, or None"),
    )
    validation_fraction: float = _option(
        0.1, "fraction of the sampled patches in the validation split, 0 to 1", FRACTION
    )
    split_by: str = _option(
        "auto",
        "unit that is never shared between splits: patient, slide, image, auto = patient where "
        "patients are known, else slide where slides are known; the data's own splits are kept",
        choices=("auto", "patient", "slide", "image"),
    )
    split_seed: int | None = _option(
        None,
        "seed of sampling, split and synthetic slides, to compare runs that differ only in seed; "
        "None = seed",
        _SEED_OR_NONE,
    )
    fold: str | None = _option(
        None,
        "K/N: validate on fold K of N and train on the others; folds keep slides whole where "
        "slides are known; replaces validation_fraction; for pcam, divides the training split; "
        "None = no cross-validation",
        Limit(is_fold, "K/N, such as 1/5: K from 1 to N, and N at least 2"),
    )
    slide_map: str | None = _option(
        None,
        "slides of Kaggle's patches: a CSV id,wsi, or the folder of PatchCamelyon's files and "
        "_meta.csv, in which the patches are found by their pixels",
        Limit(bool, "a CSV file, a folder, or None"),
        LOCAL_PATH,
    )
    on_damaged: str = _option(
        "stop",
        "what to do about training patches that are corrupt, or missing in slide_map: stop, or "
        "skip = leave them out and list them",
        choices=("stop", "skip"),
    )
    allow_leak: bool = _option(
        False, "train even if training patches are also in the data's validation or test split"
    )
    placement: str = _option(
        "auto",
        "where fit keeps the pixels: device = in the memory of each device, host = in memory, "
        "disk = in the records, read ahead; auto = the first of these, on CPU after device, that "
        "fits into three quarters of the free memory; evaluate and predict always read the records",
        choices=("auto", "device", "host", "disk"),
    )
    synthetic_slides: int = _option(
        40, "training slides of the synthetic source; the test split has a quarter as many",
        at_least(2),
    )  # fmt: skip


@dataclasses.dataclass
class ModelConfig:
    """The network."""

    name: str = _option(
        "five_block",
        f"network: {', '.join(MODELS.names())}, or one that the config file registers",
    )
    features: tuple[int, ...] = _option(
        (32, 64, 128, 256, 512),
        "channels of the five blocks of five_block and five_block_p4m (of p4m, in each of eight "
        "orientations); each block halves height and width",
        Limit(
            lambda value: len(value) == 5 and min(value) >= 1,
            "five whole numbers, each at least 1, such as (32, 64, 128, 256, 512)",
        ),
    )
    dense: int = _option(
        1024, "units of the dense layer of five_block and five_block_p4m", at_least(1)
    )
    dropout: float = _option(
        0.4, "dropout rate of the dense layer of five_block and five_block_p4m, 0 to 1", BELOW_ONE
    )
    kwargs: dict = dataclasses.field(
        default_factory=dict,
        metadata=_metadata(
            "fields of any other network, by name, as JSON values, such as "
            '{"width": 32} for resnet18',
            Limit(is_json, "a dict of finite numbers, text, None, lists, dicts"),
        ),
    )


@dataclasses.dataclass
class AugmentConfig:
    """Random changes of training patches in each step, besides flips and quarter turns."""

    shift: int = _option(
        0, "maximal shift in pixels, 0 to 4",
        Limit(lambda value: 0 <= value <= 4, "at least 0 and at most 4"),
    )  # fmt: skip
    stain: float = _option(
        0.0, "maximal relative change of the amount of each stain, 0 to below 1", BELOW_ONE
    )
    brightness: float = _option(0.0, "maximal change of the optical density", BELOW_ONE)
    mixup: float = _option(
        0.0, "alpha of mixup, whose weights are drawn from Beta(alpha, alpha); 0 = no mixup",
        NOT_NEGATIVE,
    )  # fmt: skip
    extra: tuple[str, ...] = _option(
        (), "augmentations that the config file registers, applied in this order after the others"
    )


@dataclasses.dataclass
class OptimizerConfig:
    """Optimizer, learning-rate schedule and moving average of the weights."""

    name: str = _option(
        "adamw",
        "optimizer: adamw, or muon, which often needs fewer epochs; their learning rates are of "
        "the same size",
        choices=("adamw", "muon"),
    )
    learning_rate: float = _option(1.5e-4, "learning rate; the peak of a schedule", POSITIVE)
    schedule: str = _option(
        "constant",
        "learning rate schedule: constant, or one_cycle = cosine up to the peak and down to zero "
        "over all of fit.epochs",
        choices=("constant", "one_cycle"),
    )
    warmup: float = _option(0.3, "fraction of the steps in which one_cycle rises, 0 to 1", FRACTION)
    weight_decay: float = _option(
        0.0, "decoupled weight decay of kernels, per step and unit of learning rate", NOT_NEGATIVE
    )
    ema_decay: float = _option(
        0.0,
        "decay per step of an exponential moving average of the weights, which evaluation and "
        "prediction then use, 0 to below 1; 0 = no average",
        BELOW_ONE,
    )


@dataclasses.dataclass
class FitConfig:
    """Batches, epochs and loss of training."""

    batch_size: int = _option(64, "patches per step, over all devices together", at_least(1))
    epochs: int = _option(15, "maximal number of passes over the training patches", at_least(1))
    steps_per_epoch: int | None = _option(
        None, "steps between two validations; None = one pass over the training patches",
        at_least(1, ", or None for one pass"),
    )  # fmt: skip
    crop_epochs: int = _option(
        0, "number of first epochs that train on the centre of the patches only, in less time; the "
        "label must describe the centre, and the network take images of any size", NOT_NEGATIVE,
    )  # fmt: skip
    crop_size: int = _option(
        64, "height and width of that centre in pixels: a multiple of 32",
        Limit(lambda size: size >= 32 and size % 32 == 0, "a multiple of 32 from 32"),
    )  # fmt: skip
    loss: str = _option(
        "binary_cross_entropy",
        f"training loss: {', '.join(LOSSES.names())}, or one that the config file registers",
    )


@dataclasses.dataclass
class EarlyStoppingConfig:
    """When training stops before the last epoch."""

    patience: int = _option(
        4, "epochs without a lower validation loss after which training stops", at_least(1)
    )
    min_delta: float = _option(
        0.0, "decrease of the validation loss that counts as an improvement, in nats", NOT_NEGATIVE
    )


@dataclasses.dataclass
class CheckpointConfig:
    """When the state is saved within an epoch; it is always saved at an epoch's end."""

    every_minutes: float = _option(5.0, "maximal minutes between two checkpoints", POSITIVE)


@dataclasses.dataclass
class EvaluateConfig:
    """What `evaluate` scores."""

    split: str = _option(
        "validation", "split to score: validation, test", choices=("validation", "test")
    )
    slides: str | None = _option(
        None,
        "folder or table of annotated slides, as data.raw_dir for slides, whose maps are scored "
        "instead of the split; writes evaluation_slides.json",
        Limit(bool, "a folder, a file, or None"),
        LOCAL_PATH,
    )
    positive: str | None = _option(
        None,
        "slides: names of the positive annotation classes, separated by commas; None = as the run, "
        "Tumor where its positive class is tumour",
        Limit(bool, "the name of a class, or None"),
    )
    exclude: str | None = _option(
        None,
        "slides: names of annotation classes whose area takes no part, separated by commas; None = "
        "as the run",
    )


@dataclasses.dataclass
class PredictConfig:
    """How `evaluate`, `predict`, `report`, `explain` and `heatmap` use the trained network."""

    tta: bool = _option(
        False,
        "test-time augmentation: average the logits of the eight flips and quarter turns of a "
        "patch; takes about seven times as long; no effect on invariant networks such as "
        "five_block_p4m",
    )
    batch_size: int = _option(
        256, "patches per batch, over all local devices together", at_least(1)
    )
    checkpoints: str = _option(
        "",
        "ensemble: folders of runs, separated by commas, whose mean logit is used instead of the "
        "workdir's own network",
        LOCAL_PATHS,
    )
    images: str | None = _option(
        None,
        "predict: folder, table or image to score with the trained network instead of the test "
        "split; writes predictions.csv and predictions.json",
        Limit(bool, "a folder, a file, or None"),
        LOCAL_PATH,
    )
    prior: float | None = _option(
        None,
        "expected fraction of positives among predicted patches, 0 to 1; None = as in validation",
        Limit(FRACTION.holds, f"{FRACTION.expected}, or None"),
    )


@dataclasses.dataclass
class CompareConfig:
    """What `compare` compares."""

    runs: str = _option(
        "",
        "folders of two evaluated runs, separated by a comma",
        LOCAL_PATHS,
        Limit(lambda value: len(folders(value)) in (0, 2), "two folders, separated by a comma"),
    )


@dataclasses.dataclass
class ExplainConfig:
    """What `explain` shows."""

    ids: str = _option(
        "", "ids of patches, separated by commas; none = the patches in the report's galleries"
    )


@dataclasses.dataclass
class ExportConfig:
    """What `export` writes."""

    formats: str = _option(
        "onnx,stablehlo,safetensors",
        f"formats, separated by commas: {', '.join(EXPORT_FORMATS)} (for QuPath and WSInfer; needs "
        "the extra torch)",
        Limit(
            lambda value: bool(names(value)) and set(names(value)) <= set(EXPORT_FORMATS),
            f"one or more of {', '.join(EXPORT_FORMATS)}, separated by commas",
        ),
    )
    license: str = _option(
        "unknown",
        "license of the weights in the model card, by Hugging Face's names, such as cc-by-4.0",
        Limit(
            lambda value: bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value)),
            "a name that Hugging Face knows, such as cc-by-4.0: lower case, no blanks",
        ),
    )


@dataclasses.dataclass
class HeatmapConfig:
    """What `heatmap` makes maps of, and how."""

    slides: str = _option(
        "",
        "slides, folders of slides, and CSV files slide,mpp, separated by commas",
        LOCAL_PATHS,
    )
    mpp: float | None = _option(
        None,
        "width of a pixel of the slides in micrometres, instead of what the files state; None = "
        "as the files state",
        Limit(POSITIVE.holds, f"{POSITIVE.expected}, or None"),
    )
    tissue: str = _option(
        "auto",
        "where cells are computed: auto = where the slide is stained, all, a mask image, a GeoJSON "
        "of QuPath, or a folder of such files with the slides' names",
        Limit(bool, "auto, all, a file or a folder"),
        LOCAL_PATH,
    )
    min_tissue_area: float = _option(
        4_000.0, "auto: smallest piece of tissue in square micrometres", NOT_NEGATIVE
    )
    max_hole_area: float = _option(
        4_000.0, "auto: largest hole in tissue that is filled, in square micrometres", NOT_NEGATIVE
    )
    threshold: float | None = _option(
        None,
        "probability from which a cell is positive, 0 to 1; None = that of 95% specificity in "
        "validation, 0.5 where the run was not evaluated",
        Limit(FRACTION.holds, f"{FRACTION.expected}, or None"),
    )
    stride: int | None = _option(
        None,
        "distance of two cells in pixels of the network's scale, a multiple of the cell; None = "
        "the cell, which is data.label_region, or the whole patch",
        at_least(1, ", or None for the cell"),
    )


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The Python file that settings come from.

    Attributes:
        path: absolute.
        recipe: its name, if it is one of the package's recipes.
        argument: passed to its `get_config`, if any.
        code_hash: SHA-256 of the code in it that registers or changes something; '' if none does.
    """

    path: str
    recipe: str | None = None
    argument: str | None = None
    code_hash: str = ""


@dataclasses.dataclass
class Config:
    """All settings of one run."""

    seed: int = _option(
        0, "seed of sampling, split, order, initial weights, augmentation and dropout", _SEED
    )
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
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    heatmap: HeatmapConfig = dataclasses.field(default_factory=HeatmapConfig)

    @property
    def data_seed(self) -> int:
        """The seed of sampling, split and synthetic slides."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @property
    def config_file(self) -> ConfigFile | None:
        """The file that these settings come from; not a setting itself."""
        return vars(self).get(_FILE_ATTRIBUTE)

    @config_file.setter
    def config_file(self, file: ConfigFile | None) -> None:
        vars(self)[_FILE_ATTRIBUTE] = file


def settings_of(node: Any) -> dict[str, Any]:
    """Returns all attributes of a config or one of its groups that are settings, by name."""
    return {name: value for name, value in vars(node).items() if name != _FILE_ATTRIBUTE}


def fields() -> dict[str, dataclasses.Field]:
    """Returns the field of every setting by its dotted name, as in 'fit.batch_size', in order."""

    def walk(kind: Any, prefix: str) -> Iterator[tuple[str, dataclasses.Field]]:
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(field.type):
                yield from walk(field.type, f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, field

    return dict(walk(Config, ""))


def flat(config: Config) -> dict[str, Any]:
    """Returns every setting by its dotted name, as in `{'fit.batch_size': 64}`."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in fields()}


def set_field(config: Config, name: str, value: Any) -> None:
    """Sets the setting with this dotted name."""
    *groups, field = name.split(".")
    setattr(functools.reduce(getattr, groups, config), field, value)


def describe() -> list[tuple[str, Any, str]]:
    """Returns `(dotted name, default, help)` of every setting, in order."""
    defaults = flat(Config())
    return [(name, defaults[name], field.metadata["help"]) for name, field in fields().items()]
