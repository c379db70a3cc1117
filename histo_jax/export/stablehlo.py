"""`model.stablehlo`: the predictor as a program for every compiler of XLA, by `jax.export`."""

from pathlib import Path

import jax
import numpy as np
from jax import export

from histo_jax.errors import UserError
from histo_jax.export.function import make_function
from histo_jax.predictor import Predictor
from histo_jax.run import files

PLATFORMS = ("cpu", "cuda", "tpu")


def write(path: Path, predictor: Predictor, size: int) -> None:
    """Writes the program, for any number of images and for all of `PLATFORMS`.

    Args:
        path: of the file.
        predictor: what it computes.
        size: height and width of the images.

    Raises:
        UserError: a network cannot be traced for any number of images.
        OSError: the file cannot be written.
    """
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)
    # By default GPUs and TPUs compute products of float32 with fewer digits.
    with jax.default_matmul_precision("highest"):
        function = jax.jit(make_function(predictor))
        try:
            exported = export.export(function, platforms=PLATFORMS)(images)
        except (TypeError, jax.errors.JAXTypeError, NotImplementedError, ValueError) as error:
            raise UserError(
                "a network cannot be exported for any number of images, as when it takes "
                f"len(images): use images.shape[0] ({' '.join(str(error).split())[:200]}); or "
                "leave stablehlo out of --config.export.formats"
            ) from None
    files.write_bytes(path, bytes(exported.serialize()))
