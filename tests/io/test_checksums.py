# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that changed on the disk: every flipped bit is noticed, or makes no difference."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from same import assert_same_bits

from digseg_jax.config.schema import CheckpointConfig, MeshConfig
from digseg_jax.errors import UserError
from digseg_jax.io.checkpoint import Checkpointer
from digseg_jax.io.checksums import array_sums, json_sum
from digseg_jax.runtime.sharding import make_mesh

META = {"vocabulary": ["water", "forest"]}
SCORES = {"val_miou": 0.25}
BEST = CheckpointConfig(best="val_miou")


def state(seed=0):
    """A large array and two small ones, which are stored as one."""
    make = np.random.default_rng(seed)
    tree = {"kernel": make.normal(size=(260, 256)), "bias": make.normal(size=3)}
    return {"params": jax.tree.map(jnp.float32, tree), "step": jnp.int32(7)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints, of steps 5 and 10."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(str(workdir), BEST) as checkpointer:
        checkpointer.save(5, state(), META, SCORES)
        checkpointer.save(10, state(), META, SCORES)
    return workdir


def restore(workdir, step=10):
    """What a run would go on with: best step, next step, state and meta."""
    with Checkpointer(str(workdir), BEST, create=False) as checkpointer:
        best = checkpointer.best_step()
        shapes = jax.eval_shape(state)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
        return best, *checkpointer.restore(wanted, step)


def places(folder, count, make):
    """(file, byte, bit): half of them anywhere in the data, half of them with each file as likely."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    sizes = np.asarray([p.stat().st_size for p in files])
    for i in range(count):
        chance = sizes / sizes.sum() if i % 2 else None
        file = files[make.choice(len(files), p=chance)]
        yield file, int(make.integers(file.stat().st_size)), int(make.integers(8))


def test_eighty_flipped_bits_are_noticed_or_harmless(run):
    expected, noticed = restore(run), 0
    for file, byte, bit in places(run / "checkpoints" / "10", 80, np.random.default_rng(0)):
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[byte] ^= 1 << bit
        file.write_bytes(changed)
        try:
            assert_same_bits(restore(run), expected)
        except UserError as error:
            assert str(run / "checkpoints" / "10") in tiny.one_line(error)
            noticed += 1
        finally:
            file.write_bytes(whole)
    assert noticed > 40


def test_the_message_names_the_array_and_the_way_back(run, tmp_path):
    with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(5, state(), META)
        checkpointer.save(10, state(), META)
    data = max((tmp_path / "checkpoints" / "10" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    with pytest.raises(UserError) as caught:
        restore(tmp_path)
    message = tiny.one_line(caught.value)
    assert "params.large.kernel: not the values that were saved" in message
    assert f"to go back to step 5, remove {tmp_path / 'checkpoints' / '10'}" in message
    assert restore(tmp_path, 5)[1] == 5


def edit(run, entry, change):
    """Changes a JSON entry of checkpoint 10 by a function; returns what undoes it."""
    folder = run / "checkpoints" / "10" / entry
    (file,) = (p for p in folder.iterdir() if p.name in ("metadata", "metrics"))
    before = file.read_text()
    file.write_text(json.dumps(change(json.loads(before))))
    return lambda: file.write_text(before)


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("data", lambda x: x | {"next_step": 30}),
        ("meta", lambda x: x | {"vocabulary": ["forest", "water"]}),
        ("meta", lambda x: {k: v for k, v in x.items() if k != "sums"}),
        ("meta", lambda x: {k: v for k, v in x.items() if k != "checksum"}),
        ("metrics", lambda x: x | {"val_miou": 0.75}),
    ],
    ids=["next step", "meta", "without sums", "without its checksum", "metrics"],
)
def test_what_stands_beside_the_arrays_is_bound_to_them(run, entry, change):
    undo = edit(run, entry, change)
    with pytest.raises(UserError, match=f"cannot be read .*{entry} entry"):
        restore(run)
    undo()


def test_a_checkpoint_without_checksums_is_read_with_a_line(run, caplog):
    older = ("sums", "checksum", "metrics")
    undo = edit(run, "meta", lambda x: {k: v for k, v in x.items() if k not in older})
    with caplog.at_level("WARNING", "digseg_jax"):
        assert_same_bits(restore(run)[2], state())
    undo()
    assert f"{run / 'checkpoints' / '10'}: has no checksums" in caplog.text


def test_a_sum_is_the_same_on_every_mesh_and_another_for_swapped_elements():
    x = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    sums = set()
    for sizes in ((1, 2, 1), (2, 2, 2), (1, 1, 2)):
        count = int(np.prod(sizes))
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:count])
        placed = jax.device_put(x, NamedSharding(mesh, P("fsdp", "tensor")))
        sums |= set(array_sums({"x": placed}).values())
    assert len(sums | set(array_sums({"x": x}).values())) == 1
    assert array_sums({"x": x[::-1]}) != array_sums({"x": x})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_every_type_of_a_state_has_a_sum(dtype):
    x = jnp.asarray([0, 1, 1, 0, 1]).astype(dtype)
    assert array_sums({"x": x}) != array_sums({"x": x.at[3].set(jnp.ones((), x.dtype))})


def test_the_sum_of_json_does_not_depend_on_the_order_of_keys():
    assert json_sum({"a": 1, "b": [2]}) == json_sum({"b": [2], "a": 1}) != json_sum({"a": 1, "b": [3]})
