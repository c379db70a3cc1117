"""One small run with its page, on slides that are known."""

import numpy as np
import pandas as pd
import pytest

import histo_jax
from histo_jax.config import Config
from histo_jax.report import page, patches, report


@pytest.fixture(scope="package")
def config(tmp_path_factory):
    config = Config()
    config.data.synthetic_slides, config.data.samples_per_class = 8, 60
    config.data.validation_fraction = 0.5
    config.data.tfds_dir = str(tmp_path_factory.mktemp("records"))
    config.model.features, config.model.dense = (2, 2, 2, 2, 2), 4
    config.fit.batch_size, config.fit.epochs = 8, 2
    return config


@pytest.fixture(scope="package")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    histo_jax.fit(config, folder)
    histo_jax.evaluate(config, folder)
    report(config, folder)
    return folder


@pytest.fixture(scope="package")
def facts():
    """Makes what a page is made of, with one patch in one gallery."""

    def make(**changes):
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (96, 96, 3), np.uint8)
        patch = patches.Patch("id", "slide", 1, 0.5, image, image)
        labels = np.arange(40) % 2
        table = pd.DataFrame(
            {"id": "i", "label": labels, "slide": "s", "logit": labels + rng.normal(size=40)}
        )
        scores = {
            name: 0.5 for score in page._SCORES for name in (score, f"{score}_low", f"{score}_high")
        }
        scores |= {
            "count": 40,
            "interval_over": "slides",
            "resampled": 30,
            "prior": 0.5,
            "tta": False,
            "slide_disjoint": True,
            "note": "",
            "checkpoint_step": 7,
            "probability_at_95_specificity": 0.7312,
            "probability_at_95_sensitivity": 0.2718,
        }
        return {
            "workdir": "w",
            "source": "kaggle",
            "split": "validation",
            "scores": scores,
            "history": None,
            "table": table,
            "galleries": {"Highest loss": [patch]},
            "settings": {"seed": 0},
            "records": "r",
            "fingerprint": "f",
            "audit": None,
            "leak": False,
            "audit_knows_slides": True,
            "trained_on": {"patches": 4000, "slides": 9},
            "parameters": [5000],
            "trained_with": None,
        } | changes

    return make


@pytest.fixture(scope="package")
def many(facts):
    """What a page of 30,000 patches is made of."""
    rng = np.random.default_rng(0)
    labels = (rng.random(30_000) < 0.5).astype(int)
    table = pd.DataFrame(
        {
            "id": [f"{number:040x}" for number in range(30_000)],
            "label": labels,
            "slide": [f"slide {number % 100}" for number in range(30_000)],
            "logit": 2 * labels - 1 + rng.normal(size=30_000),
        }
    )
    # Noise, which no picture format makes small.
    patch = facts()["galleries"]["Highest loss"][0]
    return facts(table=table, galleries={"Highest loss": [patch] * 36})


EVIL = '<script>alert("x")</script><img src="x:" onerror="alert(1)">'


@pytest.fixture(scope="package")
def evil_page(facts):
    """A page with HTML in everything that is not our own."""
    made = facts()
    patch = made["galleries"]["Highest loss"][0]._replace(id=EVIL, slide=EVIL)
    changes = {
        "table": made["table"].assign(slide=EVIL),
        "galleries": {"Highest loss": [patch]},
        "workdir": EVIL,
        "settings": {EVIL: EVIL},
        "records": EVIL,
        "audit": EVIL,
    }
    return page.render(**made | changes)[0]
