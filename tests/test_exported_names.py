"""Every package lists in `__all__` which names are for others, and others take nothing else."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
from test_layers import MODULES, imports

TAKEN = {name: imports(path) for name, path in MODULES.items()}
FACES = sorted(name for name, path in MODULES.items() if path.name == "__init__.py")


@pytest.mark.parametrize("name", FACES)
def test_a_package_lists_what_it_exports(name):
    face = importlib.import_module(name)
    listed = getattr(face, "__all__", [])
    assert len(listed) == len(set(listed))
    for one in listed:
        assert getattr(face, one) is not None
    public = {
        one
        for one, value in vars(face).items()
        if not one.startswith("_") and not isinstance(value, ModuleType) and one not in ("annotations", "Any")
    }
    assert public - {"TYPE_CHECKING", "Path"} <= set(listed)


@pytest.mark.parametrize("name", FACES)
def test_others_take_from_a_package_only_what_it_exports(name):
    """Ground files, which lie in one of the three folders themselves, are imported as they are."""
    if name.count(".") < 2:
        return
    listed = set(getattr(importlib.import_module(name), "__all__", []))
    wrong = [
        f"{other} takes {taken}"
        for other in MODULES
        if other != name and not other.startswith(f"{name}.")
        for taken in TAKEN[other]
        if taken.startswith(f"{name}.")
        and taken not in MODULES  # a module as such, as `from overtone.progressive.tiny import world`
        and not (taken.count(".") == name.count(".") + 1 and taken.rpartition(".")[2] in listed)
        and not any(taken.startswith(f"{inner}.") for inner in FACES if inner.startswith(f"{name}."))
        and not name.startswith("overtone.progressive.tiny")  # a program of its own, with modules for tests
    ]
    assert not wrong
