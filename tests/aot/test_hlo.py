# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""Reading the text of compiled programs: layouts, loops, collectives, buffers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from digseg_jax.aot import hlo
from digseg_jax.aot.kernels import kernel_flops

# as libtpu prints it, shortened: a loop of six runs with a gather of weights, a fused reduce-scatter
TPU = """HloModule jit_step, is_scheduled=true

%add.clone (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %add = bf16[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[3,3,320,320]) -> bf16[3,3,320,80] {
  %input = bf16[3,3,320,320]{2,3,1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.6 = bf16[3,3,320,320]{2,3,1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add.clone
  ROOT %slice = bf16[3,3,320,80]{2,3,1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.6), dynamic_slice_sizes={3,3,320,80}
}

%fused (a: bf16[2,64,64,320], b: bf16[320,320]) -> bf16[2,64,64,320] {
  %a = bf16[2,64,64,320]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[320,320]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[2,64,64,320]{3,2,1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=01bf_io->01bf
}

%body (p: (s32[], bf16[2,64,64,320], bf16[320,80])) -> (s32[], bf16[2,64,64,320], bf16[320,80]) {
  %p = (s32[], bf16[2,64,64,320]{3,2,1,0}, bf16[320,80]{1,0}) parameter(0)
  %x = bf16[2,64,64,320]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[320,80]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %all-gather.1 = bf16[320,320]{1,0:T(8,128)(2,1)S(1)} all-gather(%w), replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={1}
  %fusion.1 = bf16[2,64,64,320]{3,2,1,0:T(8,128)(2,1)} fusion(%x, %all-gather.1), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/dot_general"}
  ROOT %t = (s32[], bf16[2,64,64,320]{3,2,1,0}, bf16[320,80]{1,0}) tuple(%p, %fusion.1, %w)
}

%condition (q: (s32[], bf16[2,64,64,320], bf16[320,80])) -> pred[] {
  %q = (s32[], bf16[2,64,64,320]{3,2,1,0}, bf16[320,80]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %bound = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (p0: bf16[2,64,64,320], p1: bf16[320,80], p2: bf16[3,3,320,320]) -> bf16[3,3,320,80] {
  %p0 = bf16[2,64,64,320]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[320,80]{1,0:T(8,128)(2,1)} parameter(1)
  %p2 = bf16[3,3,320,320]{2,3,1,0:T(8,128)(2,1)} parameter(2)
  %start = (s32[], bf16[2,64,64,320]{3,2,1,0}, bf16[320,80]{1,0}) tuple(%p0, %p1)
  %while.1 = (s32[], bf16[2,64,64,320]{3,2,1,0}, bf16[320,80]{1,0}) while(%start), condition=%condition, body=%body
  %kernel.1 = bf16[2,64,64,8]{3,2,1,0:T(8,128)(2,1)} custom-call(%p0), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512
}}, metadata={op_name="jit(step)/splash"}
  ROOT %out = bf16[3,3,320,80]{2,3,1,0:T(8,128)(2,1)} fusion(%p2), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_tiles_pad_the_minor_dimensions():
    shape = hlo.parse(TPU).computations["main"][1].shapes[0]
    assert shape == hlo.Shape("bf16", (320, 80), (1, 0), (8, 128))
    assert (shape.bytes, shape.padded_bytes) == (320 * 80 * 2, 320 * 128 * 2)


def test_collectives_count_as_often_as_their_loop_runs():
    found = hlo.collectives(hlo.parse(TPU), 4)
    assert found["all-gather"] == hlo.Collective(6, 6 * 0.75 * 320 * 320 * 2)
    # an all-reduce inside XLA's fusion of that name is half of one
    assert found["reduce-scatter"] == hlo.Collective(1, 0.75 * 9 * 320 * 320 * 2)
    assert set(found) == {"all-gather", "reduce-scatter"}


# a gather beside two convolutions: start, two steps and end are fusions that all name it
CHAIN = """HloModule jit_step, is_scheduled=true

%started (a: bf16[64,320]) -> bf16[1024,320] {
  %a = bf16[64,320]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1024,320]{1,0:S(1)} all-gather(%a), channel_id=49, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%step (b: bf16[64,320]) -> bf16[1024,320] {
  %b = bf16[64,320]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1024,320]{1,0:S(1)} all-gather(%b), channel_id=49, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%other (c: bf16[64,320]) -> bf16[1024,320] {
  %c = bf16[64,320]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[1024,320]{1,0:S(1)} all-gather(%c), channel_id=50, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (p: bf16[64,320]) -> bf16[1024,320] {
  %p = bf16[64,320]{1,0} parameter(0)
  %f1 = bf16[1024,320]{1,0:S(1)} fusion(%p), kind=kLoop, calls=%started
  %f2 = bf16[1024,320]{1,0:S(1)} fusion(%p), kind=kLoop, calls=%step
  %f3 = bf16[1024,320]{1,0:S(1)} fusion(%p), kind=kLoop, calls=%step
  ROOT %f4 = bf16[1024,320]{1,0:S(1)} fusion(%p), kind=kLoop, calls=%other
}
"""


def test_the_pieces_of_a_collective_beside_other_work_are_one():
    received = 2 * 15 / 16 * 1024 * 320 * 2
    assert hlo.collectives(hlo.parse(CHAIN), 16) == {
        "all-gather": hlo.Collective(2, received, received)
    }


# one that is started and awaited elsewhere, one in a computation of its own, one that nothing runs beside
BESIDE = """HloModule jit_step, is_scheduled=true

%scattering (a: f32[1024,320]) -> f32[256,320] {
  %a = f32[1024,320]{1,0} parameter(0)
  ROOT %scattered = f32[256,320]{1,0} reduce-scatter(%a), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[1024,320]) -> f32[1024,320] {
  %p = f32[1024,320]{1,0} parameter(0)
  %s = (f32[1024,320]{1,0}, f32[4096,320]{1,0}) all-gather-start(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %d = f32[4096,320]{1,0} all-gather-done(%s)
  %w = ((f32[1024,320]{1,0}), f32[256,320]{1,0}) async-start(%p), calls=%scattering
  %v = f32[256,320]{1,0} async-done(%w)
  ROOT %summed = f32[1024,320]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""  # noqa: E501


def test_what_is_received_while_the_device_computes():
    found = hlo.collectives(hlo.parse(BESIDE), 4)
    size = 1024 * 320 * 4
    assert found == {
        "all-gather": hlo.Collective(1, 3 * size, 3 * size),
        "all-reduce": hlo.Collective(1, 1.5 * size, 0.0),
        "reduce-scatter": hlo.Collective(1, 0.75 * size, 0.75 * size),
    }


def test_large_buffers_are_those_in_main_memory():
    buffers = hlo.largest_buffers(hlo.parse(TPU))
    shapes = ["bf16[2,64,64,320]", "bf16[2,64,64,8]", "bf16[3,3,320,80]"]
    assert [b.shape for b in buffers[:3]] == shapes  # not the gathered one, in S(1)
    assert buffers[1].op_name == "jit(step)/splash"  # behind a line break
    assert buffers[0].bytes == 2 * 64 * 64 * 384 * 2 and buffers[0].op_name == "jit(step)/dot_general"


SPLASH = """
ENTRY %main (p0: bf16[4,5,4096,64], p1: bf16[4,5,1024,64]) -> bf16[4,5,4096,64] {
  %p0 = bf16[4,5,4096,64]{3,2,1,0} parameter(0)
  %p1 = bf16[4,5,1024,64]{3,2,1,0} parameter(1)
  %splash_mha_fwd_residuals.1 = (f32[4,512,64]{2,1,0}, bf16[4,5,4096,64]{3,2,1,0}) custom-call(%p0, %p1), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, s8[1,8,8]{2,1,0}, bf16[4,5,4096,64]{3,2,1,0}, bf16[4,5,1024,64]{3,2,1,0}, bf16[4,5,1024,64]{3,2,1,0}}
  %splash_mha_dkv_no_residuals.2 = bf16[4,5,1024,64]{3,2,1,0} custom-call(%p0, %p1), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, s8[1,8,8]{2,1,0}, bf16[4,5,4096,64]{3,2,1,0}, bf16[4,5,1024,64]{3,2,1,0}, bf16[4,5,1024,64]{3,2,1,0}, f32[4,5,8,4096]{3,2,1,0}}
  ROOT %other = bf16[4,5,4096,64]{3,2,1,0} custom-call(%p0), custom_call_target="ConcatBitcast"
}
"""  # noqa: E501


def test_kernels_have_the_flops_that_xla_does_not_count():
    alone = hlo.parse(SPLASH.replace("[4,5,", "[5,"))  # one example
    assert kernel_flops(alone) == (2 + 4) * 2 * 5 * 4096 * 1024 * 64
    product = 2 * 4 * 5 * 4096 * 1024 * 64
    assert kernel_flops(hlo.parse(SPLASH)) == (2 + 4) * product
    assert kernel_flops(hlo.parse(TPU)) == 0


CALL = 'custom-call(%p0), custom_call_target="tpu_custom_call", operand_layout_constraints={'


def test_cross_attention_kernels_have_theirs():
    q, k, bias = "bf16[4,256,64]{2,1,0}", "bf16[4,128,64]{2,1,0}", "f32[4,1,128]{2,1,0}"
    text = f"""
ENTRY %main (p0: bf16[4,256,64]) -> bf16[4,256,64] {{
  %p0 = {q} parameter(0)
  %cross_attention_forward.1 = {q} {CALL}{q}, {k}, {k}, {bias}}}
  ROOT %cross_attention_backward.7 = {q} {CALL}{q}, {q}, {k}, {k}, {bias}}}
}}
"""
    assert kernel_flops(hlo.parse(text)) == (2 + 5) * 2 * 4 * 256 * 128 * 64


def test_feed_forward_kernels_have_theirs():
    x, up, down = "bf16[1024,64]{1,0}", "bf16[64,512]{1,0}, bf16[1,512]{1,0}", "bf16[256,64]{1,0}"
    text = f"""
ENTRY %main (p0: bf16[1024,64]) -> bf16[1024,64] {{
  %p0 = bf16[1024,64]{{1,0}} parameter(0)
  %feed_forward_forward.1 = {x} {CALL}{x}, {up}, {down}, bf16[1,64]{{1,0}}}}
  ROOT %feed_forward_backward.7 = {x} {CALL}{x}, {x}, {up}, {down}}}
}}
"""
    assert kernel_flops(hlo.parse(text)) == (3 + 8) * 2 * 1024 * 64 * 256


def test_text_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("module @jit_f { }")


def test_a_program_of_this_machine():
    """Numbers that can be worked out: a scan of five products over four devices."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())

    def f(a, b):
        out, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), a, length=5)
        return out.sum()

    compiled = (
        jax.jit(f, in_shardings=(rows, whole), out_shardings=whole)
        .lower(jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32))
        .compile()
    )
    module = hlo.parse(compiled.as_text())
    found = hlo.collectives(module, 4)
    assert found["all-reduce"] == hlo.Collective(1, 2 * 0.75 * 4)
