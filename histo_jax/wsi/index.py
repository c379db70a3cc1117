"""The page of all slides, `index.html`."""

import math
from pathlib import Path
from typing import Any

import jinja2

from histo_jax.run import files
from histo_jax.version import VERSION
from histo_jax.wsi import results

NAME = "index.html"


def write(folder: Path, positive: str) -> None:
    """Writes the page of all slides that have results in a folder, and of those that failed.

    The slide with the highest mean of the top 1% of its cells is the first: a single cell may be
    wrong by chance.

    Args:
        folder: of the results.
        positive: name of the positive class.
    """
    slides = sorted(results.read_all(folder).items(), key=_order)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template(NAME)  # fmt: skip
    text = template.render(
        slides=[{"name": name, **_displayed(summary)} for name, summary in slides],
        failures=results.read_failures(folder),
        positive=positive,
        version=VERSION,
    )
    files.write_text(folder / NAME, text)


def _order(entry: tuple[str, dict[str, Any]]) -> tuple[float, float, str]:
    name, summary = entry
    return -(summary["mean_top_percent"] or 0.0), -(summary["highest"] or 0.0), name


def _displayed(summary: dict[str, Any]) -> dict[str, Any]:
    """Returns the summary with where the map is on the thumbnail, in percent of its size.

    The map's last cells may reach beyond the slide, which the thumbnail does not show.
    """
    step = summary["thumbnail_step"]
    width, height = (math.ceil(summary[side] / step) * step for side in ("width", "height"))
    stride, (pixel_x, pixel_y) = summary["stride"], summary["pixel"]
    return {
        **summary,
        "map_width": 100 * summary["columns"] * stride * pixel_x / width,
        "map_height": 100 * summary["rows"] * stride * pixel_y / height,
        "file": Path(summary["slide"]).name,
        "width_mm": summary["width"] * summary["mpp_x"] / 1000,
        "height_mm": summary["height"] * summary["mpp_y"] / 1000,
    }
