"""One small run with its report, and contents of a page to be rendered."""

import dataclasses

import flax.linen as nn
import numpy as np
import pandas as pd
import pytest

import histo_jax
from histo_jax.config import Config
from histo_jax.data.example import PatchSpec
from histo_jax.report import page, patches, report


@histo_jax.register_model("tests_report_network")
class Network(nn.Module):
    """A small network that compiles quickly."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Conv(4, (8, 8), 8)(images))
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


@pytest.fixture(scope="package")
def config(synthetic_records):
    config = Config()
    config.data.synthetic_slides, config.data.samples_per_class = 8, 60
    config.data.validation_fraction = 0.5
    config.data.tfds_dir = synthetic_records
    config.model.name = "tests_report_network"
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
def contents():
    """Makes the contents of a page, with one patch in one gallery."""

    def make(**changes):
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (96, 96, 3), np.uint8)
        patch = patches.Patch("id", "slide", 1, 0.5, image, image)
        labels = np.arange(40) % 2
        table = pd.DataFrame(
            {"id": "i", "label": labels, "slide": "s", "logit": labels + rng.normal(size=40)}
        )
        scores = {
            name: 0.5 for score in page.SCORES for name in (score, f"{score}_low", f"{score}_high")
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
            "threshold_at_95_specificity": 0.7312,
            "threshold_at_95_sensitivity": 0.2718,
        }
        made = page.Contents(
            workdir="w",
            source="kaggle",
            classes=("no tumour", "tumour"),
            patch_spec=PatchSpec(96, 32, 0.972),
            split="validation",
            scores=scores | changes.pop("scores", {}),
            table=table,
            has_slides=True,
            date="2026-01-01",
            history=None,
            galleries={"Highest loss": [patch]},
            audit=None,
            has_other_audit=False,
            training=page.Training("r", "f", 4000, 9, [5000], None),
            settings={"seed": 0},
            changed_settings={},
            versions={"jax": "1", "devices": "1 cpu"},
        )
        return dataclasses.replace(made, **changes)

    return make


@pytest.fixture(scope="package")
def many(contents):
    """Contents of a page of 30,000 patches."""
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
    # Noise, which no image format compresses.
    patch = contents().galleries["Highest loss"][0]
    return contents(table=table, galleries={"Highest loss": [patch] * 36})


EVIL = '<script>alert("x")</script><img src="x:" onerror="alert(1)">'


@pytest.fixture(scope="package")
def evil_page(contents):
    """A page with HTML in every text that comes from outside."""
    made = contents()
    patch = made.galleries["Highest loss"][0]._replace(id=EVIL, slide=EVIL)
    evil = contents(
        table=made.table.assign(slide=EVIL),
        galleries={"Highest loss": [patch]},
        workdir=EVIL,
        settings={EVIL: EVIL},
        changed_settings={EVIL: EVIL},
        training=page.Training(EVIL, EVIL, 1, 1, [1], {EVIL: EVIL, "devices": EVIL}),
        audit=page.Audit(EVIL, False, True, 0.5),
    )
    return page.render(evil)[0]
