"""Recipes by name."""

import shutil
from pathlib import Path

import pytest

from histo_jax import recipes
from histo_jax.config_checks import validate
from histo_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(params=["clone", "wheel"])
def folder(request, tmp_path, monkeypatch):
    """Where the recipes are expected."""
    if request.param == "clone":
        return CONFIGS
    shutil.copytree(CONFIGS, tmp_path / "histo_jax" / "configs")
    (tmp_path / "configs").mkdir()  # of another package in site-packages
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path / "histo_jax")
    return tmp_path / "histo_jax" / "configs"


def test_recipes_are_found_from_any_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.names() == sorted(file.stem for file in CONFIGS.glob("*.py"))
    for name in recipes.names():
        assert recipes.path(name) == folder / f"{name}.py"
        assert (
            recipes.path(f"{name}.py")
            == recipes.path(f"configs/{name}.py")
            == folder / f"{name}.py"
        )
        validate(recipes.recipe(name))
    assert recipes.recipe("kaggle_best").data.source == "kaggle"
    assert recipes.recipe("kaggle_best").model.name == "five_block_p4m"


@pytest.mark.parametrize("name", ["", ".", "none", "../configs/pcam", "pcam/", ".py", "configs/"])
def test_other_names_are_not_recipes(folder, name):
    assert recipes.path(name) is None


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError) as error:
        recipes.recipe("pcam_bets")
    assert str(error.value) == (
        "unknown recipe 'pcam_bets': choose from images, kaggle, kaggle_best, pcam, pcam_best, "
        "pcam_fast, quickstart, slides; did you mean pcam_best?"
    )
