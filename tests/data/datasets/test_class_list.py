# SPDX-License-Identifier: Apache-2.0
"""Lists of classes that people write: what is understood, and the line of what is not."""

from __future__ import annotations

import codecs
import time

import pytest
import tiny

from digseg_jax.data.datasets.class_list import COLOR, read_class_list
from digseg_jax.errors import UserError
from digseg_jax.prediction.files import find_queries


def write(tmp_path, data: str | bytes):
    path = tmp_path / "classes.txt"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_values_synonyms_comments_and_ignored_ones(tmp_path):
    listed = read_class_list(write(tmp_path, "# mine\n\n 0: soil, earth\n7: road\n9: Ignore\n#end\n"))
    assert [(c.name, c.synonyms, c.raw) for c in listed.classes] == [
        ("soil", ("earth",), (0,)), ("road", (), (7,)),
    ]  # fmt: skip
    assert listed.ignored == (9,) and listed.kind == "number"


def test_a_list_without_a_line_is_told(tmp_path):
    """Also one that holds nothing but the mark that editors on Windows write."""
    with pytest.raises(UserError) as caught:
        read_class_list(write(tmp_path, codecs.BOM_UTF8))
    assert "classes.txt" in tiny.one_line(caught.value)


def test_colors_are_not_comments(tmp_path):
    listed = read_class_list(write(tmp_path, "#ff0000: road\n# 00ff00 was water\n#0000ff: sky\n"))
    assert [c.color for c in listed.classes] == [(255, 0, 0), (0, 0, 255)]
    assert listed.classes[0].raw == (COLOR + 0xFF0000,) and listed.kind == "color"


@pytest.mark.parametrize("name", ["farmer's field", "H2O", "Straße", "crop/weed", "e.g.", "हिम"])
def test_names_as_people_have_them(tmp_path, name):
    assert read_class_list(write(tmp_path, f"{name}\nother\n")).classes[0].name == name


def test_a_name_may_begin_with_a_digit_after_a_value(tmp_path):
    assert read_class_list(write(tmp_path, "0: 2 story house\n")).classes[0].name == "2 story house"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("0,soil", "followed by a colon"),
        ("0 soil", "followed by a colon"),
        ("0=soil", "followed by a colon"),
        ("0;soil", "followed by a colon"),
        ("0\tsoil", "followed by a colon"),
        ("0\uff1asoil", "followed by a colon"),
        ("so\u200bil", "no control or invisible"),
        ("0: soil\ufeff", "no control or invisible"),
        ("1. soil", "followed by a colon"),
        ("0", "followed by a colon"),
        ("soil,0", "the value comes first"),
        ("soil: 0", "a line is `name, synonym`"),
        ('"soil"', "no quotes"),
        ("'soil'", "no quotes"),
        ("0: \"soil\"", "no quotes"),
        ('["soil", "road"]', "no quotes"),
        ("[soil]", "a name has none of"),
        ("soil;road", "a name has none of"),
        ("soil  # the ground", "a name has none of"),
        ("#ff0000 road", "a name has none of"),
        ("- soil", "no bullets"),
        ("soil,", "a line is `name, synonym`"),
        ("#f00: soil", "a line is `name, synonym`"),
        ("#ff0000ff: soil", "a line is `name, synonym`"),
        ("soil, " * 9000, "more than 2000"),
        ("70000: soil", "masks hold values up to 65535"),
        ("// soil", "begins with a letter or a digit"),
        ("% soil", "begins with a letter or a digit"),
        ("(0) soil", "begins with a letter or a digit"),
        ("__ignore__", "begins with a letter or a digit"),
        ("土，地面", "separated by the comma"),
        ("so\ufe0fil", "no control or invisible"),
    ],
)  # fmt: skip
def test_what_the_grammar_does_not_have_is_refused_with_its_line(tmp_path, line, told):
    """Each of them was taken for a name, and shifted every class."""
    path = write(tmp_path, f"# a comment\n\n{line}\nroad\n")
    with pytest.raises(UserError) as caught:
        read_class_list(path)
    assert f"{path}:3: " in tiny.one_line(caught.value) and told in str(caught.value)


@pytest.mark.parametrize("line", ["id,name", "name,r,g,b", "Class", "value, label, color"])
def test_the_heading_of_a_table_is_no_class(tmp_path, line):
    with pytest.raises(UserError, match=":1: .* is the heading of a table"):
        read_class_list(write(tmp_path, f"{line}\nsoil\n"))


def test_other_spaces_and_forms_of_accents_make_no_other_name(tmp_path):
    text = "bare\u00a0 soil\u00a0, O\u0308dland\nroad\u2009surface\n"
    listed = read_class_list(write(tmp_path, text))
    assert [(c.name, *c.synonyms) for c in listed.classes] == [
        ("bare soil", "Ödland"),
        ("road surface",),
    ]
    with pytest.raises(UserError, match="'öl' is named twice"):
        read_class_list(write(tmp_path, "\u00d6l\nO\u0308l\n"))


def test_encodings(tmp_path):
    marked = codecs.BOM_UTF8 + b"water\n"
    assert read_class_list(write(tmp_path, marked)).classes[0].name == "water"
    for data, told in (
        ("grün\n".encode("latin-1"), ":1: byte 0xfc is not UTF-8 text; save the file as UTF-8"),
        ("water\n".encode("utf-16"), ": UTF-16 text; save it as UTF-8"),
        ("water\n".encode("utf-16-le"), ": not a text file; save it as UTF-8"),
    ):
        with pytest.raises(UserError) as caught:
            read_class_list(write(tmp_path, data))
        assert told in tiny.one_line(caught.value)


def test_a_vocabulary_is_such_a_list(tmp_path):
    """The data's own classes.txt asks its names; a byte-order mark is not part of a word."""
    words = codecs.BOM_UTF8 + b"0: water, sea\n1: forest\n255: ignore\n"
    assert find_queries([], str(write(tmp_path, words))) == ["water", "forest"]
    with pytest.raises(UserError, match="classes.txt:1: byte 0xfc is not UTF-8"):
        find_queries([], str(write(tmp_path, b"gr\xfcn\n")))


def test_a_long_list_takes_no_quadratic_time(tmp_path):
    path = write(tmp_path, "".join(f"class {i}x\n" for i in range(50_000)))
    start = time.process_time()
    assert len(find_queries([], str(path))) == 50_000
    assert time.process_time() - start < 10
