# SPDX-License-Identifier: MIT
"""The picture of bars has lengths in proportion, a name and a unit for everything, and nothing outside."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from bench.chart import Bar, Series, draw, ticks_for
from bench.real import DISKS, picture
from bench.table import Column, Table

SVG = "{http://www.w3.org/2000/svg}"


def picture_of(*series: Series, groups: tuple[str, ...] = ("redis", "node & more")) -> ElementTree.Element:
    """Draw bars, and parse the picture as XML."""
    return ElementTree.fromstring(draw("Times <all>", "seconds", groups, series))


def texts(root: ElementTree.Element) -> list[str]:
    """Return all texts of a picture."""
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_bars_are_as_long_as_their_medians() -> None:
    """All bars have the same scale, and the thin line goes from the least to the most."""
    root = picture_of(
        Series("slow", [Bar(40, 30, 50, "40 s"), Bar(20, 20, 20, "20 s")]),
        Series("fast", [Bar(10, 9, 12, "10 s, 4 x"), Bar(5, 5, 5, "5 s")]),
    )
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.get("height") == "16"]
    widths = [float(rect.attrib["width"]) for rect in bars]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 0.25, 0.5, 0.125], abs=0.01)
    assert [rect.get("class") for rect in bars] == ["s0", "s1", "s0", "s1"]
    first = next(line for line in root.iter(f"{SVG}line") if line.get("class") == "range")
    length = float(first.attrib["x2"]) - float(first.attrib["x1"])
    assert length / widths[0] == pytest.approx(20 / 40, abs=0.01)


def test_everything_has_a_name() -> None:
    """Title, axis, groups, series and values are in the picture, with any characters."""
    found = texts(picture_of(Series("swap file", [Bar(4, 4, 4, "4 s"), None])))
    assert {"Times <all>", "seconds", "redis", "node & more", "swap file", "4 s", "not measured", "0"} <= set(found)


def test_nothing_lies_outside_and_no_bar_on_another() -> None:
    """Nothing lies outside and no bar covers another, also with the longest bar and four series."""
    bars = [Series(f"series {number}", [Bar(99.9, 1, 1234, "99.9 s, 1.00 x as fast")] * 2) for number in range(4)]
    root = picture_of(*bars)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in [*root.iter(f"{SVG}line"), *root.iter(f"{SVG}text"), *root.iter(f"{SVG}rect")]:
        for name, most in (("x", width), ("x1", width), ("x2", width), ("y", height), ("y1", height), ("y2", height)):
            assert 0 <= float(element.get(name, "0")) <= most
    tops = [float(rect.attrib["y"]) for rect in root.iter(f"{SVG}rect") if rect.get("height") == "16"]
    assert len(tops) == 8
    assert all(after - before >= 16 for before, after in pairwise(tops))


def test_light_and_dark() -> None:
    """Each colour of the light page has another one for the dark page."""
    text = draw("t", "a", ["g"], [Series("s", [Bar(1, 1, 1, "1")])])
    light, dark = text.split("prefers-color-scheme: dark")
    for name in ("page", "grid", "range", "s0", "s3"):
        pattern = rf"\.{name} {{ [a-z]+: (#[0-9a-f]{{6}}) }}"
        one, other = re.findall(pattern, light), re.findall(pattern, dark)
        assert len(one) == len(other) == 1
        assert one != other


@pytest.mark.parametrize(
    ("most", "step"), [(0.9, 0.2), (7, 1), (8, 1), (9, 2), (62.7, 10), (99, 20), (1234, 200)], ids=str
)
def test_the_ticks_are_round_numbers(most: float, step: float) -> None:
    """The ticks are at most eight steps of 1, 2 or 5 times a power of ten."""
    ticks = ticks_for(most)
    assert ticks[0] == 0
    assert ticks[1] == pytest.approx(step)
    assert most - step < ticks[-1] <= most + 1e-6


def test_too_many_series_are_refused() -> None:
    """More series than colours are refused, since two of the same colour could be confused."""
    with pytest.raises(ValueError, match="5 series need as many colours, but there are 4"):
        draw("t", "a", ["g"], [Series("s", [None])] * 5)


def test_the_picture_is_of_the_slow_disk() -> None:
    """The values come from the table of the slow disk. A target without a measurement has no bar."""
    columns = [Column("swapfile", "swapfile s"), Column("zbudfs", "zbudfs s"), Column("zbudfs_speed", "times as fast")]
    own, slow = Table(DISKS["own"], columns), Table(f"Programs on {DISKS['slow']}", columns)
    own.add("redis", {"swapfile": 1.0, "zbudfs": 1.0, "zbudfs_speed": 1.0})
    for base, seconds in ((10.0, 2.0), (12.0, 3.0), (9.0, 4.5)):
        slow.add("redis", {"swapfile": base, "zbudfs": seconds, "zbudfs_speed": base / seconds})
    drawn = picture([own, slow])
    assert drawn is not None
    found = texts(ElementTree.fromstring(drawn))
    assert {"10 s", "3 s, 4 x as fast", "swap file", "zbudfs"} <= set(found)
    assert "zbudfs --packing dense" not in found
    assert picture([own]) is None
