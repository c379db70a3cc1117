import hashlib

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histo_jax.data.sources import synthetic

SLIDES = 8


@pytest.fixture(scope="module")
def train():
    return list(synthetic.generate(7, SLIDES, "train"))


@pytest.fixture(scope="module")
def test():
    return list(synthetic.generate(7, SLIDES, "test"))


def test_examples_are_well_formed(train):
    assert len(train) == SLIDES * synthetic.PATCHES_PER_SLIDE
    for example in train:
        assert example.image.shape == (96, 96, 3)
        assert example.image.dtype == np.uint8
        assert type(example.label) is int
        assert example.label in (0, 1)
        assert example.id == hashlib.sha1(example.image.tobytes()).hexdigest()
    assert len({example.id for example in train}) == len(train)
    assert {e.slide for e in train} == {f"synthetic-train-{k:03d}" for k in range(SLIDES)}


@pytest.mark.parametrize(("slides", "expected"), [(1, 1), (7, 1), (8, 2), (12, 3)])
def test_test_split_has_a_quarter_of_the_slides(monkeypatch, slides, expected):
    monkeypatch.setattr(synthetic, "generate_slide", lambda seed, split, number: [number])
    assert list(synthetic.generate(0, slides, "test")) == list(range(expected))
    assert list(synthetic.generate(0, slides, "train")) == list(range(slides))


def test_a_slide_depends_on_seed_split_and_number_alone(train):
    last = train[-synthetic.PATCHES_PER_SLIDE :]
    alone = synthetic.generate_slide(7, "train", SLIDES - 1)
    assert [e.id for e in alone] == [e.id for e in last]
    assert [e[2:] for e in alone] == [e[2:] for e in last]
    assert list(synthetic.generate(7, 1, "train"))[5].id == train[5].id


def test_seed_changes_the_slide(train):
    other = synthetic.generate_slide(8, "train", 0)
    assert not {e.id for e in other} & {e.id for e in train}


def test_splits_share_neither_slides_nor_patches(train, test):
    assert not {e.slide for e in train} & {e.slide for e in test}
    assert not {e.id for e in train} & {e.id for e in test}


def test_every_slide_has_both_classes_and_they_vary(train, test):
    labels = np.array([e.label for e in train + test]).reshape(-1, synthetic.PATCHES_PER_SLIDE)
    fractions = labels.mean(1)
    assert (fractions >= 0.375).all()
    assert (fractions <= 0.625).all()
    assert len(set(fractions.tolist())) > 1


def test_the_label_says_whether_the_centre_has_tumour(train):
    images, masks = synthetic.generate_patches(7, "train", 0)
    centres = masks[:, 32:64, 32:64]
    assert masks.dtype == bool
    assert masks.shape == images.shape[:3]
    slide = train[: len(images)]
    np.testing.assert_array_equal(images, np.stack([e.image for e in slide]))
    labels = np.array([e.label for e in slide])
    np.testing.assert_array_equal(centres.any((1, 2)), labels == 1)
    assert centres[labels == 1].mean((1, 2)).min() >= synthetic.MIN_TUMOUR_FRACTION
    assert masks[labels == 0].any(), "negatives must show tumour beside the centre"


def test_slides_differ_in_hue_and_strength_of_stain(train):
    pixels = np.stack([e.image for e in train]).reshape(SLIDES, -1, 3)[:, ::7]
    densities = -np.log((pixels + 1.0) / 256)
    # Without glass, whose area would count as strength.
    stains = np.stack([d[d.sum(1) > 0.6].mean(0) for d in densities])
    strength = np.linalg.norm(stains, axis=1, keepdims=True)
    assert np.log(strength).std() > 0.06
    assert (stains / strength).std(0).max() > 0.025


def _auc_on_unseen_slides(examples, features):
    """Returns the AUC of a logistic regression on slides that it was not trained on."""
    labels = np.array([e.label for e in examples])
    slides = np.array([e.slide for e in examples])
    scores = np.empty(len(labels))
    for fold in np.array_split(np.unique(slides), 3):
        held = np.isin(slides, fold)
        model = make_pipeline(StandardScaler(), LogisticRegression())
        scores[held] = model.fit(features[~held], labels[~held]).decision_function(features[held])
    return roc_auc_score(labels, scores)


def test_colour_alone_does_not_separate_the_classes(train, test):
    colours = np.stack([e.image.mean((0, 1)) for e in train + test])
    assert _auc_on_unseen_slides(train + test, colours) < 0.75


def test_texture_of_the_centre_is_better_than_chance(train, test):
    """Labels that did not belong to the images would score about 0.5."""
    centres = np.stack([e.image[32:64, 32:64] for e in train + test]).mean(-1)
    power = np.abs(np.fft.rfft2(centres)) ** 2
    ring = np.hypot(*np.meshgrid(np.fft.rfftfreq(32), np.fft.fftfreq(32))) * 32
    features = [np.log(power[:, (ring >= k) & (ring < k + 2)].mean(-1)) for k in range(1, 16, 2)]
    assert _auc_on_unseen_slides(train + test, np.stack(features, -1)) > 0.57


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        list(synthetic.generate(0, 1, "valid"))
