"""The table of recipes."""

import runpy
from pathlib import Path

import pandas as pd
import pytest

recipe_table = runpy.run_path(str(Path(__file__).with_name("recipe_table.py")))


def test_a_recipe_is_the_mean_of_its_seeds_and_reached_an_auc_if_all_of_them_did():
    names = ["recipe", "seed", "epoch", "minutes", "validation_auc"]
    curves = pd.DataFrame(
        [
            ("a", 0, 1, 1.0, 0.93),
            ("a", 0, 2, 2.0, 0.945),
            ("a", 0, 3, 3.0, 0.93),
            ("a", 1, 1, 4.0, 0.96),
            ("b", 0, 1, 1.0, 0.95),
            ("b", 1, 1, 1.0, 0.90),
        ],
        columns=names,
    )
    runs = pd.DataFrame(
        {
            "recipe": ["a", "a", "b", "b"],
            "seed": [0, 1, 0, 1],
            "training_patches": 9,
            "validation_auc": [0.93, 0.95, 0.95, 0.96],
            "validation_nll": 0.3,
            "minutes": [3.0, 4.0, 1.0, 1.0],
            "images_per_second": [10.0, 20.0, 5.0, 5.0],
        }
    )
    table = recipe_table["make_table"](runs, curves).set_index("recipe")
    assert table.loc["a", ["seeds", "min to 0.94", "img/s"]].tolist() == [2, 3.0, 20.0]
    assert table["validation_auc"].tolist() == pytest.approx([0.94, 0.955])
    assert table.loc["b"].isna()[["min to 0.94", "min to 0.95", "minutes"]].tolist() == [
        True,
        True,
        False,
    ]
