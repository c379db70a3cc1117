"""Which of two runs is better, in words."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from histo_jax import comparison
from histo_jax.config import Config
from histo_jax.errors import UserError
from histo_jax.metrics import binary_scores


@pytest.fixture
def scored(tmp_path):
    """Makes the folder of a run whose logits are the labels, times a scale, in noise."""

    def make(name, slides, scale=1.0, noise=1.0, **scores):
        labels = np.arange(600) % 2
        drawn = np.random.default_rng(0).normal(size=600)
        table = pd.DataFrame(
            {
                "id": [f"{number:04d}" for number in range(600)], "label": labels,
                "slide": [f"slide {number % slides}" if slides else "" for number in range(600)],
                "logit": scale * (2 * labels - 1 + noise * drawn),
            }
        )  # fmt: skip
        (tmp_path / name).mkdir()
        table.to_csv(tmp_path / name / "predictions_validation.csv", index=False)
        now = binary_scores(table["logit"].to_numpy(), labels.astype(float))
        path = tmp_path / name / "evaluation_validation.json"
        path.write_text(json.dumps(now | {"slide_disjoint": True} | scores))
        return str(tmp_path / name)

    return make


def verdict_of(*runs):
    config = Config()
    config.compare.runs = ",".join(runs)
    result = comparison.compare(config, Path(runs[0]).parent)
    return result, result["verdict"]


def test_the_verdict_names_the_better_run_in_both_orders(scored):
    worse, better = scored("worse", 30, noise=1.5), scored("better", 30, noise=0.7)
    for runs in ((worse, better), (better, worse)):
        result, verdict = verdict_of(*runs)
        for name, title in (("auc", "AUC"), ("nll", "NLL")):
            low, high = sorted(map(abs, result[name]["interval"]))
            gain = abs(result[name]["difference"])
            assert f"{title} (by {gain:.4f}, 95% {low:.4f} to {high:.4f})" in verdict
        assert verdict.startswith(f"{better} is better in AUC")
        assert worse not in verdict
        assert "few" not in verdict
        assert "\n" not in verdict


def test_the_verdict_names_each_score_for_itself(scored):
    # The same ranking, and probabilities that are far too sure of themselves.
    plain, sure = scored("plain", 30), scored("sure", 30, scale=9.0)
    _, verdict = verdict_of(sure, plain)
    assert verdict.startswith(f"{plain} is better in NLL (by ")
    assert verdict.endswith("; AUC: no significant difference")
    _, verdict = verdict_of(plain, plain)
    assert verdict == "AUC and NLL: no significant difference"


@pytest.mark.parametrize(
    ("slides", "scores", "caveat"),
    [
        (0, {}, "slides are not known, so the intervals are too narrow"),
        (10, {}, "few slides (10), so the intervals may be too narrow"),
        (
            30,
            {"slide_disjoint": False},
            "slides may be shared with training, so this may not hold for other",
        ),
        (30, {"slide_disjoint": None}, None),
        (5, {}, "too few slides to show a difference (5; at least 6"),
        (1, {}, "too few slides to show a difference (1; at least 6"),
    ],
)
def test_the_verdict_says_what_may_be_wrong_with_it(scored, slides, scores, caveat):
    _, verdict = verdict_of(scored("a", slides), scored("b", slides, noise=0.5, **scores))
    assert (caveat or "NLL (by") in verdict
    assert ("is better in" in verdict) == (slides not in (1, 5))
    assert sum(text in verdict for text in ("not known", "few", "shared")) == (caveat is not None)


@pytest.mark.parametrize("changes", [{"auc": 0.1}, {"nll": None}, {"count": 599}])
def test_scores_of_other_predictions_are_refused(scored, changes):
    """As a process leaves them that is killed between the two files."""
    runs = scored("a", 30), scored("b", 30, **changes)
    with pytest.raises(UserError, match=r"b/evaluation_validation.json does not match the pred"):
        verdict_of(*runs)
    for text in ("{", "[1]"):
        Path(runs[1], "evaluation_validation.json").write_text(text)
        with pytest.raises(UserError, match=r"b/evaluation_validation.json is corrupt: "):
            verdict_of(*runs)
    Path(runs[1], "evaluation_validation.json").unlink()
    assert verdict_of(*runs)[1]
