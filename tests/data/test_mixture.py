# SPDX-License-Identifier: Apache-2.0
"""A mixture of data sets: what each part is asked, what it is never asked, and what is kept aside."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re

import numpy as np
import pytest
from PIL import Image

from digseg_jax.config.parse import parse
from digseg_jax.config.schema import DataConfig, LoadingConfig, PartConfig
from digseg_jax.data.datasets.domains import DOMAINS, shareable_domains
from digseg_jax.data.datasets.more_words import MORE_WORDS
from digseg_jax.data.pipeline import NamedQueries, _rules, training_stream
from digseg_jax.data.queries import ABSENT, FOREIGN, NOWHERE, PRESENT, QuerySampler
from digseg_jax.data.sources import (
    HELD_OUT,
    labels_of,
    open_part,
    parts_of,
    training_examples,
    training_parts,
)
from digseg_jax.data.vocabulary import bank_prompts, foreign_rows, trained_names
from digseg_jax.errors import UserError
from tests.bench.words import RARER, SYNONYMS

LISTS = {
    "street": "0: background\n1: road, street\n2: car\n",
    "cells": "0: background\n1: nucleus, nuclei\n",
    "field": "0: soil\n1: crop\n2: car\n",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(0)
    for name, classes in LISTS.items():
        for side in ("images", "masks"):
            (root / name / side / "train").mkdir(parents=True)
        (root / name / "classes.txt").write_text(classes)
        for i in range(6):
            ids = rng.integers(0, classes.count("\n"), (2, 2), np.uint8)
            Image.fromarray(ids).resize((48, 48), 0).save(root / name / f"masks/train/{i % 2}_{i}.png")
            image = rng.integers(0, 256, (48, 48, 3), np.uint8)
            Image.fromarray(image).save(root / name / f"images/train/{i % 2}_{i}.jpg")
    return str(root)


def mixed(root, rate=0.5, **changes):
    """Streets may show cells, cells nothing else, fields a road."""
    parts = (
        PartConfig("folder", folder="street", group="street", may_show=("cell",), **changes),
        PartConfig("folder", folder="cells", group="cell", weight=2.0, **changes),
        PartConfig("folder", folder="field", group="field", may_show=("Road",), **changes),
    )
    return DataConfig(
        root=root, image_size=32, num_queries=4, mixture=parts, foreign_rate=rate, negative_rate=0.5
    )


def batches(config, count=12, seed=0):
    place = {"start": 0, "host": 0, "hosts": 1, "loading": LoadingConfig()}
    with training_stream(config, "segmentation", seed=seed, batch_size=8, **place) as stream:
        return list(itertools.islice(stream, count))


def asked(config, found):
    """(part, kind) -> the prompts that were asked."""
    prompts, texts = bank_prompts(config), {}
    for batch in found:
        rows = zip(batch["part"], batch["query"], batch["query_kind"], strict=True)
        for part, query, kind in rows:
            for q, k in zip(query, kind, strict=True):
                texts.setdefault((int(part), int(k)), set()).add(prompts[q])
    return texts


def test_a_foreign_query_is_one_that_the_image_cannot_show(root):
    config = mixed(root, unasked=("background",))
    texts = asked(config, batches(config))
    # Cells may be in the street; "car" has a label of its own there, and roads may cross a field.
    assert texts[0, FOREIGN] == {"soil", "crop"}
    assert texts[1, FOREIGN] == {"road", "street", "car", "soil", "crop"}
    assert texts[2, FOREIGN] == {"nucleus", "nuclei"}
    assert "background" not in set().union(*texts.values())


def test_a_foreign_query_has_an_empty_mask_and_the_others_their_own(root):
    for batch in batches(mixed(root), 4):
        for label, ids, kinds in zip(
            batch["label"], batch["query_class"], batch["query_kind"], strict=True
        ):
            for c, kind in zip(ids, kinds, strict=True):
                assert (c == NOWHERE) == (kind == FOREIGN)
                assert (label == c).any() == (kind == PRESENT)


def test_data_sets_of_many_classes_lend_more_names_but_not_all():
    """By the square root of 16, 4 and 1 classes: 4, 2 and 1 of seven, each class of a set alike."""
    sets = tuple(tuple((10 * k + c,) for c in range(n)) for k, n in ((0, 4), (1, 1), (2, 16)))
    covers = np.array([[0]], np.int32)
    named = NamedQueries(
        7000, QuerySampler(np.ones(1), 0.999, foreign_rate=1.0), ((99,),), covers, sets
    )
    _, drawn = named.draw(np.zeros((4, 4), np.int32), np.random.default_rng(0))
    rows = drawn["query"][drawn["query_kind"] == FOREIGN]
    counts = np.bincount(rows, minlength=36) / len(rows)
    for first, size, share in ((0, 4, 2 / 7), (10, 1, 1 / 7), (20, 16, 4 / 7)):
        each = counts[first : first + size]
        assert each.sum() == pytest.approx(share, abs=0.02)
        assert each == pytest.approx(np.full(size, share / size), abs=0.01)


def test_a_parts_synonyms_are_asked_and_known_as_names_of_the_class(root):
    part = PartConfig(
        "folder", folder="street", group="street", synonyms=("road, Street, lane", "car,")
    )
    fields = PartConfig("folder", folder="field", group="field", synonyms=("soil, lane",))
    config = DataConfig(
        root=root,
        image_size=32,
        num_queries=4,
        mixture=(part, fields),
        foreign_rate=0.5,
        negative_rate=0.5,
    )
    assert bank_prompts(config)[:5] == ["background", "road", "street", "Street", "lane"]
    texts = asked(config, batches(config))
    assert "lane" in texts[0, PRESENT]
    # "lane" means soil in a field, so a field's labels do not say whether there is a road.
    assert texts[1, FOREIGN] == {"background"}
    assert texts[0, FOREIGN] == {"crop"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("roads, lane", "synonyms 'roads, lane': folder has no class 'roads'; did you mean 'road'?"),
        ("car, Street", "synonyms 'car, Street': 'Street' already means 'road' in folder"),
    ],
)
def test_synonyms_of_no_class_or_of_two_are_told(root, line, message):
    config = mixed(root, synonyms=(line,))
    with pytest.raises(UserError, match=re.escape(message)):
        bank_prompts(config)


def test_more_words_of_the_domains_are_none_that_the_words_benchmark_calls_unseen():
    added = {w.strip().lower() for lines in MORE_WORDS.values() for x in lines for w in x.split(",")}
    lists = (*SYNONYMS.values(), *RARER.values())
    unseen = {text.lower() for words in lists for text in words.values()}
    assert not added & unseen
    assert MORE_WORDS.keys() <= {domain.name for domain in DOMAINS}


def test_classes_without_a_group_are_never_foreign(root):
    rows = foreign_rows(mixed(root, unasked=("background",)))
    assert [len(others) for others in rows] == [1, 2, 1]
    config = mixed(root)
    bare = tuple(PartConfig("folder", folder=p.folder) for p in config.mixture)
    assert foreign_rows(DataConfig(root=root, mixture=bare)) == [(), (), ()]


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_the_rate_is_the_share_of_foreign_queries_among_the_negatives(rate):
    sampler = QuerySampler(np.ones(4), 0.5, foreign_rate=rate)
    label, rng = np.repeat([0, 1], 50).reshape(10, 10), np.random.default_rng(0)
    kinds = np.concatenate([sampler.draw(label, 1, rng)[1] for _ in range(3000)])
    negative = kinds != PRESENT
    assert negative.mean() == pytest.approx(0.5, abs=0.03)
    assert (kinds == FOREIGN).sum() / negative.sum() == pytest.approx(rate, abs=0.04)


def test_an_image_that_shows_all_its_classes_gets_foreign_negatives_only():
    sampler = QuerySampler(np.ones(2), 0.5, foreign_rate=0.1)
    label, rng = np.repeat([0, 1], 50).reshape(10, 10), np.random.default_rng(0)
    kinds = np.concatenate([sampler.draw(label, 3, rng)[1] for _ in range(500)])
    assert set(kinds) == {PRESENT, FOREIGN}
    assert (kinds == FOREIGN).mean() == pytest.approx(0.5, abs=0.05)


def test_an_image_of_nothing_but_background_is_asked_for_what_is_not_there():
    sampler = QuerySampler(np.ones(3), 0.0, askable=np.array([False, True, True]))
    ids, kinds = sampler.draw(np.zeros((8, 8), int), 4, np.random.default_rng(0))
    assert set(ids) == {1, 2} and set(kinds) == {ABSENT}


def test_parts_come_by_their_weights_and_know_their_place(root):
    parts = np.concatenate([batch["part"] for batch in batches(mixed(root), 16)])
    np.testing.assert_allclose(np.bincount(parts) / len(parts), [0.25, 0.5, 0.25], atol=0.02)


def test_a_part_has_its_own_crops():
    part = PartConfig(short_side=128, scale_min=0.75, scale_max=1.5, quarter_turns=True, jitter=0.0)
    config = DataConfig(image_size=64, mixture=(part, PartConfig()), scale_min=0.5, jitter=0.7)
    own, common = (_rules(config, p) for p in config.mixture)
    assert (own.scale_min, own.scale_max, own.jitter, own.quarter_turns) == (1.5, 3.0, 0.0, True)
    assert (common.scale_min, common.scale_max) == (0.5, 2.0)
    assert (common.jitter, common.quarter_turns) == (0.7, False)


def test_held_out_images_are_the_rest_of_the_training_split(root):
    def names(split, pattern):
        part = PartConfig("folder", f"{root}/cells", held_out=pattern)
        source = open_part(part, split)
        return {source.files(i)["image"].stem for i in range(len(source))}, source

    everything, _ = names("train", "")
    train, source = names("train", "^1_")
    held, _ = names(HELD_OUT, "^1_")
    assert held == {"1_1", "1_3", "1_5"} and train == everything - held
    assert source[0]["name"] in train
    for split, pattern in (("train", "."), (HELD_OUT, "nobody")):
        with pytest.raises(UserError, match="leaves no image"):
            names(split, pattern)


@pytest.mark.parametrize("split", ["training", "train", ""])
def test_held_out_images_are_not_trained_on_whatever_the_split_is_called(root, split):
    part = PartConfig("folder", f"{root}/cells", held_out="^1_", split=split)
    ((part, _, asked),) = training_parts(DataConfig(mixture=(part,)))
    assert len(open_part(part, asked)) == 3


def test_a_run_knows_exchanged_images_of_a_part_that_keeps_some_aside(root):
    part = PartConfig("folder", f"{root}/cells", held_out="^1_")
    count, digest, counts = training_examples(DataConfig(mixture=(part,)))["folder"]
    other = dataclasses.replace(part, held_out="^0_")
    assert count == 3 and digest and counts == ""
    assert training_examples(DataConfig(mixture=(other,)))["folder"] != [count, digest, counts]


def test_capitals_of_classes_that_nobody_asks_for_do_not_count(root):
    part = PartConfig("folder", folder="field", unasked=("SOIL",))
    config = DataConfig(root=root, mixture=(part,), num_queries=4, image_size=32)
    assert "soil" not in trained_names(config)
    assert 0 not in np.stack([batch["query_class"] for batch in batches(config)])


def test_folders_lie_below_the_root_and_name_the_parts(root):
    config = mixed(root)
    assert [p.root for p in parts_of(config)] == [f"{root}/{name}" for name in LISTS]
    assert labels_of(config.mixture) == tuple(LISTS)
    twice = (PartConfig("camvid"), PartConfig("camvid"), PartConfig("landcover"))
    assert labels_of(twice) == ("camvid_0", "camvid_1", "landcover")


def test_a_part_whose_classes_are_all_unasked_is_told(root):
    part = PartConfig("folder", folder="cells", unasked=("background", "nucleus"))
    with pytest.raises(UserError, match="has only the classes background, nucleus"):
        batches(DataConfig(root=root, image_size=32, mixture=(part,)), 1)


def test_every_domain_is_a_part_that_the_schema_knows():
    config = parse({"data": {"mixture": tuple(domain.part() for domain in DOMAINS)}})
    assert labels_of(config.data.mixture) == tuple(domain.name for domain in DOMAINS)
    groups = {domain.group for domain in DOMAINS}
    for domain in DOMAINS:
        assert domain.group and domain.scale_min <= domain.scale_max
        # A word that means neither a group nor a thing would silently do nothing.
        assert all(word in groups or word in WORDS for word in domain.may_show), domain.name


WORDS = {  # names in the lists of the domains' classes
    "urban", "urban area", "town", "buildings", "blood vessel", "vessels", "tree", "vegetation",
    "potted plant", "carrot", "road network",
}  # fmt: skip


def test_weights_to_share_are_trained_on_terms_that_allow_it():
    """Public domain, CC0, CC BY and CC BY-NC(-SA); the others are for research, or say nothing."""
    assert {domain.name for domain in shareable_domains()} == {
        "photos_coco128", "camvid", "nuclei_dsb2018", "nuclei_monuseg", "landcover",
    }  # fmt: skip


def test_the_names_of_a_mixture_are_those_that_are_asked(root):
    config = mixed(root, unasked=("background",))
    assert trained_names(config) == ("road", "car", "nucleus", "soil", "crop")
    assert trained_names(DataConfig()) == ()


def test_folders_of_a_mixture_need_their_root(root):
    with pytest.raises(UserError, match="^config.data.root is not set: .* street and 2 more$"):
        parts_of(mixed(""))


def test_the_log_names_every_folder_and_tells_of_samples_once(root, caplog):
    with caplog.at_level(logging.INFO, "digseg_jax"):
        batches(mixed(root), count=1)
    lines = [record.getMessage() for record in caplog.records]
    found = [line for line in lines if line.startswith("training data: ")]
    assert found == [f"training data: folder {name} train, 6 examples" for name in LISTS]
    assert sum(line.startswith("class frequencies: from a sample") for line in lines) == 1
