# SPDX-License-Identifier: Apache-2.0
"""Options of the TPU compiler: only for TPUs, and only for versions that know them."""

from __future__ import annotations

import importlib.metadata

import pytest

from digseg_jax import tpu


@pytest.mark.parametrize(
    ("platform", "version", "expected"),
    [
        ("tpu", "0.0.42.1", tpu.OPTIONS),
        ("tpu", "0.0.99", None),
        ("tpu", None, None),
        ("cpu", "0.0.42.1", None),
    ],
)
def test_options_are_for_known_compilers(monkeypatch, platform, version, expected):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert tpu.compiler_options(platform) == expected
    assert tpu.untuned(platform) == (tpu.UNTUNED if expected else {})
