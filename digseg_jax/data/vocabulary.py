# SPDX-License-Identifier: Apache-2.0
"""The texts of a run: every prompt that training may ask with, and each class's rows in the bank."""

from __future__ import annotations

import dataclasses

from digseg_jax.config.schema import DataConfig
from digseg_jax.config.templates import fill
from digseg_jax.data.datasets.spec import ClassInfo, DatasetSpec
from digseg_jax.data.sources import is_asked, parts_of, scored_part, spec_of


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Prompts of one data set; rows[class] are their places in the run's prompt bank.

    The prompts of a class are its name and its synonyms in each template, the class's own name in the
    first template before all others; they are drawn evenly in training.
    """

    prompts: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, spec: DatasetSpec, templates: tuple[str, ...] = (), first: int = 0) -> Vocabulary:
        """Builds the prompts of a data set.

        Args:
          spec: the data set's classes and its own template.
          templates: used instead of the spec's own, if there are any.
          first: the bank's row of the first prompt.
        """
        prompts: list[str] = []
        rows = []
        for info in spec.classes:
            # The name before its synonyms, the first template before the others.
            texts = [
                fill(template, name)
                for template in templates or (spec.template,)
                for name in (info.name, *info.synonyms)
            ]

            # Rows count on over the data sets of a run.
            start = first + len(prompts)
            rows.append(tuple(range(start, start + len(texts))))
            prompts.extend(texts)
        return cls(tuple(prompts), tuple(rows))


def vocabularies(config: DataConfig) -> list[Vocabulary]:
    """Vocabularies of the mixture's data sets, their rows numbered consecutively."""
    made: list[Vocabulary] = []
    for part in parts_of(config):
        first = sum(len(v.prompts) for v in made)  # after the rows of all earlier data sets
        made.append(Vocabulary.of(spec_of(part), config.templates, first))
    return made


def foreign_rows(config: DataConfig) -> list[tuple[tuple[tuple[int, ...], ...], ...]]:
    """Rows of the bank, for each part of the mixture, of what its images cannot show.

    Returns:
      [part][other part][class] -> the rows of the class's prompts. Left out are classes that `may_show`
      names or whose group it names, unasked ones, those without a group, and those that share a name
      with one of the part's own classes: the labels do not say whether the image shows them.
    """
    parts = parts_of(config)
    specs, words = [spec_of(part) for part in parts], vocabularies(config)
    names = [[_texts(c) for c in spec.classes] for spec in specs]

    # Names that a part may show, against the classes of every other part.
    found = []
    for k, part in enumerate(parts):
        known = {name for own in names[k] for name in own} | {name.lower() for name in part.may_show}
        others = []
        for j, other in enumerate(parts):
            if j == k or not other.group or other.group in part.may_show:
                continue
            taken = known | {name.lower() for name in other.unasked}
            pairs = zip(names[j], words[j].rows, strict=True)
            others.append(tuple(rows for own, rows in pairs if not own & taken))
        found.append(tuple(rows for rows in others if rows))
    return found


def _texts(info: ClassInfo) -> set[str]:
    """Name and synonyms of a class, in lower case."""
    return {text.lower() for text in (info.name, *info.synonyms)}


def training_templates(config: DataConfig) -> tuple[str, ...]:
    """Templates that training asks in: the configuration's, or each data set's own, without repeats."""
    own = (spec_of(part).template for part in parts_of(config))
    return config.templates or tuple(dict.fromkeys(own))


def bank_prompts(config: DataConfig) -> list[str]:
    """Every text that training asks with, in the order of the prompt bank's rows."""
    return [prompt for v in vocabularies(config) for prompt in v.prompts]


def class_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the classes of the data set that is evaluated."""
    return spec_of(scored_part(config)).names


def trained_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the classes that a mixture asks for, without repeats; empty without a mixture."""
    parts = parts_of(config) if config.mixture else ()
    names = [name for part in parts for name in spec_of(part).names if is_asked(part, name)]
    return tuple(dict.fromkeys(names))


def trained_synonyms(config: DataConfig) -> tuple[str, ...]:
    """Further words that training asks with for the same classes, without repeats."""
    asked = [(c, part) for part in parts_of(config) for c in spec_of(part).classes]
    words = [word for c, part in asked if is_asked(part, c.name) for word in c.synonyms]
    return tuple(dict.fromkeys(words))


def num_classes(config: DataConfig) -> int:
    """Number of classes of the data set that is evaluated."""
    return len(class_names(config))
