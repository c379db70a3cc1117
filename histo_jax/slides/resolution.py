"""Which level of a slide is read, and by which factor it is scaled, for a network's spacing."""

import logging
from typing import NamedTuple

from histo_jax.errors import DataError
from histo_jax.slides.reader import Slide, Spacing

log = logging.getLogger("histo_jax")

# A level this close to the target is taken as it is: training images vary by more.
TOLERANCE = 0.02
# A slide this much coarser than the target lacks what the network has learned to see.
MAX_UPSAMPLING = 1.5
# A given spacing that differs by more than this from the file's is worth a line in the log.
_DISAGREEMENT = 0.02


class Scale(NamedTuple):
    """How target pixels, those of the network's spacing, are made from a level of a slide.

    Attributes:
        level: that is read.
        factor: width and height of a target pixel in pixels of this level; 1 = taken as it is.
        full: width and height of a target pixel in pixels of level 0.
    """

    level: int
    factor: tuple[float, float]
    full: tuple[float, float]


def slide_spacing(slide: Slide, given: float | None) -> Spacing:
    """Returns the spacing of level 0.

    Args:
        slide: open.
        given: by the user, in micrometres; None = the file's.

    Raises:
        DataError: neither states it.
    """
    known = slide.spacing
    if given is None:
        if known is None:
            raise DataError(
                f"{slide.path} does not state micrometres a pixel: give them by "
                "--config.heatmap.mpp=..., or for each slide by a CSV with the columns slide,mpp"
            )
        return known
    if known and max(abs(side / given - 1) for side in known[:2]) > _DISAGREEMENT:
        log.warning(
            "%s: %g micrometres a pixel, as given; the file states %g x %g (%s)",
            slide.path, given, known.x, known.y, known.source,
        )  # fmt: skip
    return Spacing(given, given, "given")


def choose_scale(slide: Slide, spacing: Spacing, target: float) -> Scale:
    """Returns the coarsest level that is at least as fine as the target, and the factor.

    Args:
        slide: open.
        spacing: of its level 0.
        target: micrometres a pixel of the network.

    Raises:
        DataError: the slide is too coarse.
    """
    chosen, ratios = None, (spacing.x / target, spacing.y / target)
    for level in range(len(slide.levels)):
        down_x, down_y = slide.downsample(level)
        of_level = spacing.x * down_x / target, spacing.y * down_y / target
        if max(of_level) <= 1 + TOLERANCE:
            chosen, ratios = level, of_level
    if chosen is None:
        _check_upsampling(slide, spacing, target)
        chosen = 0
    down_x, down_y = slide.downsample(chosen)
    is_exact = all(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
    factor = (1.0, 1.0) if is_exact else (1 / ratios[0], 1 / ratios[1])
    return Scale(chosen, factor, (down_x * factor[0], down_y * factor[1]))


def _check_upsampling(slide: Slide, spacing: Spacing, target: float) -> None:
    coarsest = max(spacing.x, spacing.y)
    stated = f"{coarsest:.4g} micrometres a pixel ({spacing.source})"
    if coarsest > MAX_UPSAMPLING * target:
        raise DataError(
            f"{slide.path} has {stated}, too coarse for the network's {target:g}: scan it finer, "
            "or correct its scale by the column mpp of a table, or for maps by --config.heatmap.mpp"
        )
    log.warning(
        "%s has %s, coarser than the network's %g: it is enlarged, and results are less reliable",
        slide.path, stated, target,
    )  # fmt: skip


def coarse_scale(slide: Slide, step: tuple[float, float]) -> Scale:
    """Returns how to read the slide at any coarser step.

    Args:
        slide: open.
        step: width and height of a target pixel in pixels of level 0, each at least 1.
    """
    level = 0
    for candidate in range(len(slide.levels)):
        if all(d <= s for d, s in zip(slide.downsample(candidate), step, strict=True)):
            level = candidate
    down_x, down_y = slide.downsample(level)
    return Scale(level, (step[0] / down_x, step[1] / down_y), step)
