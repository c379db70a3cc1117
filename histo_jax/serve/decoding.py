"""From the files of a request to pixels, in threads of their own."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from histo_jax.data.image_files import CORRUPTION, ImageFile, decode_image
from histo_jax.errors import UserError, one_line
from histo_jax.serve.limits import Limits, Refused
from histo_jax.serve.receiving import File
from histo_jax.slides.reader import Picture

_FORMATS = ("TIFF", "PNG", "JPEG")


class PatchFile(NamedTuple):
    """A file of a request, decoded.

    Attributes:
        name: as the client gives it.
        pixels: uint8[size, size, 3], None where the file cannot be used.
        error: why not.
        conversions: see `ImageFile`.
        is_larger: whether it is a picture of more than a patch.
    """

    name: str
    pixels: np.ndarray | None = None
    error: str = ""
    conversions: tuple[str, ...] = ()
    is_larger: bool = False


def decode_patches(files: Sequence[File], size: int, is_scaled: bool) -> list[PatchFile]:
    """Decodes patches.

    Args:
        files: of the request.
        size: height and width of the networks' patches.
        is_scaled: cut the square from the centre and scale it to that size; otherwise images of
            another size are errors.
    """
    return [_decode_patch(*file, size, is_scaled) for file in files]


def _decode_patch(name: str, content: bytes, size: int, is_scaled: bool) -> PatchFile:
    if not content:
        return PatchFile(name, error="is empty")
    dimensions = _dimensions(content)
    if dimensions and not is_scaled and dimensions != (size, size):
        return PatchFile(
            name,
            error=f"is {dimensions[0]}x{dimensions[1]} pixels; the network needs {size}x{size}: "
            "scale it, or ask for a heat map of a larger picture",
            is_larger=min(dimensions) >= size,
        )
    result = decode_image(content, size if is_scaled else None, _FORMATS)
    if isinstance(result, ImageFile):
        return PatchFile(name, result.pixels, conversions=result.conversions)
    if isinstance(result, MemoryError):
        return PatchFile(name, error="needs more memory than the server has")
    return PatchFile(name, error=str(result) if dimensions else "is not a TIFF, PNG or JPEG file")


def _dimensions(content: bytes) -> tuple[int, int] | None:
    """Returns width and height as the header states them, None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            return image.size
    except CORRUPTION:
        return None


def open_picture(file: File, limits: Limits) -> Picture:
    """Decodes a picture of a larger region.

    Raises:
        Refused: it is no picture, or has too many pixels.
    """
    name = file.name
    try:
        with Image.open(io.BytesIO(file.content), formats=_FORMATS) as image:
            width, height = image.size
        if width * height > limits.pixels:
            raise Refused(
                413,
                f"{name} is {width}x{height} pixels, more than {limits.pixels:,}: send a part of "
                "it, or use the mode heatmap of histo_jax",
            )
        return Picture(Path(name), io.BytesIO(file.content))
    except MemoryError:
        raise Refused(413, f"{name} needs more memory than the server has: send a part") from None
    except UserError as error:
        raise Refused(422, one_line(error)) from None
    except CORRUPTION as error:
        reason = one_line(error).partition(" <_io.")[0]
        raise Refused(
            422, f"{name} is not a TIFF, PNG or JPEG file that can be read ({reason})"
        ) from None


def data_url(image: Image.Image | UInt8[np.ndarray, "height width channels"], kind: str) -> str:
    """Returns a picture as a URL that contains it.

    Args:
        image: RGB or RGBA.
        kind: 'png' or 'jpeg'.
    """
    return f"data:image/{kind};base64,{base64.b64encode(encode(image, kind)).decode()}"


def encode(image: Image.Image | UInt8[np.ndarray, "height width channels"], kind: str) -> bytes:
    """Returns the content of a picture's file; for arguments see `data_url`."""
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return file.getvalue()
