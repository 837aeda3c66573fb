"""The packages import in one direction only, and the light ones stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "progressive": {"jobs", "cluster", "ray", "pyarrow", "boto3", "click"},
    "jobs": {"torch", "diffusers", "transformers", "ray"},
    "cluster": set(),
}
LIGHT = {"settings", "schedule", "families", "checkpoints", "tiny"}  # modules of progressive without torch


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at module level) of every import statement in a file."""
    tree = ast.parse(path.read_text())
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(f"{node.module}.{alias.name}", node not in inside) for alias in node.names]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name, _ in imports(path)
        if name.split(".")[0] in PACKAGES[package]
    ]
    assert not wrong


def test_jobs_takes_only_the_light_modules_of_progressive():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "jobs").rglob("*.py"))
        for name, _ in imports(path)
        if name.split(".")[0] == "progressive"
        and path.name != "cli.py"
        and not set(name.split(".")[1:2]) <= LIGHT
    ]
    assert not wrong


def test_jobs_imports_cluster_only_inside_cli_commands():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "jobs").rglob("*.py"))
        for name, top in imports(path)
        if name.split(".")[0] == "cluster" and (top or path.name != "cli.py")
    ]
    assert not wrong


@pytest.mark.parametrize(
    "statement",
    ["import progressive", "import jobs.cli", "import progressive.schedule, progressive.checkpoints"],
)
def test_light_imports_load_neither_torch_nor_ray(statement):
    code = f"{statement}; import sys; print([m for m in ('torch', 'diffusers', 'ray') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"
