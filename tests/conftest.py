"""The order of the files: the longest first, so that no process is left alone with one of them."""

from __future__ import annotations

import pytest

LONGEST = ("test_house.py", "test_lines.py", "test_evaluate.py", "test_attack.py", "test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
