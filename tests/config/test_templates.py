# SPDX-License-Identifier: Apache-2.0
"""Templates of prompts: filled literally, refused in one line, and which one a vocabulary gets."""

from __future__ import annotations

import pytest
import tiny

from digseg_jax.config.parse import parse
from digseg_jax.config.templates import asked_templates, check_template, fill
from digseg_jax.errors import UserError

PHOTO = "A photo of a {} in the scene"
# what `str.format` would look into, pad to a gigabyte, or fail on
ILLEGAL = ("{0.__class__}", "{:>1000000000}", "{0}", "{name}", "{{}}", "{} {", "{} and {}", "road", "")


def test_a_name_is_put_in_as_it_is():
    assert fill(PHOTO, "road") == "A photo of a road in the scene"
    assert fill("a {}", "{0.__class__} {}") == "a {0.__class__} {}"


@pytest.mark.parametrize("template", [*ILLEGAL, 3, None, ["{}"]])
def test_anything_but_one_pair_of_braces_is_refused(template):
    with pytest.raises(UserError) as caught:
        check_template(template, "here")
    assert f"here: {template!r} needs one {{}}" in tiny.one_line(caught.value)


def test_a_line_break_is_refused():
    with pytest.raises(UserError, match="here: 'a.n{}' has a control or invisible character"):
        check_template("a\n{}", "here")


@pytest.mark.parametrize("template", ILLEGAL)
@pytest.mark.parametrize("section", ["data", "eval"])
def test_the_configuration_refuses_them(section, template):
    with pytest.raises(UserError, match=f"config.{section}.templates: "):
        parse({section: {"templates": [PHOTO, template]}})


@pytest.mark.parametrize(
    ("wanted", "trained", "own", "asked"),
    [
        ((), ("{}",), "{}", ("{}",)),
        ((), (PHOTO,), "{}", (PHOTO,)),  # trained on COCO-Stuff, asked about ADE20K
        ((), ("{}", PHOTO), PHOTO, (PHOTO,)),  # a mixture; each data set as it was trained
        ((), ("a {}", PHOTO), "{}", ("a {}",)),  # the first stands for all
        (("{}", "a {}"), (PHOTO,), PHOTO, ("{}", "a {}")),
    ],
)
def test_weights_are_asked_as_they_were_trained_unless_the_user_says_otherwise(
    wanted, trained, own, asked
):
    assert asked_templates(wanted, trained, own) == asked
