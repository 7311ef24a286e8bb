# SPDX-License-Identifier: MIT
"""The fixture of modules that hold for each packing: `pytestmark = pytest.mark.usefixtures("packing")`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store.rig import packed_by, pure_by_default
from zbudfs.core.packing import Packing


@pytest.fixture(scope="module", params=["zbud", "zbud without C", "dense", "dense without C"])
def packing(request: pytest.FixtureRequest) -> Iterator[Packing]:
    """Stores use each packing in turn, with the hot path in C and all in Python."""
    name, *without = request.param.split(" ", 1)
    with packed_by(Packing.parse(name)) as packing, pure_by_default(pure=bool(without)):
        yield packing
