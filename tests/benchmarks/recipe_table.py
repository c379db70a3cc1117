"""Prints the table of what `recipes.py` has trained, and draws `recipe_curves.svg`.

    .venv/bin/python tests/benchmarks/recipe_table.py

A row is the mean over the seeds of a recipe. `min to 0.94` is the time of training until the first
epoch with that validation AUC; it is empty where a seed never reached it, or where it was not
measured.
"""

from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
KEY = ["recipe", "seed"]
# Lines of the figure, and the recipes of their points.
OVER_MINUTES = {
    "pcam_fast": "pcam_fast.py",
    "muon_16+8_wide": "wider, 24 epochs",
    "pcam, PyTorch": "PyTorch, original recipe",
}
OVER_PATCHES = {
    "symmetric": ["symmetric_1000", "symmetric_5000", "pcam_best"],
    "plain": ["plain_1000", "plain_5000", "strong_plain"],
}


def minutes_to(curves: pd.DataFrame, auc: float) -> "pd.Series[float]":
    """Returns the mean minutes of each recipe; NaN where a seed did not reach the AUC."""
    reached = curves[curves["validation_auc"] >= auc].groupby(KEY)["minutes"].first()
    runs = curves.groupby(KEY).size().index
    return reached.reindex(runs).groupby("recipe").agg(lambda minutes: minutes.mean(skipna=False))


def make_table(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per recipe."""
    groups = runs.groupby("recipe", sort=False)
    table = groups[["training_patches", "validation_auc", "validation_nll"]].mean()
    table.insert(1, "seeds", groups.size())
    for auc in (0.94, 0.95):
        table[f"min to {auc}"] = minutes_to(curves, auc)
    table["minutes"] = groups["minutes"].mean()
    table["img/s"] = groups["images_per_second"].max()
    return table.sort_values(["training_patches", "validation_auc"]).reset_index()


def draw(runs: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Draws validation AUC over minutes and over training patches."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    curves = curves[(curves["seed"] == 0) & curves["minutes"].notna()]
    for recipe, label in OVER_MINUTES.items():
        rows = curves[curves["recipe"] == recipe]
        if len(rows):
            left.plot(rows["minutes"], rows["validation_auc"], ".-", label=label)
    left.set(xlabel="minutes of training, two cores", ylabel="validation AUC, unseen slides")
    runs = runs[runs["seed"] == 0].set_index("recipe")
    for network, recipes in OVER_PATCHES.items():
        rows = runs.loc[recipes]
        right.plot(rows["training_patches"], rows["validation_auc"], "o-", label=network)
        right.set_xscale("log")
        right.set_xticks(rows["training_patches"], [f"{n:,}" for n in rows["training_patches"]])
    right.set_xlabel("training patches")
    right.minorticks_off()
    left.set_ylim(0.84)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(title="one seed each", loc="lower right")
    # Without a date and with fixed ids: the same numbers give the same file.
    plt.rcParams["svg.hashsalt"] = "histo_jax"
    figure.savefig(HERE / "recipe_curves.svg", metadata={"Date": None})


def main() -> None:
    runs = pd.read_csv(HERE / "recipes.csv")
    curves = pd.read_csv(HERE / "recipe_curves.csv")
    print(make_table(runs, curves).round(4).to_string(index=False, na_rep=""))
    draw(runs, curves)


if __name__ == "__main__":
    main()
