"""Packages whose docstring lists their files list all of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "flexflow_engine"


@pytest.mark.parametrize("package", ["checkpoint", "cli", "jobs", "planning", "planning/profile", "store", "testing"])
def test_a_package_lists_its_files(package: str) -> None:
    docstring = ast.get_docstring(ast.parse((ENGINE / package / "__init__.py").read_text()))
    listed = re.findall(r"^ *(\w[\w. ]*?)  +\S", str(docstring), re.MULTILINE)
    names = [name.removesuffix(".py") for line in listed for name in line.split()]
    assert sorted(names) == sorted(path.stem for path in (ENGINE / package).glob("[!_]*.py"))
