"""Reads annotations of a slide as areas by class: QuPath's GeoJSON, ASAP's XML, and mask images.

Points and lines are passed over, and in GeoJSON also detections, cells and tiles, which programs
make. Splines are taken as polygons of their points. In XML, the groups `_0` and `_1` of CAMELYON16
and `metastases` of CAMELYON17 are tumour; `_2`, `Exclusion` and `normal` are normal tissue in it,
and are cut out of other groups.
"""

import json
import logging
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from histo_jax.config_values import names
from histo_jax.errors import DataError, UserError, closest, one_line
from histo_jax.slides import libraries, masks

log = logging.getLogger("histo_jax")

# The class of what has none, in QuPath's words.
UNCLASSIFIED = "Unclassified"
GEOJSON_SUFFIXES = (".geojson", ".json")
# QuPath's class of tumour, and of what takes no part.
_TUMOUR = "Tumor"
_IGNORED = "ignore*"
_POLYGONS = ("Polygon", "MultiPolygon", "GeometryCollection")
_ASAP_AREAS = ("Polygon", "Spline", "Rectangle")
# In any case.
_CAMELYON_TUMOUR = ("_0", "_1", "metastases", "metastasis", "tumor")
_CAMELYON_HOLES = ("_2", "exclusion", "normal")
# Polygons may be drawn over the edge of a slide, but not by more than this part of their area.
_MAX_OUTSIDE = 0.5

# A polygon or several, of shapely, which is an optional library.
Area = Any


def read_annotations(
    path: Path, size: tuple[int, int], offset: tuple[int, int] = (0, 0)
) -> dict[str, Area]:
    """Returns the annotated area of each class in pixels of level 0.

    Args:
        path: a `.geojson` or `.json` of QuPath, an `.xml` of ASAP, or a mask image, whose values
            above 0 are the names of classes.
        size: width and height of the slide in pixels of level 0.
        offset: of QuPath's origin in pixels of level 0.

    Returns:
        Valid shapely geometries by class; empty where nothing but points and lines is drawn.

    Raises:
        DataError: the file cannot be read, or its polygons are outside of the slide.
        UserError: the extra `slides` is not installed.
    """
    shapely, affinity = libraries.load("shapely"), libraries.load("shapely.affinity")
    suffix = path.suffix.lower()
    shapes: dict[str, list[Area]] = {}
    try:
        if suffix in GEOJSON_SUFFIXES:
            for name, shape in _read_geojson(path):
                shapes.setdefault(name, []).append(affinity.translate(shape, *offset))
        elif suffix == ".xml":
            for name, shape in _read_asap(path):
                shapes.setdefault(name, []).append(shape)
        elif suffix in masks.SUFFIXES:
            return masks.read(path, size)
        else:
            raise DataError(
                f"{path} is no annotation that can be read: give a .geojson of QuPath, an .xml of "
                "ASAP, or a mask image"
            )
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): correct the path") from None
    areas = {name: shapely.union_all(parts) for name, parts in shapes.items()}
    areas = {name: area for name, area in areas.items() if not area.is_empty}
    _check_place(path, areas, size)
    return _apply_camelyon(areas) if suffix == ".xml" else areas


def regions(annotations: dict[str, Area], positive: str, exclude: str = "") -> tuple[Area, Area]:
    """Returns the positive area, and the area that takes no part.

    Args:
        annotations: of a slide.
        positive: names of classes, separated by commas; case is ignored.
        exclude: likewise; QuPath's class `Ignore*` is always excluded.
    """
    shapely = libraries.load("shapely")

    def union(text: str) -> Area:
        chosen = {name.casefold() for name in names(text)}
        areas = [area for name, area in annotations.items() if name.casefold() in chosen]
        return shapely.union_all(areas)

    return union(positive), union(f"{exclude},{_IGNORED}")


def check_classes(
    found: Collection[str], positive: str, exclude: str, place: str, group: str = "data"
) -> None:
    """Refuses positive classes that no slide has, and logs excluded ones.

    Args:
        found: classes of all slides.
        positive: see `regions`.
        exclude: likewise.
        place: where the annotations are, for the message.
        group: of the settings `positive` and `exclude`, for the message.

    Raises:
        DataError: lists the classes that were found; or a class is both positive and excluded.
    """
    if both := {name.casefold() for name in names(positive)} & set(names(exclude.casefold())):
        raise DataError(
            f"config.{group}.exclude names {', '.join(map(repr, sorted(both)))}, which "
            f"config.{group}.positive names, too: remove each class from one of them"
        )
    known = {name.casefold() for name in found}
    listed = ", ".join(map(repr, sorted(found))) or "no class"
    for name in names(positive):
        if name.casefold() not in known:
            is_camelyon = name.casefold() in _CAMELYON_TUMOUR and _TUMOUR in found
            match = _TUMOUR if is_camelyon else closest(name, found)
            hint = f"did you mean {match}?" if match else f"correct --config.{group}.positive"
            raise DataError(
                f"config.{group}.positive = {positive!r}: no annotation in {place} has the class "
                f"{name!r}; they have {listed}: {hint}"
            )
    for name in names(exclude):
        if name.casefold() not in known:
            log.warning(
                "config.%s.exclude: no annotation in %s has the class %r; they have %s",
                group, place, name, listed,
            )  # fmt: skip


def negative_classes(found: Collection[str], positive: str, exclude: str) -> list[str]:
    """Returns the classes that are neither positive nor excluded, see `regions`."""
    named = {name.casefold() for name in names(f"{positive},{exclude},{_IGNORED}")}
    return sorted(name for name in found if name.casefold() not in named)


def _read_geojson(path: Path) -> Iterator[tuple[str, Area]]:
    """Yields class and area of each annotation of QuPath, in its pixels of level 0."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        for feature in _features(content):
            properties = feature.get("properties") or {}
            kind = properties.get("objectType", "annotation")
            geometry = feature.get("geometry") or {}
            if kind == "annotation" and geometry.get("type") in _POLYGONS:
                yield _class_name(properties.get("classification")), _area(geometry)
    except (OSError, UserError):
        raise
    except Exception as error:  # of JSON, of shapely, or of content that is not GeoJSON
        raise DataError(
            f"{path} is no GeoJSON that can be read ({one_line(error)}): export it from QuPath "
            "again"
        ) from None


def _features(content: Any) -> list[dict[str, Any]]:
    """Returns the features of a file: a collection, a list, one feature, or a bare geometry."""
    if isinstance(content, list):
        return content
    kind = content.get("type")
    if kind not in ("FeatureCollection", "Feature", *_POLYGONS):
        raise ValueError(f"its type is {kind}, not FeatureCollection")
    if kind == "FeatureCollection":
        return content["features"]
    return [content if kind == "Feature" else {"geometry": content}]


def _class_name(classification: Any) -> str:
    """Returns the class that versions of QuPath write as a name, a list of names, or text."""
    if isinstance(classification, dict):
        several = classification.get("names")
        classification = ": ".join(several) if several else classification.get("name")
    return str(classification or UNCLASSIFIED)


def _area(geometry: dict[str, Any]) -> Area:
    """Returns a geometry of GeoJSON as valid polygons, without points and lines."""
    shapely = libraries.load("shapely")
    return _valid(shapely.force_2d(shapely.from_geojson(json.dumps(geometry))))


def _valid(shape: Area) -> Area:
    """Returns a shape as valid polygons; where an outline crosses itself, all loops count."""
    shapely = libraries.load("shapely")
    if shape.is_empty:
        return shape
    if not all(map(math.isfinite, shape.bounds)):
        raise ValueError("a coordinate is not a finite number")
    valid = shapely.make_valid(shape, method="structure", keep_collapsed=False)
    parts = shapely.get_parts(valid)
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])


class _AsapReader:
    """Collects the areas of an XML file of ASAP while expat parses it.

    A document type is refused: it can define entities that fill the memory or read other files.
    """

    def __init__(self) -> None:
        self.areas: list[tuple[str, Area]] = []
        self._group: str | None = None
        self._points: list[tuple[float, float]] = []
        self._has_root = False

    def read(self, path: Path) -> None:
        """Parses a file into `areas`."""
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = self._refuse
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        with path.open("rb") as file:
            parser.ParseFile(file)

    def _refuse(self, *_: Any) -> None:
        raise ValueError("it has a document type (DOCTYPE), which annotations do not need")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._has_root and tag != "ASAP_Annotations":
            raise ValueError(f"its root is {tag}, not ASAP_Annotations")
        self._has_root = True
        if tag == "Annotation":
            is_area = attributes.get("Type") in _ASAP_AREAS
            group = attributes.get("PartOfGroup", "None")
            self._group = (UNCLASSIFIED if group == "None" else group) if is_area else None
            self._points = []
        elif tag == "Coordinate":
            # Some languages write decimals with a comma.
            x, y = (float(attributes[axis].replace(",", ".")) for axis in "XY")
            self._points.append((x, y))

    def _end(self, tag: str) -> None:
        if tag == "Annotation" and self._group is not None and len(self._points) > 2:
            shapely = libraries.load("shapely")
            self.areas.append((self._group, _valid(shapely.Polygon(self._points))))


def _read_asap(path: Path) -> list[tuple[str, Area]]:
    """Returns group and area of each annotation of ASAP."""
    reader = _AsapReader()
    try:
        reader.read(path)
    except (OSError, UserError):
        raise
    except Exception as error:  # of expat, of shapely, or of numbers that are none
        reason = f"{one_line(error)} is missing" if isinstance(error, KeyError) else one_line(error)
        raise DataError(
            f"{path} is no XML of ASAP that can be read ({reason}): save it in ASAP again"
        ) from None
    return reader.areas


def _apply_camelyon(areas: dict[str, Area]) -> dict[str, Area]:
    """Returns the areas with CAMELYON's tumour groups as one, and its holes cut out."""
    shapely = libraries.load("shapely")
    by_group = {name: name.casefold() for name in areas}
    holes = shapely.union_all([areas[name] for name in areas if by_group[name] in _CAMELYON_HOLES])
    tumour = [areas[name] for name in areas if by_group[name] in _CAMELYON_TUMOUR]
    merged = {name: areas[name] for name in areas if by_group[name] not in _CAMELYON_TUMOUR}
    if tumour:
        merged[_TUMOUR] = shapely.union_all(tumour)
    return {
        name: area if name.casefold() in _CAMELYON_HOLES else area.difference(holes)
        for name, area in merged.items()
    }


def _check_place(path: Path, areas: dict[str, Area], size: tuple[int, int]) -> None:
    """Refuses polygons that are mostly outside of the slide."""
    shapely = libraries.load("shapely")
    drawn = shapely.union_all(list(areas.values()))
    inside = drawn.intersection(shapely.box(0, 0, *size)).area
    if drawn.area and inside < (1 - _MAX_OUTSIDE) * drawn.area:
        left, top, right, bottom = drawn.bounds
        raise DataError(
            f"{path}: its polygons (x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}) are "
            f"outside of the slide, which has {size[0]} x {size[1]} pixels: give the annotation of "
            "this slide, in pixels of level 0, not in micrometres"
        )
