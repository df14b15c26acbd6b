# SPDX-License-Identifier: Apache-2.0
"""Queries that are far from every trained name are told, with the names that are nearest."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

from digseg_jax import load_segmenter
from digseg_jax.prediction.known_names import Far, far_line, far_queries


def test_synonyms_are_near_and_other_things_are_far():
    segmenter = load_segmenter("assets:segmenter")  # trained on the land cover
    assert far_queries(segmenter, ["water", "ocean", "woodland", "desert"]) == []
    far = far_queries(segmenter, ["water", "guitar", "kitten"])
    assert [found.query for found in far] == ["guitar", "kitten"]
    known = segmenter.description
    assert set(far[0].nearest) <= {*known.classes, *known.synonyms}
    assert "'guitar' (nearest: " in far_line(far) and "\n" not in far_line(far)


def test_a_trained_synonym_is_as_near_as_a_name():
    segmenter = load_segmenter("assets:segmenter")
    assert far_queries(segmenter, ["people walking"])
    described = dataclasses.replace(segmenter.description, synonyms=["pedestrians"])
    other = SimpleNamespace(description=described, codec=segmenter.codec, task=segmenter.task)
    assert far_queries(other, ["people walking"]) == []


def test_the_line_stays_short_for_a_long_vocabulary():
    line = far_line([Far(f"word {i}", ("water",)) for i in range(90)])
    assert line.endswith("'word 4' (nearest: water); and 85 more of the queries")


def test_a_closed_list_knows_its_queries():
    description = SimpleNamespace(classes=["water"], synonyms=[])
    closed = SimpleNamespace(description=description, codec=SimpleNamespace(closed=True))
    assert far_queries(closed, ["guitar"]) == []
