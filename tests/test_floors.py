# SPDX-License-Identifier: Apache-2.0
"""The floors of the house: a folder imports from its own floor and those below, and nothing imports in
a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "digseg_jax"

# bottom up; a name is a folder of the package or a module at its root
FLOORS = (
    {"errors", "arraytypes", "log", "trees", "packages", "assets"},
    {"config", "io", "runtime"},
    {"models", "diffusion", "metrics", "viz"},
    {"weights", "data", "segmentation"},
    {"training", "recipes"},
    {"prediction"},
    {"evaluation"},
    {"report", "aot"},
    {"tools", "demo"},
    {"jobs"},
    {"main"},
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a module imports, inside functions and for types alike."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= (names & known) or ({node.module} & known)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names} & known
    return found - {"digseg_jax"}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known)) for name, path in known.items()}


def test_every_module_imports_from_its_own_floor_and_below() -> None:
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    room = {name: name.split(".")[1] for name in graph() if "." in name}
    assert sorted(set(room.values()) - set(floor)) == [], "rooms without a floor"
    upward = [
        f"{name} -> {target}"
        for name, targets in graph().items()
        for target in targets
        if name in room and floor[room[target]] > floor[room[name]]
    ]
    assert upward == []


def test_nothing_imports_in_a_circle() -> None:
    TopologicalSorter(graph()).prepare()


def test_the_package_root_has_room_for_nine_modules() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 9
