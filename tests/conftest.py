"""The order of the files, longest first so that no process is left alone with one; what all runs share."""

from __future__ import annotations

import functools

import pytest
import typer.testing

# CliRunner would read the annotations of every command anew at each call: 0.08 s.
typer.testing._get_command = functools.cache(typer.testing._get_command)

LONGEST = ("test_house.py", "test_lines.py", "test_evaluate.py", "test_attack.py", "test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
