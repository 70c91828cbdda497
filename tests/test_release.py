"""What is released says the same everywhere: the version, the versions of torch, the extras."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import per_sample
from versions import LACKING

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")


def test_the_version_is_that_of_the_changelog() -> None:
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert per_sample.__version__ == newest
    assert "version" in PROJECT["dynamic"]


def test_the_version_is_that_of_what_is_installed() -> None:
    try:
        installed = importlib.metadata.version("per_sample")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert per_sample.__version__ == installed


def test_torch_and_optree_are_all_that_is_needed() -> None:
    assert [re.findall(r"^\w+", line) for line in PROJECT["dependencies"]] == [["torch"], ["optree"]]


def test_the_page_of_versions_has_the_versions_of_the_matrix() -> None:
    matrix = (ROOT / ".ci" / "matrix").read_text(encoding="utf-8")
    versions = re.search(r"versions=\((\d.*)\)", matrix)
    assert versions is not None
    tested = versions[1].replace("'", "").split()
    assert f"torch {', '.join(tested[:-1])} and {tested[-1]}" in PAGE
    oldest = re.search(r">=([\d.]+)", PROJECT["dependencies"][0])
    assert oldest is not None
    assert tested[0].startswith(oldest[1])


@pytest.mark.parametrize("name", LACKING)
def test_the_page_of_versions_tells_what_the_tests_skip(name: str) -> None:
    assert f"| {LACKING[name][1]} |" in PAGE


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_the_page_of_versions_has_every_extra(extra: str) -> None:
    assert f"`per_sample[{extra}]`" in PAGE
