# SPDX-License-Identifier: Apache-2.0
"""The floors of the house: a folder imports from its own floor and those below, nothing imports in a
circle, and few functions know the whole configuration."""

from __future__ import annotations

import ast
import collections
import re
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


# by room, the functions that may take the whole configuration: they read most sections of it; all
# others take the sections that they read
WHOLE = {
    "config": {"with_settings", "check_combinations"},
    "training": {"set_up", "SegmentationTask"},
    "prediction": {"load_segmenter", "predict", "describe"},
    "aot": {"run", "abstract_task"},
    "jobs": {"train", "export", "evaluate"},
}


def takes_whole_config(path: Path) -> set[str]:
    """A module's functions with a parameter of the type Config, optional or not; classes for theirs."""
    found, tree = set(), ast.parse(path.read_text())
    owners = {
        function: node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for function in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            types = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs) if a.annotation]
            if any("Config" in re.findall(r"\w+", ast.unparse(each)) for each in types):
                found.add(owners.get(node, node.name))
    return found


def test_few_functions_take_the_whole_configuration() -> None:
    found = collections.defaultdict(set)
    for name, path in modules().items():
        if functions := takes_whole_config(path):
            found[name.split(".")[1] if "." in name else name] |= functions
    assert found == WHOLE, "take the sections that are read"
    assert sum(map(len, WHOLE.values())) <= 12
