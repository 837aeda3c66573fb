"""The READMEs lead to what is there: links, the tour through the code, the tree, the commands, the words."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from overtone.cluster.cli import main

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "jobs", "progressive")
PAGES = [
    path
    for name in ("*.md", *(f"{folder}/**/*.md" for folder in (*FOLDERS, "manifests", "tests")))
    for path in sorted(ROOT.glob(name))
]
README = (ROOT / "README.md").read_text()
STOPS = 10
WORDS = {
    *("job", "row", "shard", "attempt", "part", "commit", "reject", "worker", "stage", "sigma"),
    *("phase", "batch", "chunk", "verdict", "action", "job plan", "sampling plan", "retry plan"),
}
LINK = re.compile(r"\[([^\]\[]*)\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next of its level."""
    level = heading.split()[0]
    assert f"\n{heading}\n" in text, f"there is no {heading!r}"
    below = text.partition(f"\n{heading}\n")[2]
    return re.split(rf"^#{{1,{len(level)}}} ", below, maxsplit=1, flags=re.M)[0]


def cells(text: str) -> list[list[str]]:
    """The tables in a text, line by line, without their heads."""
    lines = text.splitlines()
    rules = {k for k, line in enumerate(lines) if re.fullmatch(r"\|[-|: ]+\|", line)}
    skipped = rules | {k - 1 for k in rules}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for k, line in enumerate(lines)
        if line.startswith("|") and k not in skipped
    ]


def prose(text: str) -> str:
    """Without code blocks and code spans, where nothing is a link."""
    return re.sub(r"(?<!\[)`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@cache
def anchors(page: Path) -> set[str]:
    """What a link may name after `#`, as GitHub makes it of headings."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.*?)\s*$", text, flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading).lower()).replace(" ", "-")
        copies = (f"{slug}-{number}" for number in range(1, 1000))
        found.add(slug if slug not in found else next(copy for copy in copies if copy not in found))
    return found


@cache
def defined(path: Path) -> set[str]:
    """Functions and classes of a file; methods as `method` and as `Class.method`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
            found |= methods | {f"{node.name}.{method}" for method in methods}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for _, target in LINK.findall(prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("folder", ["", *FOLDERS, "progressive/tiny", "manifests"])
def test_the_first_page_links_to_every_other(folder):
    page = ROOT / folder / "README.md"
    assert page in PAGES
    linked = {(ROOT / target.partition("#")[0]).resolve() for _, target in LINK.findall(README)}
    assert page == ROOT / "README.md" or page in linked


def tour() -> list[list[str]]:
    return cells(section(README, "## Read the code"))


def test_the_tour_has_its_stops_in_order():
    assert [stop[0] for stop in tour()] == [str(number) for number in range(1, STOPS + 1)]


@pytest.mark.parametrize("number", range(1, STOPS + 1))
def test_a_stop_of_the_tour_is_there(number):
    """The files exist, each of the functions is defined in one of them, and each file has one of them."""
    _, where, functions, story = tour()[number - 1]
    paths = [ROOT / target for _, target in LINK.findall(where)]
    names = re.findall(r"`([\w.]+)`", functions)
    assert paths, "no file"
    assert story.endswith(".")
    assert not (missing := [name_of(path) for path in paths if not path.is_file()]), f"no file {missing}"
    for label, target in LINK.findall(where):
        assert target == label or target.endswith(f"/{label}"), f"{label} leads to {target}"
    known = set().union(*map(defined, paths))
    assert not (unknown := [name for name in names if name not in known]), f"not defined there: {unknown}"
    assert all(defined(path) & set(names) for path in paths), "a file without a function"


def test_the_tree_has_every_package():
    [block] = re.findall(r"```text\n(.*?)```", section(README, "## Read the code"), re.S)
    shown: list[str] = []
    above: list[str] = []
    for line in block.splitlines():
        match = re.fullmatch(r"( *)(\w+)/ +(\S.*)", line)
        assert match, f"not a package with what it is: {line!r}"
        above = [*above[: len(match[1]) // 2], match[2]]
        shown.append("/".join(above))
    there = {name_of(path.parent) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    assert len(shown) == len(set(shown))
    assert set(shown) == there


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_is_in_a_readme(name):
    assert any(re.search(rf"\bovertone {name}\b", page.read_text()) for page in PAGES)


def test_every_command_in_a_readme_exists():
    typed = {
        command
        for page in PAGES
        for command in re.findall(r"^(?:\w+=\S+ )*overtone ([a-z]+)", page.read_text(), flags=re.M)
    }
    assert typed
    assert typed <= set(main.commands)


def test_the_words_are_explained():
    explained = [row[0] for row in cells(section(README, "## Words"))]
    assert len(explained) == len(set(explained))
    assert set(explained) >= WORDS


def test_programs_and_imports_in_the_readmes_exist():
    """`python -m overtone.x` can be run, and what a block of Python imports from us is in that module."""
    wrong = []
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m overtone\.([\w.]*\w)", text):
            file = ROOT / Path(*module.split("."))
            if not (file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()):
                wrong.append(f"{name_of(page)}: python -m overtone.{module}")
        for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Import):
                    ours = [alias.name for alias in node.names if alias.name.split(".")[0] in FOLDERS]
                    wrong += [f"{name_of(page)}: import {name}" for name in ours]
                elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOLDERS:
                    wrong.append(f"{name_of(page)}: from {node.module}")
                elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "overtone":
                    missing = [alias.name for alias in node.names if not offers(node.module, alias.name)]
                    wrong += [f"{name_of(page)}: from {node.module} import {name}" for name in missing]
    assert not wrong


def offers(module: str | None, name: str) -> bool:
    """Whether `from module import name` finds something, as far as names tell."""
    place = ROOT / Path(*(module or "").split(".")[1:])
    if (place / name / "__init__.py").is_file() or (place / f"{name}.py").is_file():
        return True
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not file.is_file():
        return False
    for node in ast.walk(ast.parse(file.read_text())):
        if name in (getattr(node, "id", None), getattr(node, "name", None), getattr(node, "value", None)):
            return True
    return False
