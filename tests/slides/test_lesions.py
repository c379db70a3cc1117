"""Lesions of annotated areas: widened, merged, filled, and measured."""

import numpy as np
import pytest

from histo_jax.slides import lesions

shapely = pytest.importorskip("shapely", reason="the extra slides is not installed")


def test_areas_nearer_than_75_micrometres_are_one_lesion():
    """Squares of 100 pixels of half a micrometre, 140 and 160 pixels apart."""
    squares = [shapely.box(x, 0, x + 100, 100) for x in (0, 240, 500)]
    found = lesions.find(shapely.union_all(squares), (0.5, 0.5))
    assert [lesion.shape.bounds for lesion in found] == [
        pytest.approx((-37.5, -37.5, 170 + 37.5, 87.5)), pytest.approx((212.5, -37.5, 337.5, 87.5))
    ]  # fmt: skip
    inside = lesions.locate(
        found, np.array([20.0, 210.0, 230.0, 230.0]), np.array([20.0] * 3 + [99])
    )
    assert list(inside) == [0, -1, 1, -1]


def test_holes_are_filled_and_what_is_in_them_belongs_to_the_lesion():
    ring = shapely.Point(500, 500).buffer(400) - shapely.Point(500, 500).buffer(300)
    island = shapely.Point(500, 500).buffer(10)
    (lesion,) = lesions.find(ring | island, (1.0, 1.0))
    assert lesion.diameter == pytest.approx(2 * 437.5, rel=1e-2)
    assert list(lesions.locate([lesion], np.array([650.0]), np.array([500.0]))) == [0]


def test_no_area_has_no_lesions():
    assert lesions.find(shapely.Polygon(), (0.5, 0.5)) == []
    assert list(lesions.locate([], np.zeros(2), np.zeros(2))) == [-1, -1]


@pytest.mark.parametrize("angle", [0, 30, 90])
def test_the_diameter_is_that_of_the_ellipse_with_the_same_moments(angle):
    """Of an ellipse it is the long axis, of a rectangle its side times 4 / sqrt(12)."""
    affinity = pytest.importorskip("shapely.affinity")
    ellipse = affinity.scale(shapely.Point(5, 8).buffer(1, quad_segs=200), 300, 50)
    measured = lesions._major_axis(affinity.rotate(ellipse, angle))
    assert measured == pytest.approx(600, rel=1e-3)
    rectangle = affinity.rotate(shapely.box(10, 20, 310, 60), angle)
    assert lesions._major_axis(rectangle) == pytest.approx(300 * 4 / np.sqrt(12))


def test_pixels_need_not_be_squares():
    (lesion,) = lesions.find(shapely.box(0, 0, 100, 100), (2.0, 0.5))
    assert lesion.shape.bounds == pytest.approx((-37.5, -37.5, 237.5, 87.5))
