import jax
import numpy as np
import scipy.fft

from histo_jax import symmetries

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)


def forms(images):
    return [symmetries.transform(images, *element) for element in symmetries.ELEMENTS]


def test_the_elements_are_the_eight_symmetries_and_the_first_the_identity():
    expected = {
        np.rot90(image, turns, (1, 2)).tobytes()
        for image in (IMAGES, IMAGES.swapaxes(1, 2))
        for turns in range(4)
    }
    assert {form.tobytes() for form in forms(IMAGES)} == expected
    assert len(expected) == 8
    np.testing.assert_array_equal(forms(IMAGES)[0], IMAGES)


def test_traced_and_mixed_elements_give_what_constant_ones_do():
    elements = np.array(symmetries.ELEMENTS)
    images = jax.numpy.asarray(IMAGES)
    traced = jax.jit(jax.vmap(lambda element: symmetries.transform(images, *element)))
    np.testing.assert_array_equal(traced(elements), forms(IMAGES))
    one_each = np.repeat(IMAGES[:1], 8, 0)
    mixed = symmetries.transform(one_each, *elements.T.reshape(3, 8, 1, 1, 1))
    np.testing.assert_array_equal(mixed, np.concatenate(forms(IMAGES[:1])))


def test_spectra_permutations_and_products_belong_to_the_same_elements():
    grey = IMAGES[..., 0].astype(np.float64)
    permutations, relative = symmetries.permutations(6), symmetries.relative()
    for g, element in enumerate(symmetries.ELEMENTS):
        form = symmetries.transform(grey, *element)
        spectrum = symmetries.transform_dct(scipy.fft.dctn(grey, axes=(1, 2)), *element)
        np.testing.assert_allclose(spectrum, scipy.fft.dctn(form, axes=(1, 2)), atol=1e-9)
        np.testing.assert_array_equal(grey.reshape(2, 36)[:, permutations[g]], form.reshape(2, 36))
        for h in range(8):
            product = permutations[relative[g, h]][permutations[g]]
            np.testing.assert_array_equal(product, permutations[h])
