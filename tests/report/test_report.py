"""The report shows what the result files hold, and no text in them can break the page."""

import copy
import html.parser
import json
import os
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score

import histo_jax
from histo_jax import evaluation_files
from histo_jax.data import overlap, splits
from histo_jax.data.example import PatchSpec
from histo_jax.data.leakage import audit
from histo_jax.ensemble import check_evaluated
from histo_jax.errors import UserError
from histo_jax.predictor import TrainedModel
from histo_jax.preparation import prepare
from histo_jax.report import explain, page, patches, report, reporting


class Page(html.parser.HTMLParser):
    """A parsed page: texts, table rows, links, and tags that are left open."""

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


def html_of(run):
    return (run / "report.html").read_text()


def words_of(text):
    return " ".join(" ".join(Page(text).texts).split())


@pytest.fixture
def words(monkeypatch):
    """Returns the words of rendered contents, without drawing the figures."""
    monkeypatch.setattr(page, "_draw_figures", lambda *_: {})
    return lambda contents: words_of(page.render(contents)[0])


@pytest.fixture
def run_copy(run, tmp_path, monkeypatch):
    """A copy of the run to change; its reports have no attribution, which takes time."""
    monkeypatch.setattr(reporting, "_load_evaluated", lambda *_: None)
    return shutil.copytree(run, tmp_path / "run")


def make_audit(text="table", has_leak=False, knows_slides=True, color_auc=0.4):
    return page.Audit(text, has_leak, knows_slides, color_auc)


def test_the_summary_comes_first_and_scores_are_those_of_the_evaluation(run):
    scores = json.loads((run / "evaluation_validation.json").read_text())
    summary = words_of(html_of(run)).partition("Scores")[0]
    assert f"AUC {scores['auc']:.3f}" in summary
    interval = f"{scores['auc_low']:.3f} to {scores['auc_high']:.3f}, by bootstrap over slides"
    assert interval in summary
    assert "with fewer than 20 slides it is unreliable" in summary
    assert "Slide-disjoint: no slide of these patches was used for training." in summary
    assert f"{scores['prior']:.0%} of them with tumour" in summary
    rows = {row[0].partition(" at threshold 0.")[0]: row[1:] for row in Page(html_of(run)).rows}
    rows |= {row[0]: row[1:] for row in Page(html_of(run)).rows}
    for name, (title, _) in page.SCORES.items():
        interval = f"{scores[f'{name}_low']:.4f} to {scores[f'{name}_high']:.4f}"
        assert rows[title] == [f"{scores[name]:.4f}", interval], name


SUMMARIES = {
    "Not known whether slide-disjoint: some patches have no": {"slide_disjoint": None},
    "Optimistic: training and evaluation may share slides": {"slide_disjoint": False},
    "too narrow if patches of one slide": {"interval_over": "patches"},
    "No confidence interval: it requires": {"auc_low": None, "auc_high": None},
    "Ensemble of 2 runs, mean of their logits: a (AUC 0.612), b (AUC 0.712).": {
        "runs": [{"run": "a", "auc": 0.612}, {"run": "b", "auc": 0.712}]
    },
}


@pytest.mark.parametrize("expected", SUMMARIES)
def test_the_summary_states_the_limits_of_the_scores(contents, words, expected):
    assert expected not in words(contents())
    changed = contents(scores=SUMMARIES[expected])
    text = words(changed)
    assert expected in text
    scores = changed.scores
    is_known = bool(scores["slide_disjoint"]) and scores["interval_over"] == "slides"
    assert ("Slide-disjoint: no slide" in text) == is_known


def test_the_page_uses_the_names_of_the_classes(contents, words):
    own = contents(source="images", classes=("not <b>$x$", "<b>$x$"), patch_spec=PatchSpec(64))
    text = words(own)
    assert "<b>$x$ classifier: w" in text
    assert "classifies patches as <b>$x$ or not <b>$x$." in text
    assert "tumour" not in text.casefold()
    assert "lymph" not in text
    assert "of the patches are of class <b>$x$, as here" in text
    assert "of the patches have tumour, as here" in words(contents())


def test_the_summary_states_the_result_of_the_audit(contents, words):
    for has_leak, expected in ((True, "The audit found a leak"), (False, "found no patches or sl")):
        text = words(contents(audit=make_audit("LEAK: one", has_leak=has_leak)))
        assert expected in text.partition("Scores")[0]
        assert "LEAK: one" in text
        assert "was not audited" not in text
    text = words(contents(audit=make_audit(knows_slides=False)))
    assert "no patches shared between splits; shared slides could not be checked." in text
    text = words(contents())
    assert "was not audited" in text
    assert "The audit found" not in text


def test_the_page_begins_with_purpose_and_date_and_explains_each_score(config, run_copy):
    os.utime(run_copy / "evaluation_validation.json", (1e9, 1e9))
    report(config, run_copy)
    text = html_of(run_copy)
    beginning = words_of(text).partition("Tumour classifier: run")[2].partition("AUC 0.")[0]
    assert "classifies H&E-stained patches of lymph node" in beginning
    assert "Research use only. Not a medical device." in beginning
    assert "evaluated on 2001-09-09" in beginning
    # The page does not depend on the current date.
    report(config, run_copy)
    assert html_of(run_copy) == text
    rows = Page(text).rows
    for name, (title, _) in page.SCORES.items():
        if name != "auc":  # explained in the summary
            (place,) = [n for n, row in enumerate(rows) if row and row[0].startswith(title)]
            assert len(rows[place + 1]) == 1, name
            assert len(rows[place + 1][0]) > 30, name
    prior = json.loads((run_copy / "evaluation.json").read_text())["prior"]
    assert f"{prior:.3f} is chance" in text
    assert "nats" not in text


COLOR = {
    "Colour histograms perform better": {"auc_low": 0.7, "color_auc": 0.81},
    "Colour histograms perform as well": {"auc_low": 0.7, "color_auc": 0.8},
    "not significantly better, as this is within its": {"auc_low": 0.7, "color_auc": 0.75},
    "not significantly better, as it has no": {"auc_low": None, "color_auc": 0.75},
    "outperforms logistic regression on colour histograms, which reaches AUC 0.600": {
        "auc_low": 0.7,
        "color_auc": 0.6,
    },
    "On the validation split, logistic regression on colour histograms reaches AUC 0.900": {
        "auc_low": 0.7,
        "color_auc": 0.9,
        "split": "test",
    },
}


@pytest.mark.parametrize("expected", COLOR)
def test_the_network_is_compared_with_colour_histograms(contents, words, expected):
    changes = COLOR[expected]
    text = words(
        contents(
            audit=make_audit(color_auc=changes["color_auc"]),
            split=changes.get("split", "validation"),
            scores={"auc": 0.8, "auc_low": changes["auc_low"]},
        )
    )
    assert [other for other in COLOR if other in text] == [expected]
    if expected.startswith("Colour histograms"):
        # As the headline, before the AUC of the network.
        assert text.index(expected) < text.index("AUC 0.800", text.index("Research use only"))


def test_only_an_audit_of_the_evaluated_patches_is_shown(config, run_copy):
    def report_with(result):
        (run_copy / "audit.json").write_text(json.dumps(result))
        report(config, run_copy)
        return words_of(html_of(run_copy))

    prepared = prepare(config)
    result = audit(prepared, splits.make_subsets(prepared.tables, config.data, config.data_seed), 0)
    result["note"] = "optimistic, which the page states in its own words"
    text = report_with(result)
    auc = result["colour_histogram_baseline"]["validation_auc"]
    assert re.search(rf"[Cc]olour histograms.{{1,40}}reaches AUC {auc:.3f}", text)
    assert "The audit found no patches or slides shared between splits." in text
    assert result["note"] not in text
    for older in (result["subsets"]["train"] | {"digest": "x"}, {"patches": 1}):
        text = report_with(result | {"subsets": result["subsets"] | {"train": older}})
        assert "is of other patches or from an earlier version: run --mode=audit" in text
        assert "The audit found" not in text
        assert f"{auc:.3f}" not in text


def test_each_caveat_is_stated_once(contents, words):
    changed = contents(
        audit=make_audit("slides: not known, cannot be checked", knows_slides=False),
        scores={
            "slide_disjoint": False,
            "interval_over": "patches",
            "resampled": 40,
            "note": f"{overlap.OPTIMISTIC}; these patches selected the checkpoint",
        },
    )
    text = words(changed)
    for caveat in ("may share slides", "checkpoint was selected", "fitted", "too narrow"):
        assert text.count(caveat) == 1, caveat
    assert text.count("not known") == 1
    assert "checkpoint was selected" not in words(contents(split="test"))


def test_the_legend_explains_colours_frame_and_size(contents, words):
    text = words(contents())
    for part in ("Orange raises the predicted", "Blue lowers it", "32x32 of 96x96", "93 micro"):
        assert text.count(part) == 1, part
    assert "inset: 33.33%" in page.render(contents())[0]
    quarter, _ = page.render(contents(patch_spec=PatchSpec(256, 128)))
    assert "inset: 25.00%" in quarter
    assert "128x128 of 256x256 pixels." in quarter
    for spec in (PatchSpec(256), PatchSpec(256, 256, 0.5)):  # the label is of the whole patch
        html, _ = page.render(contents(source="mine", patch_spec=spec))
        assert "classifies patches as tumour or no tumour" in html
        assert not [word for word in ("framed::after", "Frame:", "micrometres") if word in html]
    assert "slides are synthetic" in words(contents(source="synthetic"))
    (patch,) = contents().galleries["Highest loss"]
    text = words(contents(galleries={"Highest loss": [patch._replace(attribution=None)]}))
    assert "Frame: the centre region" in text
    assert "Orange" not in text


def test_thresholds_are_rounded_so_that_their_levels_hold(contents, words):
    extreme = {
        "threshold_at_95_specificity": 0.9996341,
        "threshold_at_95_sensitivity": 0.00040378,
    }
    changed = contents(scores=extreme)
    text = words(changed)
    assert "sensitivity at 95% specificity at threshold 0.999635" in text
    assert "specificity at 95% sensitivity at threshold 0.000403" in text
    # The slider has no such positions: it would classify none, or all, as tumour.
    assert "data-position=" not in page.render(changed)[0]
    missing = {"threshold_at_95_specificity": None, "threshold_at_95_sensitivity": 0.25}
    text, _ = page.render(contents(scores=missing))
    assert re.findall(r'data-position="(\d+)">([^<]+)<', text) == [("250", "95% sensitivity")]
    assert "at threshold 0.250" in words_of(text)
    assert "95% specificity at threshold" not in words_of(text)


def test_the_page_is_one_accessible_file_without_external_links(run):
    parsed = Page(html_of(run))
    assert parsed.links
    assert all(link.startswith(("data:", "#")) for link in parsed.links)
    assert "url(http" not in html_of(run)
    assert [tag for tag, _ in parsed.tags].count("svg") == 5
    assert not parsed.open
    assert {path.stem for path in (run / "report").iterdir()} == set(page.FIGURES)
    buttons = [attributes for tag, attributes in parsed.tags if tag == "button"]
    assert sum(attributes.get("class") == "patch" for attributes in buttons) > 24
    assert all("alt" in attributes for tag, attributes in parsed.tags if tag == "img")
    labels = [a["aria-label"] for a in buttons if a.get("class") == "patch"]
    assert all("tumour, predicted probability of tumour: 0." in label for label in labels)
    labelled = [a["for"] for tag, a in parsed.tags if tag == "label"]
    assert all(a["id"] in labelled for tag, a in parsed.tags if tag == "input")
    assert all(a.get("aria-label") for tag, a in parsed.tags if tag == "figure")


def test_the_slider_has_the_counts_of_every_threshold(run):
    table = evaluation_files.read(run, "validation")
    probabilities = expit(table["logit"])
    counts = json.loads(re.search(r"const counts = (.*);", html_of(run))[1])
    for position in (0, 171, 500, 1000):
        is_positive = probabilities >= position / 1000
        assert counts["positives"][position] == (is_positive & (table["label"] == 1)).sum()
        assert counts["negatives"][position] == (is_positive & (table["label"] == 0)).sum()


def test_galleries_show_high_loss_and_uncertain_patches(run):
    table = evaluation_files.read(run, "validation")
    text = html_of(run)
    loss = np.logaddexp(0, np.where(table["label"] == 1, -1, 1) * table["logit"])
    order = np.argsort(-loss, kind="stable")
    is_wrong = (table["logit"] > 0) != (table["label"] == 1)
    assert f"{is_wrong.sum()} of {len(table)} patches are misclassified at threshold 0.5" in text
    gallery = text.partition("Highest loss")[2].partition("Most uncertain")[0]
    expected = table["id"][order][is_wrong[order]][: patches._SHOWN]
    shown = re.findall(r'<br>\s*<span class="soft">(\w{12})', gallery)
    assert shown == [name[:12] for name in expected]


def test_the_high_loss_gallery_holds_misclassified_patches_only(contents, words):
    table = pd.DataFrame({"logit": [-3.0, 2, -1, 4], "label": [0, 0, 1, 1]})
    assert patches.galleries(table, 0)["Highest loss"].tolist() == [1, 2]
    assert "integrated gradients" not in words(contents(galleries={"Highest loss": []}))


def test_the_slide_table_is_sorted_by_loss(run):
    table = evaluation_files.read(run, "validation")
    rows = [row for row in Page(html_of(run)).rows if row[0] in set(table["slide"])]
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


def test_a_report_without_checkpoint_has_no_attribution(config, run, tmp_path):
    for name in ("evaluation_validation.json", "predictions_validation.csv", "history.csv"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    report(config, tmp_path)
    text = html_of(tmp_path)
    assert "integrated gradients" not in text
    assert 'class="patch"' not in text
    assert all(attributes.get("alt") for tag, attributes in Page(text).tags if tag == "img")


def test_a_report_needs_an_evaluation_of_the_same_patches(config, run, tmp_path):
    with pytest.raises(UserError, match=r"predictions_validation\.csv is missing: run"):
        report(config, tmp_path)
    assert not any(tmp_path.iterdir())
    for path in run.glob("*_validation.*"):
        (tmp_path / path.name).write_text(path.read_text())
    path = tmp_path / "predictions_validation.csv"
    pd.read_csv(path).iloc[1:].to_csv(path, index=False)
    with pytest.raises(UserError, match="patches are not those that were evaluated"):
        report(config, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_of_thirty_thousand_patches_is_small_and_reproducible(many):
    text, svgs = page.render(many)
    assert len(text) < 5e6
    assert sum(map(len, svgs.values())) < 300_000
    assert (text, svgs) == page.render(many)


def test_settings_of_the_evaluation_are_shown(config, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    evaluated = copy.deepcopy(config)
    evaluated.predict.tta, evaluated.evaluate.split = True, "test"
    scores = histo_jax.evaluate(evaluated, tmp_path / "run")
    plain = copy.deepcopy(evaluated)
    plain.predict.tta = False
    report(plain, tmp_path / "run")
    text = html_of(tmp_path / "run")
    assert ["predict.tta", "True"] in Page(text).rows
    assert f"synthetic, test split: {scores['count']} patches" in words_of(text)
    # `explain` shows the probabilities of the evaluation, not of its own forward pass.
    probabilities = explain(plain, tmp_path / "run").set_index("id")["probability"]
    table = evaluation_files.read(tmp_path / "run", "test").set_index("id")
    np.testing.assert_allclose(probabilities, expit(table["logit"][probabilities.index]))


def test_a_report_of_an_ensemble_names_its_runs(config, run, tmp_path):
    ensemble, twin = copy.deepcopy(config), tmp_path / "twin"
    shutil.copytree(run, twin)
    ensemble.predict.checkpoints = f"{run},{twin}"
    histo_jax.evaluate(ensemble, tmp_path / "ensemble")
    # Files of an earlier report are removed, those of the user are kept.
    (tmp_path / "ensemble" / "report").mkdir()
    curve, own = (tmp_path / "ensemble" / "report" / n for n in ("learning_curves.svg", "own.svg"))
    curve.write_text("of another run")
    own.write_text("mine")
    report(config, tmp_path / "ensemble")
    assert (curve.exists(), own.read_text()) == (False, "mine")
    text = words_of(html_of(tmp_path / "ensemble"))
    assert f"Ensemble of 2 runs, mean of their logits: {run} (AUC" in text
    assert f"predict.checkpoints {run},{twin}" in text
    assert "Learning curves" not in text
    assert re.search(r"; ([\d,]+) \+ \1 parameters", text)
    assert "Each run is described in its own report. They were evaluated on" in text
    # `explain` refuses networks that were not evaluated.
    ensemble.predict.checkpoints = str(run)
    with pytest.raises(UserError, match=f"is the mean of {run}, {twin}: set"):
        explain(ensemble, tmp_path / "ensemble")
    ensemble.predict.checkpoints = f"{run},{twin}"
    with pytest.raises(UserError, match=f"{run} is itself a trained run"):
        explain(ensemble, run)
    # Also in a folder with the scores of a run that has lost its checkpoints.
    scores = json.loads((run / "evaluation_validation.json").read_text())
    trained = [
        TrainedModel(str(path), config, None, None, None, 0, "", PatchSpec(96))
        for path in (run, twin)
    ]
    with pytest.raises(UserError, match="a single run was evaluated, not the mean of"):
        check_evaluated(trained, scores, "validation")


@pytest.mark.parametrize("command", [report, explain])
def test_a_checkpoint_that_was_not_evaluated_is_refused(command, config, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "evaluation_validation.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps(scores | {"checkpoint_step": 3}))
    with pytest.raises(UserError, match=r"of step 3: rerun --mode=evaluate .*validation"):
        command(config, tmp_path / "run")


def test_the_package_is_callable_as_the_command(config, run_copy):
    assert histo_jax.report is sys.modules["histo_jax.report"]
    assert histo_jax.report(config, run_copy) == run_copy / "report.html"
