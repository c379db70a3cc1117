import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from histo_jax.data import near_duplicates


def draw_textures(count: int, seed: int = 0) -> np.ndarray:
    """Smooth noise with as much structure as tissue."""
    noise = np.random.default_rng(seed).standard_normal((count, 96, 96, 3))
    noise = gaussian_filter(noise, (0, 3, 3, 0))
    return np.clip(150 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)


def symmetries(image: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(form, k) for form in (image, image.transpose(1, 0, 2)) for k in range(4)]


def brute_force(known: np.ndarray, queries: np.ndarray) -> list[tuple[int, int, int]]:
    distance = np.bitwise_count(known[:, None, None] ^ queries).min(axis=2).T
    return [
        (row, int(bits.argmin()), int(bits.min()))
        for row, bits in enumerate(distance)
        if bits.min() <= 4
    ]


def nearest(known: np.ndarray, queries: np.ndarray) -> list[tuple[int, int, int]]:
    return list(
        zip(*(column.tolist() for column in near_duplicates.nearest(known, queries)), strict=True)
    )


def flip_bits(hashes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    bits = [rng.choice(64, count, replace=False) for _ in hashes]
    masks = [sum(1 << int(bit) for bit in some) for some in bits]
    return hashes ^ np.array(masks, np.uint64)


def random_hashes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**64, shape, np.uint64)


def test_the_first_hash_is_the_published_dct_hash():
    images = draw_textures(20)
    hashes, contrast = near_duplicates.hash_images(images)
    for image, own, deviation in zip(images, hashes[:, 0], contrast, strict=True):
        grey = image @ np.array([0.299, 0.587, 0.114])
        small = grey.reshape(32, 3, 32, 3).mean(axis=(1, 3))
        low = scipy.fft.dctn(small)[:8, :8]
        bits = np.unpackbits(np.array([own]).view(np.uint8)).reshape(8, 8)
        np.testing.assert_array_equal(bits, low > np.median(low))
        assert deviation == pytest.approx(small.std(), rel=1e-4)


def test_hashes_are_those_of_the_flipped_and_rotated_images():
    for image in draw_textures(20, seed=1):
        forms = np.stack(symmetries(image))
        hashes, _ = near_duplicates.hash_images(forms)
        own = set(hashes[:, 0].tolist())
        assert len(own) == 8
        assert all(set(row) == own for row in hashes.tolist())


def test_hashes_do_not_depend_on_the_batch():
    images = draw_textures(9)
    together, _ = near_duplicates.hash_images(images)
    apart = np.concatenate([near_duplicates.hash_images(images[k : k + 1])[0] for k in range(9)])
    np.testing.assert_array_equal(together, apart)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), known=st.integers(1, 200), queries=st.integers(1, 60),
    distance=st.integers(0, 6), crowd=st.booleans(),
)  # fmt: skip
def test_search_equals_brute_force(seed, known, queries, distance, crowd):
    rng = np.random.default_rng(seed)
    hashes = random_hashes(rng, known)
    if crowd:
        # Few bits vary, so that there are duplicates, many ties and crowded bands.
        hashes &= np.uint64(0x0003_0000_0101_0011)
    searched = random_hashes(rng, queries, 8)
    rows = rng.integers(0, known, queries)
    searched[np.arange(queries), rng.integers(0, 8, queries)] = flip_bits(
        hashes[rows], distance, rng
    )
    expected = brute_force(hashes, searched)
    assert len(expected) == queries or distance > 4
    assert nearest(hashes, searched) == expected


def test_no_neighbour_is_missed():
    """Whichever bits differ: an error in the index would lose some of many, not all."""
    rng = np.random.default_rng(9)
    hashes, searched = random_hashes(rng, 5_000), random_hashes(rng, 5_000, 8)
    searched[:, 5] = flip_bits(hashes, 4, rng)
    rows, partners, distances = near_duplicates.nearest(hashes, searched)
    np.testing.assert_array_equal(rows, np.arange(5_000))
    np.testing.assert_array_equal(partners, np.arange(5_000))
    assert (distances == 4).all()
    searched[:, 5] = flip_bits(hashes, 5, rng)
    assert nearest(hashes, searched) == []


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    rng = np.random.default_rng(2)
    hashes = random_hashes(rng, 100) & np.uint64(0xFF0F)
    searched = random_hashes(rng, 15, 8) & np.uint64(0xFF0F)
    expected = nearest(hashes, searched)
    monkeypatch.setattr(near_duplicates, "_CHUNK", chunk)
    assert nearest(hashes, searched) == expected == brute_force(hashes, searched)


def test_equal_hashes_are_compared_once(monkeypatch):
    rng = np.random.default_rng(3)
    hashes, searched = random_hashes(rng, 40_000), random_hashes(rng, 10_000, 8)
    hashes[:30_000], searched[:8_000, 3] = hashes[0], hashes[0]
    # And as many that differ, but all share the lower half.
    hashes[30_000:35_000] &= np.uint64(0xFFFFFFFF << 32)
    compared, bitwise_count = [], np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda x: compared.append(x.size) or bitwise_count(x))
    rows, partners, distances = near_duplicates.nearest(hashes, searched)
    assert sum(compared) < 2_000_000, sum(compared)  # of 3.2 billion pairs
    assert rows.tolist() == list(range(8_000))
    assert not partners.any()
    assert not distances.any()


@pytest.mark.parametrize(("known", "queries"), [(0, 3), (3, 0), (0, 0)])
def test_empty_inputs_have_no_matches(known, queries):
    rng = np.random.default_rng(4)
    assert nearest(random_hashes(rng, known), random_hashes(rng, queries, 8)) == []


def test_correlation_of_a_copy_is_one_in_all_symmetries():
    image, other = draw_textures(2)
    forms = np.stack(symmetries(image))
    np.testing.assert_allclose(
        near_duplicates.correlation(forms, np.stack([image] * 8)), 1, atol=1e-4
    )
    darker = (forms * 0.6 + 20).astype(np.uint8)
    assert near_duplicates.correlation(darker, np.stack([image] * 8)).min() > 0.99
    assert near_duplicates.correlation(forms, np.stack([other] * 8)).max() < 0.5
    flat = np.full((1, 96, 96, 3), 200, np.uint8)
    assert abs(near_duplicates.correlation(flat, image[None])[0]) < 1e-3
