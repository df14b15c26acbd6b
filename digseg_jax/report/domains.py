# SPDX-License-Identifier: Apache-2.0
"""Pages of --suite=domains: a table of all domains, and a page of each with its images and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from digseg_jax.evaluation.suite_tables import not_measured
from digseg_jax.io import storage
from digseg_jax.io.names import distinct
from digseg_jax.io.storage import AnyPath
from digseg_jax.report.build import class_table, on_disk, optional_object, read_object, shaped
from digseg_jax.report.cards import gallery_cards
from digseg_jax.report.sections import class_bars
from digseg_jax.report.suites import scored_classes
from digseg_jax.report.tables import Cell, Name, Number, Table
from digseg_jax.viz.templates import render

FOLDER, INDEX = "domains", "index.html"
_SOURCES = ("suite_domains.json", FOLDER)


def build_domain_pages(evaluated: AnyPath | str) -> AnyPath:
    """Writes EVALUATED/domains/index.html and NAME.html beside it; returns the path of the former.

    Reads EVALUATED/suite_domains.json and the galleries in EVALUATED/domains/NAME.

    Raises:
      UserError: no results, or a file not of the expected form.
    """
    evaluated = storage.as_path(evaluated)

    with on_disk(evaluated, _SOURCES) as source:
        path = source / "suite_domains.json"
        rows = read_object(path, ("rows",))["rows"]
        pages = shaped(path, lambda: _pages(rows, source))

    for name, text in pages.items():
        storage.write_bytes(evaluated / FOLDER / name, text.encode("utf-8"))
    return evaluated / FOLDER / INDEX


def _pages(rows: Sequence[Mapping[str, Any]], source: Path) -> dict[str, str]:
    """Text of every page by its file's name."""
    seen = [row for row in rows if "missing" not in row]
    files = dict(zip((row["dataset"] for row in seen), _files(seen), strict=True))
    return {INDEX: _index(rows, files)} | {files[row["dataset"]]: _page(row, source) for row in seen}


def _files(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """File name of each domain's page; one that is called index gets another than the index."""
    return [f"{name}.html" for name in distinct(["index", *(row["dataset"] for row in rows)])][1:]


def _index(rows: Sequence[Mapping[str, Any]], files: Mapping[str, str]) -> str:
    """The page of all domains: one row each, with a link to its images. files: names of the pages."""
    cells: list[list[Cell]] = []
    for row in rows:
        if "missing" in row:
            cells.append([str(row["dataset"]), "–", "–", not_measured(row), "–"])
            continue
        wrong = row.get("wrong_names") or {}
        area = Number(sum(wrong.values()) / len(wrong)) if wrong else "–"
        link = Name(str(row["dataset"]), link=quote(files[row["dataset"]]))
        shown = f"{row['num_images']} of {row['split']}"
        cells.append([link, shown, str(row["scored"]), Number(row["asked_miou"]), area])

    columns = ("domain", "images", "classes", "mean IoU", "area of wrong names")
    caption = "Classes that were asked for and occur; wrong names are those of other domains"
    return render("report/domains.html.j2", domains=Table(columns, cells, caption))


def _page(row: Mapping[str, Any], source: Path) -> str:
    """The page of a domain: its images with sliders, and the IoU of its classes."""
    path = source / FOLDER / row["dataset"] / "gallery.json"
    gallery = optional_object(path)
    colors = shaped(path, lambda: class_table(row, gallery))
    return render(
        "report/domain.html.j2",
        name=row["dataset"],
        measured=f"E-Step {row['estep']}, split {row['split']}",
        index=INDEX,
        gallery=shaped(path, lambda: gallery_cards(gallery, path.parent, colors)),
        classes=class_bars(scored_classes(row), colors),
    )
