"""Who trains and who validates."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from histo_jax.config import Config, DataConfig, parse_fold
from histo_jax.data.example import IMAGE_SIZE
from histo_jax.data.names import identity
from histo_jax.data.records import SQUARES, SUMS
from histo_jax.errors import UserError

log = logging.getLogger("histo_jax")


class Subset(NamedTuple):
    """Examples on one side.

    Attributes:
        records: name of the records that they lie in.
        rows: int64[n], ascending rows of these records.
    """

    records: str
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Subsets:
    """Who trains, who validates, who tests.

    Attributes:
        train: examples to train on.
        validation: examples that choose the checkpoint; none of them is in `train`.
        test: examples to predict; None where the data has none.
        by: 'slide' where no slide is on two sides, 'image' where only no image is, 'official' where
            the data's own split was kept and its slides cannot be compared.
        honest: whether the validation score speaks of slides that training has not seen; None = not
            known. Of a random division by image it is known that it does not.
    """

    train: Subset
    validation: Subset
    test: Subset | None
    by: str
    slide_disjoint: bool | None

    @property
    def division(self) -> str:
        """How training and validation were divided, in words."""
        if self.slide_disjoint is not None:
            return f"by {self.by}"
        if self.by == "official":
            return "by the data's own split, slides not checked"
        return "by image, for each patch names a slide of its own"


UNCHECKED = (
    "whether patches of one slide are in training and are scored was not checked: not all patches "
    "name their slide, or each names one of its own"
)
OPTIMISTIC = (
    "the score is optimistic: slides are not known, not used or on both sides, so neighbours of "
    "one slide train and are scored"
)


def caveat(slide_disjoint: bool | None) -> str:
    """Returns what must be said beside a score; '' where nothing must."""
    return "" if slide_disjoint else UNCHECKED if slide_disjoint is None else OPTIMISTIC


def combine(slide_disjoint: Iterable[bool | None]) -> bool | None:
    """Returns what holds for all together: false where one is false, else None where one is."""
    values = list(slide_disjoint)
    return False if False in values else None if None in values else True


def make_subsets(tables: dict[str, pd.DataFrame], config: Config) -> Subsets:
    """Draws the balanced sample and divides it, by `config.data_seed` alone; official splits rule.

    Args:
        tables: per split the columns `id`, `label` (0 or 1) and `slide` ('' = not known); see
            `builder.Prepared`. Where there is a 'validation', it validates whole, unless
            `data.fold` divides the training patches instead.
        config: `data.samples_per_class`, `data.validation_fraction`, `data.split_by` and
            `data.fold` rule.

    Raises:
        UserError: slides are asked for but not known, or a side lacks a class.
    """
    table, by = tables["train"], _unit(tables, config.data)
    sample = draw_sample(tables, config)
    if by == "official":
        train, validation = sample, Subset("validation", np.arange(len(tables["validation"])))
        slide_disjoint = disjoint((table, train.rows), (tables["validation"], validation.rows))
        by = {True: "slide", False: "image", None: "official"}[slide_disjoint]
    else:
        labels, slides = (table[name].to_numpy()[sample.rows] for name in ("label", "slide"))
        inside = _validation(labels, slides if by == "slide" else None, config)
        train, validation = (Subset("train", sample.rows[rows]) for rows in (~inside, inside))
        slide_disjoint = by == "slide"
        if slide_disjoint and not has_slide_names(table):
            by, slide_disjoint = "image", None
    test = Subset("test", np.arange(len(tables["test"]))) if "test" in tables else None
    for name, subset in (("training", train), ("validation", validation)):
        counts = np.bincount(tables[subset.records]["label"].iloc[subset.rows], minlength=2)
        if counts.min() == 0:
            raise UserError(
                f"the {name} set has {counts[0]} patches without and {counts[1]} with tumour, and "
                "needs both classes: give more patches of the other"
            )
    return Subsets(train, validation, test, by, slide_disjoint)


def _unit(tables: dict[str, pd.DataFrame], data: DataConfig) -> str:
    """Returns what is kept whole: 'official' = the data's own split, 'slide' or 'image'."""
    is_official = "validation" in tables and data.fold is None
    slides_known = bool((tables["train"]["slide"] != "").any())
    if data.split_by == "slide" and not (slides_known or is_official):
        raise UserError(
            "config.data.split_by = 'slide', but this data names no slides: give "
            "config.data.slide_map, or use 'auto' or 'image'"
        )
    if is_official:
        return "official"
    return "slide" if slides_known and data.split_by != "image" else "image"


def draw_sample(tables: dict[str, pd.DataFrame], config: Config) -> Subset:
    """Returns what is drawn of the training patches before they are divided; see `make_subsets`."""
    labels, slides = (tables["train"][name].to_numpy() for name in ("label", "slide"))
    # An example of an unknown slide has no side on which it is safe.
    is_safe = slides != "" if _unit(tables, config.data) == "slide" else np.ones(len(labels), bool)
    rows = np.flatnonzero(is_safe)
    chosen = _sample(labels[rows], config.data.samples_per_class, config.data_seed)
    return Subset("train", rows[chosen])


def has_slide_names(table: pd.DataFrame) -> bool:
    """Whether the names in `slide` can be slides': most patches share theirs with another.

    Where each patch names one of its own, it is some other identifier, and divides nothing.
    """
    counts = table["slide"][table["slide"] != ""].value_counts()
    return bool((counts == 1).sum() <= counts.sum() / 2)


def disjoint(
    first: tuple[pd.DataFrame, np.ndarray], second: tuple[pd.DataFrame, np.ndarray]
) -> bool | None:
    """Tells whether two sides share no slide and no pixels; None = not all slides are known.

    Args:
        first: the whole table of its records, and the rows of the side.
        second: likewise.
    """
    subsets = [table.iloc[rows] for table, rows in (first, second)]
    if share(*subsets):
        return False
    are_known = all((subset["slide"] != "").all() for subset in subsets)
    return (
        True if are_known and all(has_slide_names(table) for table, _ in (first, second)) else None
    )


def share(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Tells whether two parts of tables have a slide, or pixels of more than one colour, in common.

    Args:
        first: columns as in `make_subsets`.
        second: likewise.
    """
    slides = set(slide_identities(first)) & set(slide_identities(second)) - {""}
    return bool(slides) or not shared_ids(first, second).empty


def slide_identities(table: pd.DataFrame) -> pd.Series:
    """Returns for each patch what all spellings of its slide have in common."""
    return table["slide"].map({name: identity(name) for name in table["slide"].unique()})


def shared_ids(first: pd.DataFrame, second: pd.DataFrame) -> pd.Series:
    """Returns the ids of `first` that `second` has, too, but for patches of one colour.

    Empty glass of two slides can be equal by chance. For the arguments see `share`.
    """
    found = first[first["id"].isin(second["id"])]
    sums, squares = (found[list(names)].to_numpy() for names in (SUMS, SQUARES))
    one_colour = (sums**2 == IMAGE_SIZE * IMAGE_SIZE * squares).all(axis=1)
    return found["id"][~one_colour]


def _sample(labels: np.ndarray, per_class: int | None, seed: int) -> np.ndarray:
    """Rows of at most `per_class` examples of each class, ascending."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        if per_class is not None and per_class > len(rows):
            log.warning(
                "class %d has %d patches, fewer than config.data.samples_per_class = %d: "
                "all of them are taken",
                label, len(rows), per_class,
            )  # fmt: skip
        elif per_class is not None:
            rows = rng.choice(rows, per_class, replace=False)
        chosen.append(rows)
    return np.sort(np.concatenate(chosen))


def _validation(labels: np.ndarray, slides: np.ndarray | None, config: Config) -> np.ndarray:
    """Returns which of the examples validate, bool[n]; by slide where `slides` are given."""
    data, seed = config.data, config.data_seed
    if data.fold:
        return _fold(labels, slides, data.fold, seed)
    if slides is None:
        return _validation_by_image(labels, data.validation_fraction, seed)
    return _validation_by_slide(labels, slides, data.validation_fraction, seed)


def _fold(labels: np.ndarray, slides: np.ndarray | None, fold: str, seed: int) -> np.ndarray:
    """The examples of one fold; all folds are looked at, so that no run begins in vain."""
    number, folds = parse_fold(fold)
    counts = {"patches without": (labels == 0).sum(), "patches with tumour": (labels == 1).sum()}
    if slides is not None:
        counts["slides"] = len(np.unique(slides))
    for what, count in counts.items():
        if count < folds:
            raise UserError(
                f"config.data.fold = {fold!r} asks for {folds} folds, and there are {count} "
                f"{what}: choose fewer folds"
            )
    splitter = (StratifiedKFold if slides is None else StratifiedGroupKFold)(
        folds, shuffle=True, random_state=seed
    )
    divided = [rows for _, rows in splitter.split(labels, labels, slides)]
    for other, rows in enumerate(divided, start=1):
        if len(np.unique(labels[rows])) < 2:
            raise UserError(
                f"fold {other} of config.data.fold = {fold!r} has patches of one class only: "
                "choose fewer folds, or another config.data.split_seed"
            )
    return np.isin(np.arange(len(labels)), divided[number - 1])


def _validation_by_image(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    inside = np.zeros(len(labels), bool)
    try:
        _, rows = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise UserError(
            f"{len(labels)} patches cannot be divided by config.data.validation_fraction = "
            f"{fraction} with both classes on both sides ({error})"
        ) from None
    inside[rows] = True
    return inside


def _validation_by_slide(
    labels: np.ndarray, slides: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Whole slides, as many and as balanced as they allow.

    scikit-learn divides into equal folds only, so `fraction` is met by some of several folds.
    """
    count = len(np.unique(slides))
    if count < 2:
        raise UserError(f"all patches come from {count} slide: set --config.data.split_by=image")
    _, folds, wanted = min(
        (abs(some / folds - fraction), folds, some)
        for folds in range(2, min(20, count) + 1)
        for some in range(1, folds)
    )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    inside = np.zeros(len(labels), bool)
    for _, rows in list(splitter.split(labels, labels, slides))[:wanted]:
        inside[rows] = True
    return inside


def channel_stats(table: pd.DataFrame, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel over all pixels of the given examples.

    Exact integer sums make the result independent of the order.

    Returns:
        Two float32[3], in units of the full range (0 = black, 1 = full).
    """
    pixels = len(rows) * IMAGE_SIZE * IMAGE_SIZE
    chosen = table.iloc[rows]
    mean = chosen[list(SUMS)].sum().to_numpy(np.float64) / pixels
    square = chosen[list(SQUARES)].sum().to_numpy(np.float64) / pixels
    # A training set of one flat colour would otherwise divide by zero.
    std = np.sqrt(np.maximum(square - mean**2, 1.0))
    return (mean / 255).astype(np.float32), (std / 255).astype(np.float32)


def fingerprint(tables: dict[str, pd.DataFrame], subsets: Subsets, config: Config) -> str:
    """Returns a SHA-256 of everything that decides which example comes at which step."""
    digest = hashlib.sha256(f"{config.seed} {config.fit.batch_size}".encode())
    for subset in (subsets.train, subsets.validation):
        digest.update("\n".join(["", *tables[subset.records]["id"].iloc[subset.rows]]).encode())
    return digest.hexdigest()


def check_fingerprint(
    known: str, tables: dict[str, pd.DataFrame], subsets: Subsets, config: Config
) -> None:
    """Refuses examples that are not those a run has trained on.

    Args:
        known: `fingerprint` of the run's examples.
        tables: see `make_subsets`.
        subsets: drawn from them.
        config: that of the run.

    Raises:
        UserError: names the folder.
    """
    if known != fingerprint(tables, subsets, config):
        raise UserError(
            f"{config.data.tfds_dir} no longer holds the examples that this run began with, or "
            "config.data.slide_map has changed: restore them or choose another --workdir"
        )


def refuse_leak(tables: dict[str, pd.DataFrame], subsets: Subsets, allow: bool) -> None:
    """Refuses to train on pixels that are also in the test set; the ids are the pixels' SHA-1.

    Patches of a single colour are passed over.

    Raises:
        UserError: there are some, and `allow` is false.
    """
    if subsets.test is None:
        return
    train = tables[subsets.train.records].iloc[subsets.train.rows]
    shared = shared_ids(train, tables[subsets.test.records].iloc[subsets.test.rows])
    if shared.empty:
        return
    found = f"{len(shared)} training patches are also test patches, the first is {shared.iloc[0]}"
    if not allow:
        raise UserError(
            f"{found}: remove them, or set --config.data.allow_leak=true and trust no test score"
        )
    log.warning("LEAK: %s; config.data.allow_leak is set, so no test score can be trusted", found)
