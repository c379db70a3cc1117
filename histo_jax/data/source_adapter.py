"""Runs a registered source: optional attributes, and one-line errors for what it does wrong."""

import contextlib
import dataclasses
import hashlib
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from histo_jax.config import DataConfig
from histo_jax.data.example import (
    SIZES,
    SPLITS,
    UNLABELLED,
    Example,
    PatchSpec,
    SizedExamples,
)
from histo_jax.errors import DataError, UserError, did_you_mean, one_line
from histo_jax.registry import SOURCES
from histo_jax.run import files

# Names of label 0 and label 1 where neither the settings nor the source give any.
_CLASSES = ("negative", "positive")
# Sources that `data.table` lists.
_LISTED = ("images", "slides")
# The name is part of the name of a folder.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class SourceAdapter:
    """A source as the records need it, with every optional attribute.

    Sources of the package are trusted: their exceptions are bugs and keep their traceback, and
    their examples are not checked.

    Args:
        data: settings; a `split_seed` of None becomes `seed`.
        seed: of the data.

    Attributes:
        name: under which the source is registered.
        is_built_in: whether it belongs to the package. The ids of such sources are the SHA-1 of
            the pixels.

    Raises:
        DataError: the source refuses the settings or raises.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        self.name = data.source
        self.is_built_in = SOURCES.is_built_in(self.name)
        if not _NAME.fullmatch(self.name):
            raise DataError(
                f"source {self.name!r}: the name becomes part of a folder's name; use letters, "
                "digits, '_', '.' and '-' only"
            )
        self._data = dataclasses.replace(data, split_seed=seed)
        with self._errors("the constructor"):
            self._source = SOURCES.get(self.name)(self._data)

    @property
    def corrupt(self) -> dict[str, str]:
        """The reason for each file that was left out, by path."""
        return dict(getattr(self._source, "corrupt", None) or {})

    @property
    def origin(self) -> str:
        """The data in words: the folder or, without one, what the source says."""
        if self._data.raw_dir:
            return str(Path(self._data.raw_dir).expanduser().absolute())
        return str(getattr(self._source, "origin", f"source {self.name!r}"))

    @property
    def content(self) -> str:
        """What the fingerprint covers, for messages."""
        if self.is_built_in:
            return "data"
        has_fingerprint = hasattr(self._source, "fingerprint")
        return "data or code" if has_fingerprint else "code or another data.raw_dir"

    def fingerprint(self) -> str | None:
        """Returns the hash of the data and of a user's code that reads it; None = not known.

        Raises:
            DataError: the data cannot be read.
        """
        size = f"\n{self._data.image_size}" if self._data.image_size else ""
        if not hasattr(self._source, "fingerprint"):
            return self._with_code(f"{self._data.raw_dir and self.origin}{size}")
        with self._errors("fingerprint()"):
            fingerprint = self._source.fingerprint()
        if fingerprint is not None and not isinstance(fingerprint, str):
            kind = type(fingerprint).__name__
            raise DataError(
                f"source {self.name!r}: fingerprint() returned {kind}; return a str, or None"
            )
        if fingerprint is None or self.is_built_in:
            return fingerprint
        return self._with_code(fingerprint + size)

    def _with_code(self, text: str) -> str:
        """Returns a hash of the text and of the source's code: an edit must not use old records."""
        content = f"{text}\n{_code(type(self._source))}"
        return hashlib.sha256(content.encode(errors="replace")).hexdigest()

    def modified(self) -> str | None:
        """Returns the hash of modification times, None where the source has none."""
        with self._errors("modified()"):
            return self._source.modified() if hasattr(self._source, "modified") else None

    def intact(self, corrupt: Mapping[str, str]) -> list[str]:
        """Returns those of the corrupt files, listed as by `corrupt`, that can be read by now."""
        with self._errors("intact()"):
            return self._source.intact(corrupt) if hasattr(self._source, "intact") else []

    def splits(self, scratch: Path) -> dict[str, Iterable[Example]]:
        """Returns the examples of each split; reading them raises `DataError` for a bad one.

        Args:
            scratch: an existing folder for temporary files.
        """
        if hasattr(self._source, "scratch"):
            self._source.scratch = scratch
        with self._errors("splits()"):
            splits = self._source.splits()
        if self.is_built_in:
            return splits
        self._check_splits(splits)
        return {split: self._checked(split, examples) for split, examples in splits.items()}

    def _check_splits(self, splits: Any) -> None:
        if not isinstance(splits, Mapping):
            raise DataError(
                f"source {self.name!r}: splits() returned {type(splits).__name__}; return a dict "
                "of iterables of histo_jax.Example, with the key 'train'"
            )
        for name in splits:
            if name not in SPLITS:
                raise DataError(
                    f"source {self.name!r}: splits() returned a split {name!r}; the splits are "
                    f"{', '.join(SPLITS)}{did_you_mean(str(name), SPLITS)}"
                )
        if "train" not in splits:
            raise DataError(
                f"source {self.name!r}: splits() returned no 'train' split; add the examples to "
                "train on"
            )

    def _checked(self, split: str, examples: Any) -> Iterable[Example]:
        checked = self._check_examples(split, examples)
        with contextlib.suppress(TypeError):
            return SizedExamples(checked, len(examples))
        return checked

    def _check_examples(self, split: str, examples: Any) -> Iterator[Example]:
        """Yields the examples with plain values; refuses the first bad one."""
        place = f"source {self.name!r}, {split} split"
        ids: set[str] = set()
        unlabelled = 0
        for number, example in enumerate(self._guarded(split, examples)):
            problem = _problem(example, split)
            if not problem and example.id in ids:
                problem = "is a duplicate; give each example of a split its own id"
            if problem:
                shown = f" (id {example.id!r})" if isinstance(example, Example) else ""
                raise DataError(f"{place}: example {number}{shown} {problem}")
            ids.add(example.id)
            unlabelled += example.label == UNLABELLED
            yield example._replace(label=int(example.label))
        if not ids:
            raise DataError(f"{place}: there are no examples; yield some, or leave the split out")
        if 0 < unlabelled < len(ids):
            raise DataError(
                f"{place}: {unlabelled} of {len(ids)} labels are {UNLABELLED}; give all labels or "
                "none"
            )

    def _guarded(self, split: str, examples: Any) -> Iterator[Any]:
        """Yields the examples; errors of the source itself become one line."""
        with self._errors(f"splits()[{split!r}]"):
            iterator = iter(examples)
        while True:
            with self._errors(f"splits()[{split!r}]"):
                try:
                    example = next(iterator)
                except StopIteration:
                    return
            yield example

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns an exception of a user's source into one line that says where it was raised."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self.is_built_in:
                raise
            frames = traceback.extract_tb(error.__traceback__)
            places = [f"{f.filename}, line {f.lineno}" for f in frames if f.filename != __file__]
            place = f" ({places[-1]})" if places else ""
            raise DataError(
                f"source {self.name!r}: {what} raised {type(error).__name__}: {one_line(error)}"
                f"{place}; correct the source"
            ) from error


def patch_spec(data: DataConfig, size: int) -> PatchSpec:
    """Returns what is known of a source's patches: the settings, else what the source defines.

    Args:
        data: `label_region` and `mpp`; the attributes of these names of the source's class are
            their defaults.
        size: height and width of the patches in pixels.
    """
    source = SOURCES.get(data.source)
    return PatchSpec(
        size,
        data.label_region or getattr(source, "label_region", None),
        data.mpp or getattr(source, "mpp", None),
    )


def class_names(data: DataConfig) -> tuple[str, str]:
    """Returns the names of label 0 and label 1: by `data.positive`, else as the source defines.

    Raises:
        DataError: the attribute `classes` of a registered source is not two different names.
    """
    if data.positive:
        return f"not {data.positive}", data.positive
    # An exported network may be used where its source is not registered.
    source = SOURCES.get(data.source) if data.source in SOURCES.names() else None
    names = getattr(source, "classes", _CLASSES)
    is_pair = isinstance(names, tuple | list) and len(names) == 2 and names[0] != names[1]
    if not is_pair or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(
            f"source {data.source!r}: classes = {names!r} must be the names of label 0 and of "
            f"label 1, such as {_CLASSES}"
        )
    return names[0], names[1]


def known_size(data: DataConfig) -> int | None:
    """Returns the size of the source's patches if it is known before they are read."""
    return getattr(SOURCES.get(data.source), "image_size", None)


def check_patches(data: DataConfig, size: int) -> None:
    """Refuses settings that do not fit the size of the source's patches.

    Args:
        data: `image_size` and `label_region`.
        size: height and width of the patches in pixels.

    Raises:
        DataError: names the setting and the fix.
    """
    if data.image_size not in (None, size):
        raise DataError(
            f"config.data.image_size = {data.image_size}, but the patches of source "
            f"{data.source!r} have {size}x{size} pixels: leave it out"
        )
    region = patch_spec(data, size).label_region
    if region and region > size:
        raise DataError(
            f"config.data.label_region = {region} is more than the {size} pixels of a patch: set "
            f"at most {size}"
        )


def check_layout(data: DataConfig) -> None:
    """Refuses a `data.raw_dir` that is missing or has the layout of another source.

    Raises:
        DataError: names the folder and the fix.
    """
    if data.raw_dir is None:
        return
    raw_dir = files.expand(data.raw_dir, "--config.data.raw_dir")
    if not raw_dir.is_dir():
        what = "not a folder" if raw_dir.exists() else "no such folder"
        also = ", and --config.data.table to a table" if data.source in _LISTED else ""
        raise DataError(f"{raw_dir}: {what}; set --config.data.raw_dir{also}")
    if data.source in _LISTED and data.table:  # which names the files, in any layout
        return
    recognizes = getattr(SOURCES.get(data.source), "recognizes", None)
    if recognizes is None or recognizes(raw_dir):
        return
    for name in SOURCES.names():
        if name != data.source and getattr(SOURCES.get(name), "recognizes", _never)(raw_dir):
            raise DataError(
                f"{raw_dir} holds files of data.source = {name!r} and none of {data.source!r}: "
                f"set --config.data.source={name}, or --config.data.raw_dir"
            )


def _never(_: Path) -> bool:
    return False


def _problem(example: Any, split: str) -> str | None:
    """Returns what is wrong with an example, and the fix; None = nothing."""
    if not isinstance(example, Example):
        return (
            f"is of type {type(example).__name__}; yield "
            "histo_jax.Example(id=..., image=..., label=..., slide=...)"
        )
    image, label = example.image, example.label
    if not isinstance(example.id, str) or not example.id.strip() or not example.id.isprintable():
        return "must have an id of visible text; set id to a str such as a file's name"
    if not isinstance(image, np.ndarray):
        return f"has an image of type {type(image).__name__}; convert it by numpy.asarray"
    shape = image.shape
    if image.dtype != np.uint8 or shape not in {(size, size, 3) for size in SIZES}:
        return (
            f"has an image {image.dtype}[{', '.join(map(str, shape))}], not uint8[size, size, 3] "
            f"with a size that is a multiple of 32 from {SIZES[0]} to {SIZES[-1]}; convert it"
        )
    labels = (0, 1, UNLABELLED) if split == "test" else (0, 1)
    if not isinstance(label, int | np.integer) or label not in labels:
        known = "0, 1, or -1 where it is not known" if split == "test" else "0 or 1"
        return f"has label {label!r}; the label must be {known}, as an int"
    for name in ("slide", "patient", "path"):
        value = getattr(example, name)
        if not isinstance(value, str):
            return f"has a {name} of type {type(value).__name__}; give a str, '' = not known"
    return None


def _code(kind: type) -> str:
    """Returns the source code of a class, as far as Python can find it."""
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(kind)
    text = ""
    for method in filter(inspect.isfunction, vars(kind).values()):  # a class of a notebook
        with contextlib.suppress(OSError, TypeError):
            text += inspect.getsource(method)
    return text
