"""Random changes of training batches that keep the label, on the device.

The label speaks of the centre 32x32 alone: flips, quarter turns and shifts of a few pixels keep it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PRNGKeyArray, UInt8

from histo_jax.config import AugmentConfig

Images = UInt8[Array, "batch height width 3"]

# Optical density of haematoxylin, eosin and a third dye for red, green and blue: Ruifrok &
# Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
_UNMIX = np.linalg.inv(_STAINS)


def transform(images: Any, transpose: Any, flip_rows: Any, flip_columns: Any) -> Any:
    """Returns images [batch, side, side, ...] transposed and flipped where the conditions hold."""
    images = jnp.where(transpose, images.swapaxes(1, 2), images)
    images = jnp.where(flip_rows, images[:, ::-1], images)
    return jnp.where(flip_columns, images[:, :, ::-1], images)


def turn(key: PRNGKeyArray, images: Images) -> Images:
    """Returns each image in one of the eight symmetries of the square, each equally likely."""
    return transform(images, *jax.random.bernoulli(key, 0.5, (3, len(images), 1, 1, 1)))


def shift(key: PRNGKeyArray, images: Images, pixels: int) -> Images:
    """Returns each image moved by up to `pixels` along both axes; its border is mirrored in."""
    edge = (pixels, pixels)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), "reflect")
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def cut(image: Any, start: Any) -> Any:
        return jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:])

    return jax.vmap(cut)(padded, starts)


def stain(
    key: PRNGKeyArray, images: Images, strength: float, brightness: float
) -> Float32[Array, "batch height width 3"]:
    """Returns each image as if stained and lit otherwise; pixels from 0 to 255.

    The amounts of the three dyes, each on its own, are multiplied by 1 - `strength` to
    1 + `strength`, and an optical density from -`brightness` to `brightness` is added.
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


def augment(key: PRNGKeyArray, images: Images, config: AugmentConfig) -> Any:
    """Returns the images turned, and as `config` says shifted and stained.

    Args:
        key: random key of the step.
        images: height and width must be equal.
        config: what is done besides turning.

    Returns:
        Pixels from 0 to 255: uint8, or float32 where the stain was changed.
    """
    turn_key, shift_key, stain_key = jax.random.split(key, 3)
    images = turn(turn_key, images)
    if config.shift:
        images = shift(shift_key, images, config.shift)
    if config.stain or config.brightness:
        return stain(stain_key, images, config.stain, config.brightness)
    return images


def mix(
    key: PRNGKeyArray, images: Any, labels: Float32[Array, " batch"], alpha: float
) -> tuple[Any, Float32[Array, " batch"]]:
    """Returns each image, and its label, mixed with the next one's ("mixup", Zhang et al. 2018).

    One share for the batch, from Beta(`alpha`, `alpha`).
    """
    share = jax.random.beta(key, alpha, alpha)
    images, labels = (share * v + (1 - share) * jnp.roll(v, 1, 0) for v in (images, labels))
    return images, labels
