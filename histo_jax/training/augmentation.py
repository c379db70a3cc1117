"""Random augmentation of training batches, on the device.

The label refers to the patch's centre, or to the whole patch: flips, rotations by 90 degrees and
shifts of a few pixels, which replace an edge that narrow, do not change it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PRNGKeyArray, UInt8

from histo_jax import symmetries
from histo_jax.config import AugmentConfig
from histo_jax.errors import UserError
from histo_jax.registry import AUGMENTATIONS

Images = UInt8[Array, "batch height width 3"]
FloatImages = Float32[Array, "batch height width 3"]
Augment = Callable[[PRNGKeyArray, Images], Images | FloatImages]

# Optical density of haematoxylin, eosin and a third dye for red, green and blue: Ruifrok &
# Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
_UNMIX = np.linalg.inv(_STAINS)


@partial(jax.jit, static_argnames="size")
def crop_centre(images: Images, size: int) -> UInt8[Array, "batch crop crop 3"]:
    """Returns the centre of each image, `size` pixels high and wide."""
    start = (images.shape[1] - size) // 2
    return images[:, start : start + size, start : start + size]


def random_d4(key: PRNGKeyArray, images: Images) -> Images:
    """Returns each image transformed by one of the eight symmetries of the square, uniformly."""
    element = jax.random.bernoulli(key, 0.5, (3, len(images), 1, 1, 1))
    return symmetries.transform(images, *element)


def random_shift(key: PRNGKeyArray, images: Images, pixels: int) -> Images:
    """Returns each image shifted by up to `pixels` along both axes, with reflection padding."""
    edge = (pixels, pixels)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), "reflect")
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def crop(image: Any, start: Any) -> Any:
        return jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:])

    return jax.vmap(crop)(padded, starts)


def stain_jitter(
    key: PRNGKeyArray, images: Images, strength: float, brightness: float
) -> FloatImages:
    """Returns each image with jittered stain and brightness; pixels from 0 to 255.

    The amount of each of the three dyes is multiplied by a factor between 1 - `strength` and
    1 + `strength`, and an optical density between -`brightness` and `brightness` is added.
    """
    amount_key, light_key = jax.random.split(key)
    amounts = jax.random.uniform(amount_key, (len(images), 3), minval=-strength, maxval=strength)
    light = jax.random.uniform(
        light_key, (len(images), 1, 1, 1), minval=-brightness, maxval=brightness
    )
    density = -jnp.log((images.astype(jnp.float32) + 1) / 256)
    remix = jnp.einsum("ij,bj,jk->bik", _UNMIX, 1 + amounts, _STAINS)
    density = jnp.einsum("bhwi,bik->bhwk", density, remix) + light
    return jnp.clip(256 * jnp.exp(-density) - 1, 0, 255)


def make_augment(config: AugmentConfig) -> Augment:
    """Returns the function from a random key and a batch of square images to augmented images.

    It always applies a random symmetry, then what `config` enables. Pixels are from 0 to 255:
    uint8, or float32 after stain jitter or a registered augmentation.
    """
    extra = [(name, AUGMENTATIONS.get(name)) for name in config.extra]

    def augment(key: PRNGKeyArray, images: Images) -> Images | FloatImages:
        d4_key, shift_key, stain_key = jax.random.split(key, 3)
        images = random_d4(d4_key, images)
        if config.shift:
            images = random_shift(shift_key, images, config.shift)
        if config.stain or config.brightness:
            images = stain_jitter(stain_key, images, config.stain, config.brightness)
        for index, (name, function) in enumerate(extra):
            # `fold_in` of 0 to 2 equals the keys above.
            extra_key = jax.random.fold_in(key, 3 + index)
            images = _apply(name, function, extra_key, images.astype(jnp.float32))
        return images

    return augment


def _apply(name: str, function: Any, key: PRNGKeyArray, images: FloatImages) -> FloatImages:
    changed = function(key, images)
    if jnp.shape(changed) != images.shape:
        raise UserError(
            f"augmentation {name!r} returns shape {list(jnp.shape(changed))} for images of shape "
            f"{list(images.shape)}; it must keep the shape"
        )
    return jnp.clip(changed, 0, 255).astype(jnp.float32)


def mixup(
    key: PRNGKeyArray, images: Images | FloatImages, labels: Float32[Array, " batch"], alpha: float
) -> tuple[FloatImages, Float32[Array, " batch"]]:
    """Returns each image and label mixed with the next of the batch (Zhang et al., "mixup", 2018).

    The mixing coefficient, one for the batch, is drawn from Beta(`alpha`, `alpha`).
    """
    lam = jax.random.beta(key, alpha, alpha)
    images, labels = (lam * v + (1 - lam) * jnp.roll(v, 1, 0) for v in (images, labels))
    return images, labels
