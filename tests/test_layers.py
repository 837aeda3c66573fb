"""The house: imports go one way and in no circle, what is light stays light, no file grows too big."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("progressive", "jobs", "cluster")
FORBIDDEN = {
    "progressive": {"overtone.jobs", "overtone.cluster", "ray", "pyarrow", "boto3", "click"},
    "jobs": {"overtone.cluster", "torch", "diffusers", "transformers", "ray", "click"},
    "cluster": set(),
}
LIGHT = {"settings", "schedule", "cost", "presets", "families", "checkpoints", "tiny", "formulas", "errors"}
"""Parts of progressive without torch."""
LARGEST = 320
"""Lines that a file may have."""
LARGER = {}
"""Files that have more, with the number that they may have. This list only gets shorter."""
SMALLEST = 60
SMALL = {
    # Ground files: words that many others use.
    "jobs/tables.py",
    "jobs/words.py",
    "jobs/shard_set.py",
    "jobs/spec/fields.py",
    "progressive/errors.py",
    "progressive/layouts.py",
    "progressive/noise.py",
    # Begun, and to be filled.
}


def sources() -> dict[str, Path]:
    """Every module of ours, by the name that it is imported by."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(("overtone", *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = sources()


def imports(path: Path, *, all_levels: bool = True) -> list[str]:
    """`module.name` of every import statement in a file; those of its top level alone on request."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if not all_levels:
        for node in ast.walk(tree):
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                skipped.update(ast.walk(node))
    found: list[str] = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imports(path)
        if any(within(name, package) for package in FORBIDDEN[folder])
    ]
    assert not wrong


def test_nothing_is_imported_by_a_bare_name():
    files = [*MODULES.values(), *(ROOT / "tests").glob("*.py"), *(ROOT / "manifests").rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path)
        if name.split(".")[0] in FOLDERS
    ]
    assert not wrong


def test_jobs_takes_only_the_light_modules_of_progressive():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "jobs").rglob("*.py"))
        for name in imports(path)
        if within(name, "overtone.progressive") and name.split(".")[2] not in LIGHT
    ]
    assert not wrong


def test_only_the_command_line_imports_the_command_line():
    wrong = [
        name
        for name, path in MODULES.items()
        for used in imports(path)
        if within(used, "overtone.cluster.cli") and not within(name, "overtone.cluster.cli")
    ]
    assert not wrong


def test_files_import_each_other_in_no_circle():
    graph = {}
    for name, path in MODULES.items():
        used = {
            target if target in MODULES else target.rpartition(".")[0]
            for target in imports(path, all_levels=False)
            if within(target, "overtone")
        }
        assert not (unknown := used - {*MODULES, "overtone"}), f"{path} imports {unknown}"
        graph[name] = used
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_submodule_is_called_like_what_its_package_exports():
    """`from package import name` would be the one or the other, by what was imported before."""
    wrong = []
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            exported = {
                value
                for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                for value in (ast.literal_eval(node.value) if isinstance(node.value, ast.List) else [])
            }
            wrong += [f"{name}.{one}" for one in exported if f"{name}.{one}" in MODULES]
    assert not wrong


def test_no_file_is_too_big_or_a_crumb():
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in MODULES.values()
        if path.name not in ("__init__.py", "__main__.py")
    }
    big = {name: count for name, count in lines.items() if count > LARGER.get(name, LARGEST)}
    assert not big
    done = [name for name in LARGER if lines.get(name, 0) <= LARGEST]
    assert not done, "take these off the list: it only gets shorter"
    assert not [name for name, count in lines.items() if count < SMALLEST and name not in SMALL]


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    assert settings["packages"] == sorted(packages)


@pytest.mark.parametrize(
    "statement",
    [
        "from overtone import progressive",
        "from overtone.progressive import schedule, checkpoints, families, formulas, errors, tiny",
        "import overtone.cluster.cli",
        "import overtone.jobs.preview, overtone.jobs.status, overtone.jobs.verify, overtone.jobs.report",
    ],
)
def test_light_imports_load_neither_torch_nor_ray(statement):
    heavy = ("torch", "diffusers", "ray", "matplotlib")
    code = f"{statement}; import sys; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"
