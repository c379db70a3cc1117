import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histo_jax.config import AugmentConfig
from histo_jax.training import augmentation

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def draw(count=64, subset=16):
    return RNG.integers(0, 256, (count, subset, subset, 3), dtype=np.uint8)


def test_augmentation_gives_all_eight_symmetries_equally_often():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    counts = {
        np.rot90(transposed, turns).tobytes(): 0
        for transposed in (image, image.transpose(1, 0, 2))
        for turns in range(4)
    }
    assert len(counts) == 8
    images = augmentation.random_d4(jax.random.key(0), jnp.asarray(np.repeat(image[None], 4000, 0)))
    for one in np.asarray(images):
        counts[one.tobytes()] += 1
    # 500 expected each; five standard deviations of the binomial are 105.
    assert all(395 < count < 605 for count in counts.values())


def test_shifts_are_equally_likely_and_mirror_the_border():
    image = draw(1)[0]
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect")
    counts = {padded[i : i + 16, j : j + 16].tobytes(): 0 for i in range(5) for j in range(5)}
    assert len(counts) == 25
    for one in np.asarray(
        augmentation.random_shift(KEY, jnp.asarray(np.repeat(image[None], 2500, 0)), 2)
    ):
        counts[one.tobytes()] += 1
    # 100 expected each; five standard deviations of the binomial are 49.
    assert all(51 < count < 149 for count in counts.values())


def test_stain_changes_nothing_at_strength_zero():
    images = draw()
    got = augmentation.stain_jitter(KEY, jnp.asarray(images), 0.0, 0.0)
    assert np.abs(np.asarray(got) - images).max() < 0.01


def test_stain_scales_each_dye_and_adds_light():
    """Unmixed by numpy, each image's dyes must all have changed by one factor of the range."""
    images = RNG.integers(60, 200, (200, 4, 4, 3), dtype=np.uint8)

    def amounts(pixels):
        return -np.log((np.asarray(pixels, np.float64) + 1) / 256) @ augmentation._UNMIX

    got = augmentation.stain_jitter(KEY, jnp.asarray(images), 0.2, 0.0)
    factors = (amounts(got) / amounts(images)).reshape(200, 16, 3)
    whole = ((got > 1) & (got < 254)).all((1, 2, 3))  # nothing was clipped
    assert whole.mean() > 0.5
    factors = factors[np.asarray(whole)]
    one = np.median(factors, 1)
    assert np.median(np.abs(factors - one[:, None])) < 1e-3
    assert 0.8 <= one.min() < 0.85
    assert 1.15 < one.max() <= 1.2
    assert np.abs(np.corrcoef(one.T)[~np.eye(3, dtype=bool)]).max() < 0.35

    lit = augmentation.stain_jitter(KEY, jnp.asarray(images), 0.0, 0.1)
    density = np.log((images + 1.0) / (np.asarray(lit, np.float64) + 1))
    assert np.ptp(density, (1, 2, 3)).max() < 1e-3
    assert -0.1 <= density.min() < -0.08
    assert 0.08 < density.max() <= 0.1001


def test_mixing_takes_labels_along_with_images():
    images, labels = draw(8).astype(np.float32), np.arange(8, dtype=np.float32) % 2
    mixed, mixed_labels = augmentation.mixup(KEY, jnp.asarray(images), jnp.asarray(labels), 0.4)
    lam = float(mixed_labels[1])  # of a tumour patch mixed with one without
    assert 0 < lam < 1
    expected = lam * images + (1 - lam) * np.roll(images, 1, 0)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("field", ["shift", "stain", "brightness"])
def test_each_setting_acts_and_is_off_by_default(field):
    images = jnp.asarray(draw())
    plain = augmentation.make_augment(AugmentConfig())(KEY, images)
    assert plain.dtype == np.uint8
    augment = augmentation.make_augment(AugmentConfig(**{field: 2 if field == "shift" else 0.2}))
    changed = augment(KEY, images)
    assert changed.shape == images.shape
    assert np.abs(np.asarray(changed) - np.asarray(plain)).max() > 10
    np.testing.assert_array_equal(changed, augment(KEY, images))
