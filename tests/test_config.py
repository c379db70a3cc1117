from pathlib import Path

import numpy as np
import pytest

from histo_jax.config import Config, flat, set_field
from histo_jax.config_checks import type_name, unknown_field, validate
from histo_jax.errors import UserError

MISSPELT = {
    "fit.epoch": "config.fit.epochs?", "epochs": "config.fit.epochs?",
    "batch_size": "config.fit.batch_size?", "Fit.Batch-Size": "config.fit.batch_size?",
    "data.rawdir": "config.data.raw_dir?", "raw_dir": "config.data.raw_dir?",
    "optimiser.learning_rate": "config.optimizer.learning_rate?", "sed": "config.seed?",
    "predict.checkpoint": "config.predict.checkpoints?", "seed.x": "config.seed?",
    "model.features[0]": "config.model.features?",
    "optimizer.lr": "config.optimizer has name, learning_rate, schedule, warmup",
    "fit": "config.fit has batch_size, epochs, steps_per_epoch",
}  # fmt: skip


@pytest.mark.parametrize("name", MISSPELT)
def test_an_unknown_field_names_the_closest_one(name):
    message = unknown_field(name)
    assert message.startswith(f"unknown config field: config.{name};")
    assert MISSPELT[name] in message


def test_nothing_is_guessed_for_what_resembles_nothing():
    assert unknown_field("lr") == "unknown config field: config.lr (see --help)"


WRONG = [
    ("fit.epochs", "3", "'3' must be a whole number"),
    ("fit.epochs", 3.5, "3.5 must be a whole number"),
    ("fit.epochs", None, "None must be a whole number"),
    ("fit.epochs", np.int64(3), "must be a whole number, not of type int64"),
    ("fit.steps_per_epoch", "x", "must be a whole number or None"),
    ("model.features", [1, 2, 3, 4, 5], "five whole numbers such as (32, 64, 128, 256, 512), not"),
    ("data.raw_dir", Path("x"), "must be text or None, not of type PosixPath"),
    ("data.raw_dir", "", "'' must be a folder"),
    ("predict.tta", 1, "must be true or false"),
    ("data.placement", "devcie", "auto, device, host, disk; did you mean device?"),
    ("model.name", "Five-Block", "did you mean five_block?"),
    ("data.source", "xyz", "must be one of synthetic, kaggle, pcam"),
    ("data.validation_fraction", 0.0, "0.0 must be above 0 and below 1"),
    ("predict.prior", 1.0, "must be above 0 and below 1, or None"),
    ("optimizer.warmup", 1, "must be above 0 and below 1"),
    ("optimizer.learning_rate", float("inf"), "inf must be above 0 and finite"),
    ("optimizer.learning_rate", float("nan"), "nan must be above 0 and finite"),
    ("optimizer.ema_decay", 1.0, "must be at least 0 and below 1"),
    ("augment.mixup", float("inf"), "must be at least 0 and finite"),
    ("augment.shift", 5, "must be at least 0 and at most 4"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_a_wrong_value_names_what_it_must_be(name, value, words):
    config = Config()
    set_field(config, name, value)
    with pytest.raises(UserError) as error:
        validate(config)
    assert str(error.value).startswith(f"config.{name} = ")
    assert words in str(error.value)


def test_the_value_is_shown_as_it_was_typed():
    config = Config()
    config.data.validation_fraction = 0.0
    with pytest.raises(UserError, match=r"fraction = 0e5 must"):
        validate(config, {"data.validation_fraction": "0e5"})


def test_no_type_is_named_in_the_words_of_python():
    import typing

    for kind in typing.get_type_hints(Config).values():
        for inner in typing.get_type_hints(kind).values() if hasattr(kind, "__mro__") else ():
            assert "[" not in type_name(inner)
            assert "of type" not in type_name(inner)
    assert all(name for name in flat(Config()))
