"""Private names of other libraries are in one file, to compare with each new release of theirs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "progressive"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "library.py")
OURS = {
    "_name_or_path",  # a key of the files that diffusers writes, like the next one
    "_class_name",
    "_native_cudnn",  # values of diffusers' public `AttentionBackendName`, which users write into specs
    "_flash_3",
    "_overtone_family",  # of our own making
}
PRIVATE = re.compile(r"_[a-z]\w*")


def private_names(source: str) -> set[str]:
    """Names with an underscore before them that a file reads off other objects, or imports."""
    tree = ast.parse(source)
    used: set[str] = set()
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute):
            (own if ast.unparse(node.value) in ("self", "cls") else used).add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.add(node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            used.update(part for name in names for part in name.split(".") if part != "__future__")
    return {name for name in used - own - OURS if PRIVATE.fullmatch(name)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_of_libraries_are_in_library_alone(path):
    assert not private_names(path.read_text())


def test_the_search_finds_them():
    assert private_names((ROOT / "library.py").read_text()) > {"_execution_device", "_all_hooks", "_pytree"}
