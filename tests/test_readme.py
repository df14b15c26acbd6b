# SPDX-License-Identifier: Apache-2.0
"""What the documents name exists: links, modules, experiments, flags, settings, names of the API."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags

import digseg_jax
from digseg_jax import main
from digseg_jax.config.parse import check_key
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ROOMS = ("configs", "digseg_jax", "launch", "tests")
DOCUMENTS = [README, *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.md")))]
EVERY_DOCUMENT = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))

# commands of others, whose flags are theirs to explain
OTHERS = ("pip ", "docker ", "tfds ", "apt-get ", "dpkg ", "python -m pytest", "python3 -m venv")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*)")
SETTING = re.compile(rf"(?:config\.)?((?:{'|'.join(f.name for f in dataclasses.fields(Config))})\.\w+)")


def code_of(text: str) -> Iterator[str]:
    """Every command of the blocks (continued lines joined, `&&` split), then every inline code span."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    for block in blocks:
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        for line in lines:
            yield from (part.strip() for part in line.partition("  #")[0].split("&&"))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    yield from re.findall(r"`([^`\n]+)`", prose)


@functools.cache
def module_file(name: str) -> Path | None:
    """The file that `python -m NAME` runs; None: there is none."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{name}.__main__")
    return Path(spec.origin) if spec is not None and spec.origin else None


@functools.cache
def argparse_flags(path: Path) -> set[str]:
    """Names of the options that a file adds to its parsers."""
    found = {"help"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found |= {name.removeprefix("--") for name in names if name.startswith("--")}
    return found


def main_flags() -> set[str]:
    defined = flags.FLAGS.flags_by_module_dict()
    return {flag.name for flag in defined[main.__name__]}


def legal_flags(code: str) -> set[str]:
    """The flags that a piece of code may use: those of its module, or of anything of ours."""
    named = re.search(r"python -m ((?:digseg_jax|tests)[\w.]*)", code)
    if named and named[1] != main.__name__:
        file = module_file(named[1])  # a module that does not exist is another test's finding
        return argparse_flags(file) if file else set()
    return main_flags() if named else our_flags()


@functools.cache
def our_flags() -> set[str]:
    """The flags of all scripts and tools."""
    scripts = {f for path in (ROOT / "launch").glob("*.sh") for f in FLAG.findall(path.read_text())}
    tools = [*(ROOT / "digseg_jax" / "tools").glob("*.py"), *(ROOT / "tests").glob("*/__main__.py")]
    return main_flags() | scripts | set().union(*map(argparse_flags, tools))


def anchors(path: Path) -> set[str]:
    """The fragments that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_the_readme_has_at_most_900_words():
    assert len(README.read_text().split()) <= 900


@EVERY_DOCUMENT
def test_every_relative_link_leads_somewhere(path):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?://", target):
            continue
        file, _, fragment = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists() or (fragment and fragment not in anchors(linked)):
            dead.append(target)
    assert dead == []


@EVERY_DOCUMENT
def test_every_module_and_file_that_is_named_exists(path):
    text = path.read_text()
    modules = re.findall(r"python -m ((?:digseg_jax|tests)(?:\.\w+)*)", text)
    assert [name for name in modules if module_file(name) is None] == []
    folders, endings = "configs|digseg_jax|launch|tests", "py|sh|md|txt"
    files = re.findall(rf"(?<![\w/])((?:{folders})/[\w/]+\.(?:{endings}))", text)
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_places_that_the_package_names_are_there():
    """`Class.method` in [file.py](file.py)."""
    package = ROOT / "digseg_jax"
    places = re.findall(r"`([\w.]+)` in \[([\w/]+\.py)\]", (package / "README.md").read_text())
    assert len(places) > 5
    for name, file in places:
        source = (package / file).read_text()
        assert all(re.search(rf"(class|def) {part}\b", source) for part in name.split(".")), name


@EVERY_DOCUMENT
def test_every_version_of_an_experiment_exists(path):
    for file, version in re.findall(r"(configs/\w+\.py):(\w+)", path.read_text()):
        spec = importlib.util.spec_from_file_location("experiment", ROOT / file)
        experiment = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(experiment)
        experiment.get_config(version)  # raises UserError if there is no such version


@EVERY_DOCUMENT
def test_every_flag_exists(path):
    unknown = []
    for code in code_of(path.read_text()):
        if not code.startswith(OTHERS):
            named = {flag for flag in FLAG.findall(code) if not flag.startswith("config.")}
            unknown += [f"--{flag} in: {code}" for flag in sorted(named - legal_flags(code))]
    assert unknown == []


@EVERY_DOCUMENT
def test_every_setting_exists(path):
    unknown = []
    for code in code_of(path.read_text()):
        keys = [f[7:] for f in FLAG.findall(code) if f.startswith("config.")]
        named = SETTING.match(code)  # a span such as `compute.accumulation=4`
        if named and not code.endswith((".py", ".json")):
            keys.append(named[1])
        for key in keys:
            try:
                check_key(f"config.{key}")
            except UserError as error:
                unknown.append(str(error))
    assert unknown == []


@EVERY_DOCUMENT
def test_every_name_of_the_api_exists(path):
    names = set(re.findall(r"\bdj\.(\w+)", path.read_text()))
    assert [name for name in sorted(names) if not hasattr(digseg_jax, name)] == []
