# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""What a program computes and moves: loops as often as they run, main memory apart from on-chip memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from test_hlo import TPU

from digseg_jax.aot import hlo, traffic

# a product whose operands are fetched into on-chip memory, S(1), in two parts and whole, and written back
AHEAD = """HloModule jit_step, is_scheduled=true

ENTRY %main (p0: f32[64,128], p1: f32[128,32]) -> f32[64,32] {
  %p0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p1 = f32[128,32]{1,0:T(8,128)} parameter(1)
  %slice-start.1 = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p0), slice={[0:16], [0:128]}
  %slice-start.2 = ((f32[64,128]{1,0:T(8,128)}), f32[48,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p0), slice={[16:64], [0:128]}
  %copy-start.1 = (f32[128,32]{1,0:T(8,128)S(1)}, f32[128,32]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p1)
  %slice-done.1 = f32[16,128]{1,0:T(8,128)S(1)} slice-done(%slice-start.1)
  %slice-done.2 = f32[48,128]{1,0:T(8,128)S(1)} slice-done(%slice-start.2)
  %copy-done.1 = f32[128,32]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %custom-call.1 = f32[64,128]{1,0:T(8,128)S(1)} custom-call(%slice-done.1, %slice-done.2), custom_call_target="ConcatBitcast"
  ROOT %convolution.1 = f32[64,32]{1,0:T(8,128)} convolution(%custom-call.1, %copy-done.1), dim_labels=bf_io->bf
}
"""


def test_loop_corrections_are_the_runs_after_the_first():
    flops, moved = traffic.loop_corrections(hlo.parse(TPU))
    assert flops == 5 * 2 * (2 * 64 * 64 * 320) * 320
    activation, weight = 2 * 64 * 64 * 320 * 2, 320 * 320 * 2
    expected = 5 * ((2 * activation + weight) + (weight + weight // 4))
    assert moved == pytest.approx(expected, rel=1e-5)  # the condition reads a few bytes


def test_what_is_fetched_ahead_counts_once():
    assert traffic.memory_traffic(hlo.parse(AHEAD)) == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_arrays_in_on_chip_memory_cost_nothing():
    activation, part = 2 * 64 * 64 * 320 * 2, 320 * 80 * 2  # the gathered weight is in S(1)
    kernel = activation + 2 * 64 * 64 * 8 * 2
    scattered = 9 * 320 * (320 + 80) * 2
    expected = 6 * (2 * activation + part) + kernel + scattered
    assert traffic.memory_traffic(hlo.parse(TPU)) == pytest.approx(expected, rel=1e-5)


def test_a_program_of_this_machine():
    """Without on-chip memory it is what XLA counts."""
    shape = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    compiled = jax.jit(lambda a, b: (jnp.tanh(a) * b).sum(axis=0)).lower(shape, shape).compile()
    moved = traffic.memory_traffic(hlo.parse(compiled.as_text()))
    assert moved == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.1)


def test_the_flops_of_a_loop_are_those_of_its_runs():
    def f(a, b):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), a, length=5)[0]

    shapes = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    module = hlo.parse(jax.jit(f).lower(*shapes).compile().as_text())
    flops, _ = traffic.loop_corrections(module)
    if not flops:
        pytest.skip("this XLA unrolls the loop, or calls a library for its product")
    assert flops == 4 * 2 * 64 * 32 * 32


@pytest.mark.parametrize(
    ("image", "kernel", "options"),
    [
        ((2, 9, 7, 4), (3, 3, 4, 8), {"window_strides": (1, 1), "padding": "SAME"}),
        ((2, 9, 7, 4), (3, 3, 4, 8), {"window_strides": (2, 1), "padding": ((0, 1), (2, 2))}),
        ((2, 9, 7, 4), (3, 3, 2, 8), {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1),
                                      "feature_group_count": 2}),
        # a product for each of six examples, as the TPU's compiler writes it
        ((5, 6, 1, 4), (6, 1, 4, 8), {"window_strides": (5, 1), "padding": ((0, 0), (0, 0)),
                                      "lhs_dilation": (6, 1)}),
    ],
)  # fmt: skip
def test_convolutions_are_counted_as_xla_counts_them(image, kernel, options):
    def convolve(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel))
    compiled = jax.jit(convolve).lower(*shapes).compile()
    module = hlo.parse(compiled.as_text())
    (found,) = [
        (own[name], own)
        for own in module.named.values()
        for name in own
        if own[name].opcode == "convolution"
    ]
    assert traffic._product_flops(*found) == compiled.cost_analysis()["flops"] > 0
