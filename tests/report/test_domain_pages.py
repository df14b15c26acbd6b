# SPDX-License-Identifier: Apache-2.0
"""The pages of the domains: each measured one has its own, and the table links to it."""

from __future__ import annotations

import html
import json
import re
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest

from digseg_jax.errors import UserError
from digseg_jax.report.domains import build_domain_pages
from digseg_jax.viz.gallery import GalleryItem, write_gallery

CLASSES = ("background", "nucleus <b>")
MEASURED = {
    "suite": "domains", "dataset": "cells", "estep": "1x1", "split": "val", "num_images": 1,
    "metric": "asked", "scored": 1, "scored_classes": ["nucleus <b>"], "asked_miou": 0.625,
    "wrong_names": {"road": 0.02, "cat": 0.04},
    "per_class": {"background": 0.9, "nucleus <b>": 0.625},
}  # fmt: skip


@pytest.fixture
def evaluated(tmp_path):
    rows = [MEASURED, {"suite": "domains", "dataset": "roads", "estep": "1x1", "missing": "no folder"}]
    (tmp_path / "suite_domains.json").write_text(json.dumps({"suite": "domains", "rows": rows}))
    label = np.zeros((8, 8), np.int32)
    label[:4] = 1
    item = GalleryItem(
        id="a", image=np.full((8, 8, 3), 90, np.uint8), label=label, prediction=label,
        masks=np.ones((1, 8, 8), np.float32), queries=[CLASSES[1]], ious=[0.625], miou=0.76,
    )  # fmt: skip
    write_gallery(tmp_path / "domains" / "cells", [item], CLASSES)
    return tmp_path


def test_every_measured_domain_has_a_page_of_its_images(evaluated):
    index = build_domain_pages(evaluated).read_text()
    assert 'href="cells.html"' in index and "0.625" in index and "0.03" in index
    assert "roads" in index and "not measured" in index and 'href="roads.html"' not in index
    page = (evaluated / "domains" / "cells.html").read_text()
    assert "data:image/" in page and 'href="index.html"' in page
    assert "nucleus &lt;b&gt;" in page and "nucleus <b>" not in page
    assert sorted(p.name for p in (evaluated / "domains").glob("*.html")) == [
        "cells.html",
        "index.html",
    ]


def test_a_domains_page_names_no_run_and_no_background(evaluated):
    index = build_domain_pages(evaluated)
    assert "Run" not in re.sub("<(script|style).*?</", "", index.read_text(), flags=re.DOTALL)
    page = (evaluated / "domains" / "cells.html").read_text()
    assert "Run <span>" not in page and "<span>E-Step 1x1, split val</span>" in page
    bars = re.findall('<span class="name">(.*?)</span>', page.partition('id="classes"')[2])
    assert bars == ["nucleus &lt;b&gt;"]


@pytest.mark.parametrize(
    "name", ["a#b", "x?y", "50%25", "2021:north", "north:2021", "index", "Index", "forêt"]
)
def test_every_link_leads_to_the_page_of_its_domain(evaluated, name):
    rows = [MEASURED | {"dataset": name}, MEASURED | {"dataset": "index_2"}]
    (evaluated / "suite_domains.json").write_text(json.dumps({"suite": "domains", "rows": rows}))
    index = build_domain_pages(evaluated)
    assert index == evaluated / "domains" / "index.html" and "mean IoU" in index.read_text()
    links = [html.unescape(link) for link in re.findall('<td><a href="([^"]+)"', index.read_text())]
    assert len(set(links)) == 2
    for link, row in zip(links, rows, strict=True):
        target = urlsplit(urljoin("file:///eval/domains/index.html", link))
        assert target.scheme == "file" and not target.query and not target.fragment
        page = evaluated / unquote(target.path).removeprefix("/eval/")
        assert page != index and f"<h1>{html.escape(row['dataset'])}</h1>" in page.read_text()


def test_results_of_another_form_are_told(evaluated):
    (evaluated / "suite_domains.json").write_text('{"rows": [{"dataset": "cells"}]}')
    with pytest.raises(UserError, match="suite_domains.json is not of the expected form"):
        build_domain_pages(evaluated)
