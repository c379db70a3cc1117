"""The page says what the files say, and nothing in them can break it."""

import contextlib
import copy
import html.parser
import json
import os
import re
import shutil
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, precision_recall_curve, roc_auc_score, roc_curve

import histo_jax
from histo_jax import evaluation_files
from histo_jax.data import splits
from histo_jax.data.leakage import audit
from histo_jax.ensemble import TrainedModel, check_evaluated
from histo_jax.errors import UserError
from histo_jax.metrics import binary_scores, operating_points
from histo_jax.preparation import prepare
from histo_jax.report import explain, figures, page, patches, report


class Page(html.parser.HTMLParser):
    """What a browser would make of it: texts, tags that are left open, what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.open, self.links, self.tags, self.rows = [], [], [], [], []
        self.feed(text)
        self.rows = [[" ".join(" ".join(cell).split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append([])
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
        if not {"th", "td"}.isdisjoint(self.open):
            self.rows[-1][-1].append(data)


def text_of(run):
    return (run / "report.html").read_text()


def words_of(text):
    return " ".join(" ".join(Page(text).texts).split())


def test_the_answer_comes_first_and_every_score_is_that_of_the_evaluation(run):
    scores = json.loads((run / "evaluation_validation.json").read_text())
    before = words_of(text_of(run)).partition("Scores")[0]
    assert f"AUC {scores['auc']:.3f}" in before
    assert f"{scores['auc_low']:.3f} to {scores['auc_high']:.3f}, resampling whole slides" in before
    assert "few: the truth may lie farther off" in before
    assert "Honest: no slide of these patches was trained on." in before
    assert f"{scores['prior']:.0%} of them with tumour" in before
    rows = {row[0].partition(" from probability")[0]: row[1:] for row in Page(text_of(run)).rows}
    for name, title in page._SCORES.items():
        interval = f"{scores[f'{name}_low']:.4f} to {scores[f'{name}_high']:.4f}"
        assert rows[title] == [f"{scores[name]:.4f}", interval], name


ANSWERS = {
    "Not known whether honest: not all patches name": {"slide_disjoint": None},
    "Optimistic: neighbours of one slide": {"slide_disjoint": False},
    "resampling patches, and so too narrow": {"interval_over": "patches"},
    "No interval: patches of one slide": {"auc_low": None, "auc_high": None},
    "The mean of 2 runs: a (AUC 0.612), b (AUC 0.712).": {
        "members": [{"run": "a", "auc": 0.612}, {"run": "b", "auc": 0.712}]
    },
}


@pytest.mark.parametrize("wanted", ANSWERS)
def test_the_answer_says_what_is_known_and_what_not(facts, wanted):
    made = facts()
    usual = words_of(page.render(**made)[0])
    made["scores"] |= ANSWERS[wanted]
    said = words_of(page.render(**made)[0])
    assert wanted in said
    assert wanted not in usual
    is_known = (
        bool(made["scores"]["slide_disjoint"]) and made["scores"]["interval_over"] == "slides"
    )
    assert ("Honest: no slide" in said) == is_known


def test_a_leak_that_the_audit_found_stands_in_the_answer(facts):
    for leak, wanted in ((True, "The audit found a leak"), (False, "The audit found no patch")):
        said = words_of(page.render(**facts(audit="table", leak=leak))[0])
        assert wanted in said.partition("Scores")[0]
    assert "The audit found" not in words_of(page.render(**facts())[0])
    said = words_of(page.render(**facts(audit="table", audit_knows_slides=False))[0])
    assert "The audit found no patch on two sides; slides are not known." in said


@pytest.fixture
def _without_attribution(monkeypatch):
    """Whoever does not look at it need not wait for it."""
    monkeypatch.setattr(page, "_judged", lambda *_: [])


@pytest.mark.usefixtures("_without_attribution")
def test_purpose_and_date_come_first_and_each_score_is_explained(config, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    os.utime(tmp_path / "run" / "evaluation_validation.json", (1e9, 1e9))
    report(config, tmp_path / "run")
    text = text_of(tmp_path / "run")
    before = words_of(text).partition("Tumour classifier: run")[2].partition("AUC 0.")[0]
    assert "whether the centre of a stained (H&E) patch of lymph node holds" in before
    assert "Research use only. Not a medical device." in before
    assert "evaluated on 2001-09-09" in before
    # The page says nothing of today.
    report(config, tmp_path / "run")
    assert text_of(tmp_path / "run") == text
    rows = Page(text).rows
    for name, title in page._SCORES.items():
        if name != "auc":  # explained beside the answer
            (place,) = [n for n, row in enumerate(rows) if row and row[0].startswith(title)]
            assert len(rows[place + 1]) == 1, name
            assert len(rows[place + 1][0]) > 30, name
    assert f"{json.loads((run / 'evaluation.json').read_text())['prior']:.3f} is guessing" in text
    assert "nats" not in text


COLOR = {
    "Colour alone does better": {"auc": 0.8, "auc_low": 0.7, "color_auc": 0.81},
    "Colour alone does as well": {"auc": 0.8, "auc_low": 0.7, "color_auc": 0.8},
    "not proven, as that lies within its interval": {
        "auc": 0.8,
        "auc_low": 0.7,
        "color_auc": 0.75,
    },
    "not proven, as it has no interval": {"auc": 0.8, "auc_low": None, "color_auc": 0.75},
    "better than colour histograms alone, which reach AUC 0.600": {
        "auc": 0.8,
        "auc_low": 0.7,
        "color_auc": 0.6,
    },
    "Of the validation patches, colour histograms alone reach AUC 0.900": {
        "auc": 0.8,
        "auc_low": 0.7,
        "color_auc": 0.9,
        "split": "test",
    },
}


@pytest.mark.parametrize("wanted", COLOR)
def test_the_network_is_told_against_colour_alone(facts, wanted):
    changes = dict(COLOR[wanted])
    made = facts(color_auc=changes.pop("color_auc"), split=changes.pop("split", "validation"))
    made["scores"] |= changes
    said = words_of(page.render(**made)[0])
    assert [text for text in COLOR if text in said] == [wanted]
    if wanted.startswith("Colour alone"):
        # The headline: before the score itself.
        assert said.index(wanted) < said.index("AUC 0.800", said.index("Research use only"))


@pytest.mark.usefixtures("_without_attribution")
def test_only_an_audit_of_these_patches_is_shown(config, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "audit.json"

    def report_with(found):
        path.write_text(json.dumps(found))
        report(config, tmp_path / "run")
        return words_of(text_of(tmp_path / "run"))

    prepared = prepare(config)
    found = audit(prepared, splits.make_subsets(prepared.tables, config.data, config.data_seed), 0)
    found["note"] = "optimistic, as the page says for itself"
    said = report_with(found)
    auc = found["colour_histogram_baseline"]["validation_auc"]
    assert re.search(rf"[Cc]olour histograms.{{1,40}}reach AUC {auc:.3f}", said)
    assert "The audit found no patch or slide on two sides." in said
    assert found["note"] not in said
    for older in (found["subsets"]["train"] | {"digest": "x"}, {"patches": 1}):
        said = report_with(found | {"subsets": found["subsets"] | {"train": older}})
        assert "is of other patches or of an earlier version: --mode=audit" in said
        assert "The audit found" not in said
        assert f"{auc:.3f}" not in said


def test_no_caveat_stands_twice(facts):
    made = facts(audit="slides: not known, cannot be checked", audit_knows_slides=False)
    made["scores"] |= {"slide_disjoint": False, "interval_over": "patches", "resampled": 40}
    made["scores"]["note"] = f"{splits.OPTIMISTIC}; these patches chose the checkpoint"
    said = words_of(page.render(**made)[0])
    for caveat in ("neighbours of one slide", "chose the checkpoint", "fitted", "too narrow"):
        assert said.count(caveat) == 1, caveat
    assert said.count("not known") == 1
    assert "chose the checkpoint" not in words_of(page.render(**facts(split="test"))[0])


def test_the_legend_tells_colours_frame_and_size(facts):
    said = words_of(page.render(**facts())[0])
    for text in ("Orange raises the predicted", "Blue lowers it", "32x32 of 96x96", "93 micro"):
        assert said.count(text) == 1, text
    # Of other patches nobody knows how large they are.
    assert "micrometres" not in words_of(page.render(**facts(source="synthetic"))[0])
    assert "drawn by a program" in words_of(page.render(**facts(source="synthetic"))[0])
    made = facts()
    made["galleries"]["Highest loss"][0] = made["galleries"]["Highest loss"][0]._replace(
        saliency=None
    )
    said = words_of(page.render(**made)[0])
    assert "Frame: the label is about this centre alone" in said
    assert "Orange" not in said


def test_thresholds_are_said_so_that_their_levels_hold(facts):
    made = facts()
    made["scores"] |= {
        "threshold_at_95_specificity": 0.9996341,
        "threshold_at_95_sensitivity": 0.00040378,
    }
    made["table"].loc[1, "logit"] = 20.0
    text, _ = page.render(**made)
    said = words_of(text)
    assert "sensitivity at 95% specificity from probability 0.999635 on" in said
    assert "specificity at 95% sensitivity from probability 0.000403 on" in said
    # The slider knows no such values; it would call none, or all.
    assert "data-position=" not in text
    made["scores"] |= {
        "threshold_at_95_specificity": None,
        "threshold_at_95_sensitivity": 0.25,
    }
    text, _ = page.render(**made)
    assert re.findall(r'data-position="(\d+)">([^<]+)<', text) == [("250", "95% sensitivity")]
    assert "from probability 0.250 on" in words_of(text)
    assert "specificity from probability" not in words_of(text)


def test_what_was_evaluated_by_an_earlier_version_has_a_page(config, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "evaluation_validation.json"
    scores = json.loads(path.read_text())
    for name in ("tta", "threshold_at_95_specificity", "threshold_at_95_sensitivity"):
        del scores[name]
    path.write_text(json.dumps(scores))
    report(config, tmp_path / "run")
    assert "integrated gradients" in (tmp_path / "run" / "report.html").read_text()


def test_one_file_without_network(run):
    found = Page(text_of(run))
    assert found.links
    assert all(link.startswith(("data:", "#")) for link in found.links)
    assert "url(http" not in text_of(run)
    assert [tag for tag, _ in found.tags].count("svg") == 5
    assert not found.open
    figures = {path.stem for path in (run / "report").iterdir()}
    assert figures == {
        "learning_curves",
        "roc",
        "precision_recall",
        "calibration",
        "histogram",
    }


def test_every_picture_has_a_text_and_every_control_a_label(run):
    found = Page(text_of(run))
    buttons = [attributes for tag, attributes in found.tags if tag == "button"]
    assert sum(attributes.get("class") == "patch" for attributes in buttons) > 24
    assert all("alt" in attributes for tag, attributes in found.tags if tag == "img")
    named = [a["aria-label"] for a in buttons if a.get("class") == "patch"]
    assert all("tumour, predicted probability of tumour: 0." in label for label in named)
    labelled = [a["for"] for tag, a in found.tags if tag == "label"]
    assert all(a["id"] in labelled for tag, a in found.tags if tag == "input")
    assert all(a.get("aria-label") for tag, a in found.tags if tag == "figure")


def test_the_slider_has_the_counts_of_every_threshold(run):
    table = evaluation_files.read(run, "validation")
    probabilities = expit(table["logit"])
    counts = json.loads(re.search(r"const counts = (.*);", text_of(run))[1])
    for position in (0, 171, 500, 1000):
        called = probabilities >= position / 1000
        assert counts["positives"][position] == (called & (table["label"] == 1)).sum()
        assert counts["negatives"][position] == (called & (table["label"] == 0)).sum()


def test_galleries_show_the_most_wrong_and_the_least_sure(config, run):
    table = evaluation_files.read(run, "validation")
    words = text_of(run)
    loss = np.logaddexp(0, np.where(table["label"] == 1, -1, 1) * table["logit"])
    order = np.argsort(-loss, kind="stable")
    wrong = (table["logit"] > 0) != (table["label"] == 1)
    assert f"{wrong.sum()} of {len(table)} are misclassified at 50%" in words
    gallery = words.partition("Highest loss")[2].partition("Most uncertain")[0]
    wanted = table["id"][order][wrong[order]][: patches._SHOWN]
    found = re.findall(r'<br>\s*<span class="soft">(\w{12})', gallery)
    assert found == [i[:12] for i in wanted]


def test_patches_that_are_called_rightly_are_not_among_the_wrong():
    table = pd.DataFrame({"logit": [-3.0, 2, -1, 4], "label": [0, 0, 1, 1]})
    assert patches.galleries(table, 0)["Highest loss"].tolist() == [1, 2]


def test_a_network_that_is_never_wrong_has_a_page(facts):
    text, _ = page.render(**facts(galleries={"Highest loss": []}))
    assert "integrated gradients" not in text


def test_each_slide_has_its_scores_and_the_worst_comes_first(run):
    table = evaluation_files.read(run, "validation")
    rows = [row for row in Page(text_of(run)).rows if row[0] in set(table["slide"])]
    losses = []
    for row in rows:
        own = table[table["slide"] == row[0]]
        losses.append(log_loss(own["label"], expit(own["logit"]), labels=[0, 1]))
        assert row[1:] == [
            str(len(own)),
            f"{own['label'].mean():.0%}",
            f"{roc_auc_score(own['label'], own['logit']):.3f}",
            f"{((own['logit'] > 0) == own['label']).mean():.3f}",
            f"{losses[-1]:.3f}",
        ]
    assert len(rows) == table["slide"].nunique() > 1
    assert losses == sorted(losses, reverse=True)


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
    assert 'class="patch"' not in words
    found = Page(words)
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")


def test_what_was_not_evaluated_is_said(config, tmp_path, run):
    with pytest.raises(UserError, match=r"predictions_validation\.csv is missing: run"):
        report(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_other_patches_than_were_evaluated_are_refused(config, run, tmp_path):
    for path in run.glob("*_validation.*"):
        (tmp_path / path.name).write_text(path.read_text())
    path = tmp_path / "predictions_validation.csv"
    pd.read_csv(path).iloc[1:].to_csv(path, index=False)
    with pytest.raises(UserError, match="not the patches that were evaluated"):
        report(config, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_thirty_thousand_patches_make_a_small_page_and_the_same_one_each_time(many):
    text, drawn = page.render(**many)
    assert len(text) < 5e6
    assert sum(map(len, drawn.values())) < 300_000
    assert (text, drawn) == page.render(**many)


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


@pytest.fixture
def drawn(monkeypatch):
    """What the figures draw: their axes, instead of SVG."""
    kept = []

    @contextlib.contextmanager
    def axes():
        kept.append(Figure().add_subplot())
        yield kept[-1], [""]

    monkeypatch.setattr(figures, "_axes", axes)
    return kept


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_curves_are_those_of_scikit_learn_and_points_those_of_the_evaluation(drawn):
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.4).astype(np.float64)
    logits = labels + rng.normal(size=300)
    probabilities = expit(logits)
    scores = binary_scores(logits, labels) | operating_points(logits, labels)
    figures.roc(logits, labels, scores)
    figures.precision_recall(probabilities, labels, scores)
    figures.calibration(probabilities, labels)
    figures.histogram(probabilities, labels)
    roc, recall, calibration, histogram = drawn

    false_alarms, sensitivity, _ = roc_curve(labels, logits)
    np.testing.assert_array_equal(
        roc.lines[0].get_xydata(), np.stack([false_alarms, sensitivity], 1)
    )
    assert (roc.get_xlabel(), roc.get_ylabel()) == ("1 - specificity", "sensitivity")
    for level in ("specificity", "sensitivity"):
        called = probabilities >= scores[f"threshold_at_95_{level}"]
        reached = called[labels == 1].mean()
        # Drawn at the level itself, which whole patches may only come near to.
        point = lines(roc)[f"95% {level}"][0]
        assert point.tolist() == pytest.approx([called[labels == 0].mean(), reached], abs=0.01)
        point = lines(recall)[f"95% {level}"][0]
        assert point.tolist() == pytest.approx([reached, labels[called].mean()])

    precision, found, _ = precision_recall_curve(labels, probabilities)
    np.testing.assert_array_equal(recall.lines[0].get_xydata(), np.stack([found, precision], 1))
    assert recall.lines[1].get_ydata()[0] == labels.mean()
    assert (recall.get_xlabel(), recall.get_ylabel()) == ("recall (sensitivity)", "precision")

    true, said = calibration_curve(labels, probabilities, n_bins=15)
    np.testing.assert_array_equal(calibration.lines[1].get_xydata(), np.stack([said, true], 1))
    named = (calibration.get_xlabel(), calibration.get_ylabel())
    assert named == ("predicted probability", "share with tumour")

    for label, bars in enumerate(histogram.containers):
        wanted, _ = np.histogram(probabilities[labels == label], np.linspace(0, 1, 31))
        assert [bar.get_height() for bar in bars] == wanted.tolist()
        assert bars[0].get_label() == ("without tumour", "with tumour")[label]


def test_learning_curves_mark_the_epoch_that_was_scored(drawn):
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "step": [7, 14, 21],
            "train_loss": [0.7, 0.5, 0.3],
            "validation_loss": [0.6, 0.4, 0.45],
        }
    )
    figures.learning_curves(history, history[history["step"] == 21])
    curves = lines(drawn[0])
    assert curves["training"].tolist() == [[1, 0.7], [2, 0.5], [3, 0.3]]
    assert curves["validation"].tolist() == [[1, 0.6], [2, 0.4], [3, 0.45]]
    assert curves["used"].tolist() == [[3, 0.45]]


def test_orange_is_for_tumour_and_blue_against_it():
    image = np.full((96, 96, 3), 200, np.uint8)
    adds = np.ones((96, 96), np.float32)
    adds[:, 48:] = -1
    red, _, blue = patches._colour(image, adds).astype(int).transpose(2, 0, 1)
    assert (red > blue + 100)[:, :40].all()
    assert (blue > red + 50)[:, 56:].all()


def test_the_settings_are_those_that_the_scores_were_made_with(config, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    averaged = copy.deepcopy(config)
    averaged.predict.tta, averaged.evaluate.split = True, "test"
    scores = histo_jax.evaluate(averaged, tmp_path / "run")
    plain = copy.deepcopy(averaged)
    plain.predict.tta = False
    report(plain, tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert ["predict.tta", "True"] in Page(text).rows
    assert f"synthetic, test: {scores['count']} patches" in words_of(text)
    # With the probabilities that were evaluated, not those of one pass.
    said = explain(plain, tmp_path / "run").set_index("id")["probability"]
    table = evaluation_files.read(tmp_path / "run", "test").set_index("id")
    np.testing.assert_allclose(said, expit(table["logit"][said.index]))


def test_the_mean_of_several_runs_is_shown_as_theirs(config, run, tmp_path):
    together, twin = copy.deepcopy(config), tmp_path / "twin"
    shutil.copytree(run, twin)
    together.predict.checkpoints = f"{run},{twin}"
    histo_jax.evaluate(together, tmp_path / "together")
    report(config, tmp_path / "together")
    words = words_of((tmp_path / "together" / "report.html").read_text())
    assert f"The mean of 2 runs: {run} (AUC" in words
    assert f"predict.checkpoints {run},{twin}" in words
    assert "Learning curves" not in words
    # Nor is one left beside the page by an earlier report; what is the user's own stays.
    curve, own = (tmp_path / "together" / "report" / n for n in ("learning_curves.svg", "own.svg"))
    curve.write_text("of another run")
    own.write_text("mine")
    report(config, tmp_path / "together")
    assert (curve.exists(), own.read_text()) == (False, "mine")
    assert re.search(r"; ([\d,]+) \+ \1 parameters", words)
    assert "The runs, each trained as its own report says, were judged on" in words
    # Only what was evaluated is explained.
    together.predict.checkpoints = str(run)
    with pytest.raises(UserError, match=f"is the mean of {run}, {twin}: set"):
        explain(together, tmp_path / "together")
    together.predict.checkpoints = f"{run},{twin}"
    with pytest.raises(UserError, match=f"{run} is a run of its own"):
        explain(together, run)
    # Nor in a folder that holds the scores of a run, and no longer its checkpoints.
    scores = json.loads((run / "evaluation_validation.json").read_text())
    trained = [TrainedModel(str(place), config, None, None, None, 0, "") for place in (run, twin)]
    with pytest.raises(UserError, match="is one run alone, not the mean of"):
        check_evaluated(trained, scores, "validation")


@pytest.mark.parametrize("verb", [report, explain])
def test_a_checkpoint_that_was_not_evaluated_is_refused(verb, config, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "evaluation_validation.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps(scores | {"checkpoint_step": 3}))
    with pytest.raises(UserError, match=r"of step 3: run --mode=evaluate .*validation again"):
        verb(config, tmp_path / "run")


@pytest.fixture(scope="module")
def explained(config, run):
    return explain(config, run)


def test_explain_draws_the_patches_of_the_galleries(config, run, explained):
    table = evaluation_files.read(run, "validation")
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
    # The frame: a black pixel around it, of four that make one of the patch.
    outside[31:65, 31:65] = False
    np.testing.assert_array_equal(left[outside], image[outside])
    assert (right != image).any()


def test_explain_takes_ids_of_any_split(config, run):
    tables = prepare(config).tables
    ids = [tables["train"]["id"][3], tables["test"]["id"][2]]
    said = explain_ids(config, run, f"{ids[0].upper()}.tif,{ids[1]}")
    assert sorted(said["id"]) == sorted(ids)
    with pytest.raises(UserError, match=r"config\.explain\.ids: no patch .* has the id 'abc'"):
        explain_ids(config, run, f"{ids[0]},abc")


@pytest.fixture
def explained_run(config, run, explained, tmp_path):
    """A copy of the run, with the pictures of its galleries and files of the user's own."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "explain" / "mine.png").write_bytes(b"my own picture")
    return tmp_path / "run"


def pictures_and_rows(run):
    rows = pd.read_csv(run / "explain" / "patches.csv", keep_default_na=False).set_index("id")
    pictures = {path.stem for path in (run / "explain").glob("*.png")} - {"mine"}
    assert pictures == set(rows.index)
    return rows


def test_pictures_of_one_checkpoint_accumulate(config, explained, explained_run):
    before = pictures_and_rows(explained_run)
    first, other = explained["id"][0], prepare(config).tables["test"]["id"][7]
    said = explain_ids(config, explained_run, f"{first},{other}")
    rows = pictures_and_rows(explained_run)
    assert rows.index.is_unique
    assert set(rows.index) == {*before.index, other}
    assert set(said["id"]) == {first, other}
    assert rows["checkpoint"].nunique() == 1
    unchanged = before.index.drop(first)
    pd.testing.assert_frame_equal(rows.loc[unchanged], before.loc[unchanged])
    # A picture that was deleted has no row any more.
    (explained_run / "explain" / f"{other}.png").unlink()
    explain_ids(config, explained_run, first)
    assert set(pictures_and_rows(explained_run).index) == set(before.index)


def as_of_other_weights(rows):
    return rows.assign(checkpoint=rows["checkpoint"].str[:-1] + "x")


def as_of_version_0_1_0(rows):
    return rows.drop(columns=["tta", "checkpoint"]).iloc[:3]


@pytest.mark.parametrize("older", [as_of_other_weights, as_of_version_0_1_0, None])
def test_pictures_of_another_checkpoint_are_removed(config, explained, explained_run, older):
    path = explained_run / "explain" / "patches.csv"
    if older:
        older(pd.read_csv(path)).to_csv(path, index=False)
    else:
        path.write_bytes(b"\xff,damaged")
    explain_ids(config, explained_run, explained["id"][1])
    assert pictures_and_rows(explained_run).index.tolist() == [explained["id"][1]]
    assert (explained_run / "explain" / "mine.png").read_bytes() == b"my own picture"


def explain_ids(config, run, ids):
    config = copy.deepcopy(config)
    config.explain.ids = ids
    return explain(config, run)


def test_figures_depend_on_no_style_of_the_user():
    drawn = figures.calibration(np.arange(16) / 15, np.arange(16) % 2.0)
    with mpl.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "black"}):
        again = figures.calibration(np.arange(16) / 15, np.arange(16) % 2.0)
        assert mpl.rcParams["font.size"] == 30
    assert drawn == again


def test_the_package_is_the_command_too(config, run):
    assert histo_jax.report is sys.modules["histo_jax.report"]
    assert histo_jax.report(config, run) == run / "report.html"


def test_probabilities_on_the_edges_of_bins_are_drawn():
    assert "<svg" in figures.calibration(np.arange(16) / 15, np.arange(16) % 2.0)
