# SPDX-License-Identifier: MIT
"""What modules that hold for every packing say: `pytestmark = pytest.mark.usefixtures("packing")`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store.rig import packed_by
from zbudfs.core.packing import Packing


@pytest.fixture(scope="module", params=["zbud", "dense"])
def packing(request: pytest.FixtureRequest) -> Iterator[Packing]:
    """Stores are of each packing in turn."""
    with packed_by(Packing.parse(request.param)) as packing:
        yield packing
