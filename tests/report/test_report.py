"""The page says what the files say, and nothing in them can break it."""

import copy
import html.parser
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import expit
from sklearn.metrics import precision_recall_curve, roc_curve

from histo_jax import predictions
from histo_jax.data.builder import prepare
from histo_jax.errors import ExpectedError
from histo_jax.report import explain, figures, page, patches, report


class Page(html.parser.HTMLParser):
    """What a browser would make of it: texts, tags that are left open, what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.open, self.links, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "input", "br", "link", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.texts.append(data)


def text_of(run):
    return (run / "report.html").read_text()


def test_the_answer_comes_first_and_every_score_is_that_of_the_evaluation(run):
    scores = json.loads((run / "evaluation_validation.json").read_text())
    found = Page(text_of(run))
    words = " ".join(" ".join(found.texts).split())
    before, _, after = words.partition("Scores")
    assert f"AUC {scores['auc']:.3f}" in before
    assert f"{scores['auc_low']:.3f} to {scores['auc_high']:.3f}, over slides" in before
    assert "Honest" in before
    for name in page._SCORES:
        assert f"{scores[name]:.4f}" in after, name
        assert f"{scores[f'{name}_low']:.4f} to {scores[f'{name}_high']:.4f}" in after, name


def test_one_file_without_network(run):
    found = Page(text_of(run))
    assert found.links
    assert all(link.startswith(("data:", "#")) for link in found.links)
    assert "url(http" not in text_of(run)
    assert [tag for tag, _ in found.tags].count("svg") == 5
    assert not found.open
    figures = {path.stem for path in (run / "report").iterdir()}
    assert figures == {
        "learning_curves", "roc", "precision_recall", "calibration", "histogram",
    }  # fmt: skip


def test_every_picture_has_a_text_and_every_control_a_label(run):
    found = Page(text_of(run))
    buttons = [attributes for tag, attributes in found.tags if tag == "button"]
    assert len(buttons) == 36
    assert all("alt" in attributes for tag, attributes in found.tags if tag == "img")
    assert all("tumour, probability" in attributes["aria-label"] for attributes in buttons)
    labelled = [a["for"] for tag, a in found.tags if tag == "label"]
    assert all(a["id"] in labelled for tag, a in found.tags if tag == "input")
    assert all(a.get("aria-label") for tag, a in found.tags if tag == "figure")


def test_the_slider_has_the_counts_of_every_threshold(run):
    table = predictions.read(run, "validation")
    probabilities = expit(table["logit"])
    counts = json.loads(re.search(r"const counts = (.*);", text_of(run))[1])
    for percent in (0, 17, 50, 100):
        called = probabilities >= percent / 100
        assert counts["positives"][percent] == (called & (table["label"] == 1)).sum()
        assert counts["negatives"][percent] == (called & (table["label"] == 0)).sum()


def test_galleries_show_the_most_wrong_and_the_least_sure(config, run):
    table = predictions.read(run, "validation")
    words = text_of(run)
    loss = np.logaddexp(0, np.where(table["label"] == 1, -1, 1) * table["logit"])
    gallery = words.partition("Most wrong")[2].partition("Least sure")[0]
    wanted = table["id"][np.argsort(-loss, kind="stable")[: patches._SHOWN]]
    assert re.findall(r'class="soft">(\w{12})', gallery) == [i[:12] for i in wanted]
    slides = words.partition("Slide by slide")[2].partition("Patches")[0]
    assert all(slide in slides for slide in table["slide"].unique())


def test_the_audit_is_shown_or_said_to_be_missing(facts):
    text, _ = page.render(**facts(audit="LEAK: one"))
    assert "LEAK: one" in text
    assert "was not audited" not in text
    assert "was not audited" in page.render(**facts())[0]


def test_without_the_checkpoint_the_page_comes_without_saliency(config, run, tmp_path):
    names = ("evaluation_validation.json", "predictions_validation.csv", "history.csv")
    for name in names:
        (tmp_path / name).write_bytes((run / name).read_bytes())
    report(config, tmp_path)
    words = (tmp_path / "report.html").read_text()
    assert "integrated gradients" not in words
    assert "<button" not in words
    found = Page(words)
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")


def test_what_was_not_evaluated_is_said(config, tmp_path, run):
    with pytest.raises(ExpectedError, match=r"predictions_validation\.csv is missing: run"):
        report(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_other_patches_than_were_evaluated_are_refused(config, run, tmp_path):
    for path in run.glob("*_validation.*"):
        (tmp_path / path.name).write_text(path.read_text())
    path = tmp_path / "predictions_validation.csv"
    pd.read_csv(path).iloc[1:].to_csv(path, index=False)
    with pytest.raises(ExpectedError, match="not the patches that were evaluated"):
        report(config, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_thirty_thousand_patches_make_a_small_page_and_the_same_one_each_time(facts):
    rng = np.random.default_rng(0)
    labels = (rng.random(30_000) < 0.5).astype(int)
    table = pd.DataFrame(
        {
            "id": [f"{number:040x}" for number in range(30_000)], "label": labels,
            "slide": [f"slide {number % 100}" for number in range(30_000)],
            "logit": 2 * labels - 1 + rng.normal(size=30_000),
        }
    )  # fmt: skip
    # Noise, which no picture format makes small.
    patch = facts()["galleries"]["Most wrong"][0]
    made = facts(table=table, galleries={"Most wrong": [patch] * 36})
    text, drawn = page.render(**made)
    assert len(text) < 5e6
    assert sum(map(len, drawn.values())) < 300_000
    assert (text, drawn) == page.render(**made)


@pytest.mark.parametrize("curve", [roc_curve, precision_recall_curve])
def test_thinning_a_curve_moves_it_nowhere_by_more_than_a_pixel(curve):
    rng = np.random.default_rng(0)
    labels = rng.random(30_000) < 0.5
    first, second, _ = curve(labels, labels + rng.normal(size=30_000))
    x, y = (first, second) if curve is roc_curve else (second, first)
    thin = figures._thinned(x, y)
    assert len(thin[0]) <= 400
    assert (thin[0][0], thin[1][0]) == (x[0], y[0])
    assert (thin[0][-1], thin[1][-1]) == (x[-1], y[-1])
    points = np.stack([x, y], 1)
    kept = np.stack(thin, 1)
    distance = np.abs(points[:, None] - kept[None]).sum(2).min(1)
    assert distance.max() < 0.01


@pytest.fixture(scope="module")
def explained(config, run):
    return explain(config, run)


def test_explain_draws_the_patches_of_the_galleries(config, run, explained):
    table = predictions.read(run, "validation")
    rows = np.unique(np.concatenate(list(patches.galleries(table, config.seed).values())))
    assert sorted(explained["id"]) == sorted(table["id"].iloc[rows])
    pictures = {path.stem for path in (run / "explain").glob("*.png")}
    assert pictures == set(explained["id"])
    both = explained.merge(table, on="id")
    np.testing.assert_allclose(both["probability"], expit(both["logit"]), rtol=1e-4)
    written = pd.read_csv(run / "explain" / "patches.csv", keep_default_na=False)
    assert written["id"].tolist() == explained["id"].tolist()


def test_explain_shows_the_patch_and_beside_it_where_the_network_looked(config, run, explained):
    prepared = prepare(config)
    row = prepared.tables["train"]["id"].tolist().index(explained["id"][0])
    image = prepared.source("train").__getitems__([row])[0]["image"]
    drawn = np.asarray(Image.open(run / "explain" / f"{explained['id'][0]}.png"))
    assert drawn.shape == (384, 2 * 384 + 4, 3)
    left, right = drawn[::4, :384:4], drawn[::4, 388::4]
    outside = np.ones((96, 96), bool)
    outside[32:65, 32:65] = False
    np.testing.assert_array_equal(left[outside], image[outside])
    assert (right != image).any()


def test_explain_takes_ids_of_any_split(config, run):
    tables = prepare(config).tables
    ids = [tables["train"]["id"][3], tables["test"]["id"][2]]
    said = explain_ids(config, run, ",".join(ids))
    assert sorted(said["id"]) == sorted(ids)
    with pytest.raises(ExpectedError, match=r"config\.explain\.ids: no patch .* has the id 'abc'"):
        explain_ids(config, run, f"{ids[0]},abc")


def explain_ids(config, run, ids):
    config = copy.deepcopy(config)
    config.explain.ids = ids
    return explain(config, run)


def test_probabilities_on_the_edges_of_bins_are_drawn():
    assert "<svg" in figures.calibration(np.arange(16) / 15, np.arange(16) % 2.0)
