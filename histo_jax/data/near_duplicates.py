"""Near-duplicates: a perceptual hash in all symmetries, its nearest-neighbour search, a check."""

import itertools

import numpy as np
import scipy.fft
from jaxtyping import Float32, Int, UInt8, UInt64

from histo_jax import symmetries

# Hashes match when at most this many of their 64 bits differ: JPEG of quality 75 changed no more
# on 294 of Kaggle's patches. Below the contrast `BLANK` noise decides: JPEG changed up to 14 bits.
MAX_DISTANCE, BLANK = 4, 2.0
# Matching patches with at least this correlation are one image: PatchCamelyon's unrelated patches
# that match by chance have at most 0.82, copies by JPEG of quality 75 at least 0.977.
MIN_CORRELATION = 0.9
# Luma of ITU-R BT.601, as Pillow's mode "L".
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Linear map of a column of 32 values to their 8 lowest frequencies.
_COSINES = scipy.fft.dct(np.eye(32, dtype=np.float32), axis=0)[:8]
_BANDS = 6
_BAND_MASKS = [np.uint64(sum(1 << bit for bit in range(k, 64, _BANDS))) for k in range(_BANDS)]
# Candidates compared at a time: about 50 MB of temporary arrays.
_CHUNK = 1 << 20


def hash_images(
    images: UInt8[np.ndarray, "n size size 3"],
) -> tuple[UInt64[np.ndarray, "n 8"], Float32[np.ndarray, " n"]]:
    """Returns hashes of the low frequencies of images in each of the eight symmetries.

    The "DCT hash" of Zauner 2010 (Implementation and Benchmarking of Perceptual Image Hash
    Functions, 3.2.1) as `imagehash.phash` computes it: grey, 32x32, two-dimensional DCT, lowest
    8x8 coefficients, a bit where one is above their median. Here means of equal squares reduce the
    image, 3x3 pixels of a patch of 96x96.

    One transform gives the hashes of all symmetries.

    Returns:
        hashes, of the symmetries in the order of `symmetries.ELEMENTS`, so that column 0 is the
        image's own; contrast, the standard deviation of the 32x32 means, grey levels (0 to 255).
    """
    edge = np.float32(images.shape[1] // 32)
    means = np.repeat(np.eye(32, dtype=np.float32), int(edge), axis=1) / edge
    small = means @ _grey(images) @ means.T
    low = _COSINES @ small @ _COSINES.T
    transformed = [symmetries.transform_dct(low, *element) for element in symmetries.ELEMENTS]
    eight = np.stack(transformed, axis=1).reshape(-1, 8, 64)
    bits = eight > np.median(eight, axis=2, keepdims=True)
    return np.packbits(bits, axis=2).view(np.uint64)[..., 0], small.std(axis=(1, 2))


def nearest(
    known: UInt64[np.ndarray, " n"], queries: UInt64[np.ndarray, "m 8"]
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Returns for each row of `queries` its nearest hash of `known`, if within `MAX_DISTANCE`.

    Exact, by the pigeonhole principle: at most 4 differing bits leave at least 2 of 6 bands of
    bits equal, so only hashes that share two bands (21 bits) are compared. Equal hashes are
    compared once, and candidates in chunks, so that memory stays flat.

    Returns:
        the k rows of `queries` that have one, ascending; its row in `known`, the first of several;
        and its distance in bits. The nearest of a row's eight hashes counts.
    """
    known, first = np.unique(known, return_index=True)
    unique_queries, origin = np.unique(queries, return_inverse=True)
    # Distance and row in one number, so that one minimum finds the nearest, then the first.
    best = np.full(len(unique_queries), 64 << 32)
    for bands in itertools.combinations(_BAND_MASKS, _BANDS - MAX_DISTANCE):
        mask = np.bitwise_or.reduce(bands)
        order = np.argsort(known & mask)
        keys = (known & mask)[order]
        start = np.searchsorted(keys, unique_queries & mask, "left")
        count = np.searchsorted(keys, unique_queries & mask, "right") - start
        rows = np.flatnonzero(count)
        ends = np.cumsum(count[rows])
        cuts = np.searchsorted(ends, np.arange(_CHUNK, count.sum(), _CHUNK))
        for part in np.split(rows, cuts):
            counts = count[part]
            begin = np.cumsum(counts) - counts
            candidates = order[np.repeat(start[part] - begin, counts) + np.arange(counts.sum())]
            distance = np.bitwise_count(known[candidates] ^ np.repeat(unique_queries[part], counts))
            packed = (distance.astype(np.int64) << 32) | first[candidates]
            best[part] = np.minimum(best[part], np.minimum.reduceat(packed, begin))
    per_row = best[origin].reshape(queries.shape).min(axis=1)
    rows = np.flatnonzero(per_row >> 32 <= MAX_DISTANCE)
    return rows, per_row[rows] & 0xFFFFFFFF, per_row[rows] >> 32


def correlation(
    first: UInt8[np.ndarray, "n size size 3"], second: UInt8[np.ndarray, "n size size 3"]
) -> Float32[np.ndarray, " n"]:
    """Returns Pearson's correlation of each pair's grey pixels, the best of eight symmetries.

    Brightness and contrast do not matter. An image of one flat colour has correlation 0.
    """
    a, b = (grey - grey.mean(axis=(1, 2), keepdims=True) for grey in map(_grey, (first, second)))
    size = np.linalg.norm(a, axis=(1, 2)) * np.linalg.norm(b, axis=(1, 2))
    products = [
        np.einsum("nij,nij->n", symmetries.transform(a, *element), b)
        for element in symmetries.ELEMENTS
    ]
    return np.max(products, axis=0) / np.maximum(size, np.float32(1e-6))


def _grey(images: UInt8[np.ndarray, "n size size 3"]) -> Float32[np.ndarray, "n size size"]:
    return images.astype(np.float32) @ _LUMA
