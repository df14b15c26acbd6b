# SPDX-License-Identifier: Apache-2.0
"""The generalist's domains as data to score: --suite=domains, from folders below config.data.root.

Each is seen at its own scale (`data.datasets.domains`) and queried for its own classes; a background is
what no class claims. A folder that is no domain is seen at the evaluation's scale. The score is the
mean IoU of the queried classes that occur; with one class it is that class's IoU. Names of other
domains are queried too, and whatever they cover is an error.
"""

from __future__ import annotations

import os

from digseg_jax.config.schema import PartConfig
from digseg_jax.data.checked import Guarded
from digseg_jax.data.datasets.domains import DOMAINS, REST, Domain, wrong_names
from digseg_jax.data.datasets.readers.folder import CLASSES
from digseg_jax.data.sources import HELD_OUT, open_fresh, spec_of
from digseg_jax.errors import UserError
from digseg_jax.evaluation.examples import EvalExamples, spread

SUITE = "domains"
METRIC = "asked"  # mean IoU of the classes that were asked for


def domains_below(root: str) -> tuple[Domain, ...]:
    """The domains of the table, then every other folder below root that has a list of classes.

    Nothing is known of the scale of others (short_side 0): `eval.short_side` holds for them.
    """
    root = os.path.expanduser(root)
    known = {domain.name for domain in DOMAINS}
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    others = [n for n in names if n not in known and os.path.isfile(os.path.join(root, n, CLASSES))]
    return (*DOMAINS, *(Domain(name, short_side=0) for name in others))


def domain_examples(domain: Domain, root: str, split: str, num_images: int = 0) -> EvalExamples:
    """Opens the examples of a domain.

    Args:
      domain: which one.
      root: folder of all domains.
      split: val, held_out, or test; a data set without a split test is scored on its val.
      num_images: evenly spread ones; 0: all.

    Raises:
      UserError: no such data set, split or folder, or shards older than the files beside them.
    """
    values = domain.part()
    folder = values["folder"] and os.path.join(os.path.expanduser(root), values["folder"])
    part = PartConfig(values["name"], folder, held_out=domain.held_out)
    facts = spec_of(part)
    if split == "val":
        split = domain.val
    if split == "test" and "test" not in facts.splits:
        split = facts.eval_split
    if split == HELD_OUT and not domain.held_out:
        raise UserError(f"{domain.name}: none of its training images are held out")

    # A background is what no class claims, whatever its name says.
    rest = [c for c, name in enumerate(facts.names) if name in REST]
    source = Guarded(open_fresh(part, split), facts.num_classes)
    return EvalExamples(
        source,
        split,
        spread(len(source), num_images),
        facts.names,
        tuple(facts.covers(c) for c in range(facts.num_classes)),
        METRIC,
        absent="detectron2",
        template=facts.template,
        short_side=domain.short_side or None,
        rest=rest[0] if rest else -1,
        wrong_names=wrong_names(domain),
        colors=facts.colors,
        timed=not facts.from_package,
    )


def describe_domain(domain: Domain) -> dict[str, object]:
    """What changes a domain's counts, beside its name: for the identity of a journal."""
    keys = ("reader", "short_side", "val", "held_out")
    return {key: getattr(domain, key) for key in keys}
