"""Every kernel lowers for a GPU at the shapes it serves, also without one; the interpreter runs what does not lower."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as Spec

import pallas_kernels as kernels
from pallas_kernels import digest
from pallas_kernels.score import REDUCTIONS, box
from pallas_kernels.stop import REST, WHEN
from sparse_serve_jax.attention.audit import AuditAt
from sparse_serve_jax.config import CacheConfig, EngineConfig, SparseConfig
from sparse_serve_jax.memory.kv_cache import Hot, KVCache
from sparse_serve_jax.step import DecodeBatch, PrefillBatch, SamplingRows, Setup, decode_step, prefill_segment
from tests.cases import REAL, Shape
from tests.tiny import tiny_model

B, K, L, M, P, R, N = 20, 8, 32, 20480, 1 << 20, 64, 1024
Array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
Int = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
MAPS = kernels.Maps(Int((K, L, M)), *[Int((P,))] * 3, Int((K, L, M)))
ON_GPU = dict(implementation="triton")


def lower(f, *arguments, **named) -> str:
  """The program of `f` for a Hopper GPU."""
  with contextlib.ExitStack() as stack:
    if hasattr(jax.sharding, "AbstractDevice"):  # since 0.11 the lowering asks for a device
      device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
      mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
      stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
    return jax.jit(f).trace(*arguments, **named).lower(lowering_platforms=("cuda",)).as_text()


def located(n: int, groups: int) -> kernels.Located:
  return kernels.Located(*[Int((B, K, n))] * 3, Int((B, K, groups)), Int((B, K)))


@pytest.mark.parametrize("shape", [*REAL.values(), Shape(8, 64, 128), Shape(3, 16, 64), Shape(1, 8, 16)], ids=str)
@pytest.mark.parametrize(
  ("n", "groups", "threshold", "n_slots"), [(64, 1, None, P), (N, N // 4, 0.95, P), (N, 1, None, 0)]
)
def test_attend(shape: Shape, n: int, groups: int, threshold: float | None, n_slots: int):
  stop = None if threshold is None else kernels.Stop(threshold, untested=4)
  check_attend(shape, n, groups, stop, n_slots)


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("when", WHEN)
def test_attend_by_rule(rest: str, when: str):
  check_attend(REAL["qwen2.5-7b"], N, N // 4, kernels.Stop(0.95, untested=4, rule=kernels.StopRule(rest, when)), P)


def check_attend(shape: Shape, n: int, groups: int, stop: kernels.Stop | None, n_slots: int) -> None:
  G, S, D = shape
  text = lower(
    functools.partial(kernels.attend, stop=stop, **ON_GPU),
    Array((B, K, G, D)),
    kernels.Tails(Array((K, L, R, 2, S, D)), Int((B,)), Int((B,))),
    Array((K, L, M, 2, S, D)),
    Array((n_slots, 2, S, D)),
    Int(()),
    located(n, groups),
  )
  assert all(
    f'name = "{name}"' in text for name in (["attend"] if stop is None else ["attend_always", "attend_until_stop"])
  )


@pytest.mark.parametrize("of_call", [None, 1, B])
def test_attend_and_take(of_call: int | None):
  """The shape of the 8B model; zones of rows, of all lists, or none."""
  G, S, D = REAL["llama3-8b"]
  n_zones, zone = (1, None) if of_call is None else (64, Int((of_call,)))
  free = kernels.Free(Int((n_zones, P // n_zones)), *[Int((n_zones,))] * 3, zone)
  text = lower(
    lambda *arguments: kernels.attend_and_take(
      *arguments[:-1], kernels.Taking(kernels.Stop(0.95, untested=4), arguments[-1]), **ON_GPU
    ),
    Array((B, K, G, D)),
    kernels.Tails(Array((K, L, R, 2, S, D)), Int((B,)), Int((B,))),
    Array((K, L, M, 2, S, D)),
    Array((P, 2, S, D)),
    Int(()),
    located(N, N // 4),
    free,
  )
  assert 'name = "attend_always"' in text and 'name = "attend_until_stop"' in text


@pytest.mark.parametrize(("n", "group"), [(64, None), (N, 4), (4096, None), (L, 1)])
@pytest.mark.parametrize(("n_zones", "of_call"), [(1, None), (L, 1), (R, B)])
def test_residency(n: int, group: int | None, n_zones: int, of_call: int | None):
  zone = None if of_call is None else Int((of_call,))
  victims = kernels.Victims(Int((n_zones, P // n_zones)), Int(()), zone)
  layer = Int((L,)) if group == 1 else Int(())  # one for each rank
  if group is None:
    propose = functools.partial(kernels.propose, **ON_GPU)
    text = lower(propose, MAPS, victims, layer, Int((B, K, n)), Int((B, K)))
    assert 'name = "look_up"' in text and 'name = "assign"' in text
  else:
    find = functools.partial(kernels.find, group=group, **ON_GPU)
    assert 'name = "find"' in lower(find, MAPS, Int(()), Int((B, K, n)), Int((B, K)))
    free = kernels.Free(victims.slots, *[Int((n_zones,))] * 3)
    wanted = Int((B, K)) if n_zones == 1 else Int((n_zones,))
    assert 'name = "evict"' in lower(functools.partial(kernels.evict, **ON_GPU), MAPS, victims, free, wanted)
  groups = 1 if group is None else n // group
  commit = functools.partial(kernels.commit, **ON_GPU)
  assert 'name = "commit"' in lower(commit, MAPS, layer, located(n, groups), Int((B, K)), layer, Int((B,)))


def test_slots_are_vacated_for_any_number_of_blocks():
  """LWM-7B's of a prompt of a million tokens and more: a kernel's values are 2^20 at most."""
  n_heads, n = 32, (1 << 15) + 1
  maps = MAPS._replace(slot_of=Int((n_heads, L, 2 * n)), last_selected=Int((n_heads, L, 2 * n)))
  victims, free = kernels.Victims(Int((1, P)), Int(())), kernels.Free(Int((1, n_heads * n)), *[Int((1,))] * 3)
  new = jax.ShapeDtypeStruct((1, n_heads, n), jnp.bool_)
  vacate = functools.partial(kernels.vacate, **ON_GPU)
  assert 'name = "evict"' in lower(vacate, maps, victims, free, new, Int((1, 1)))


@pytest.mark.parametrize(("n", "k"), [(321, 64), (N, N), (4096, 64), (16384, 64)])
def test_select(n: int, k: int):
  scores = jax.ShapeDtypeStruct((B, K, n), jnp.float32)
  listed = kernels.Listed(Int((B, n)), Int((B,)))
  for of in (None, listed):
    assert 'name = "select"' in lower(functools.partial(kernels.select, k=k, **ON_GPU), scores, listed=of)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape", [*REAL.values(), Shape(8, 64, 128), Shape(3, 16, 64), Shape(20, 8, 4)], ids=str)
def test_score(shape: Shape, reduce: str, dtype: Any):
  G, _, D = shape
  score = functools.partial(kernels.score, ranking=kernels.Ranking(box, reduce, sinks=2, window=2), **ON_GPU)
  q, digests = Array((B, K, G, D), dtype=dtype), Array((K, L, M, 2, D), dtype=dtype)
  assert 'name = "score"' in lower(score, q, digests, Int(()), Int((B, N)), Int((B,)))


@pytest.mark.parametrize("shape", [*REAL.values(), Shape(8, 64, 128)], ids=str)
def test_digests(shape: Shape):
  _, S, D = shape
  digests = Array((K, L, M, 2, D))
  for rule in (digest.cuboid_mean, digest.min_max):
    store = functools.partial(kernels.store_digests, rule=rule, **ON_GPU)
    source = Array((K, L, R, 2, S, D))
    assert 'name = "store_digests"' in lower(store, digests, source, Int(()), Int((B,)), Int((B,)))


@pytest.mark.parametrize("shape", [REAL["llama3-8b"], Shape(1, 128, 128), Shape(1, 8, 16)], ids=str)
def test_copies(shape: Shape):
  _, S, D = shape
  pool, slots, tail = (Array((*dims, 2, S, D)) for dims in ((K, L, M), (P,), (K, L, R)))
  for name, arguments in {
    "load_blocks": (pool, slots, Int(()), Int((B, K, 64)), Int((B, K, 64))),
    "store_blocks": (pool, tail, Int(()), Int((B,)), Int((B,))),
    "place_blocks": (slots, tail, Int((B,)), Int((K, L, B))),
    "gather_blocks": (pool, slots, Int(()), Int((K, N)), Int((K, N))),
  }.items():
    assert f'name = "{name}"' in lower(functools.partial(getattr(kernels, name), **ON_GPU), *arguments)


@pytest.mark.parametrize("before", [0, N])
@pytest.mark.parametrize("shape", [*REAL.values(), Shape(1, 128, 128), Shape(1, 8, 16)], ids=str)
def test_prefill_tiles(shape: Shape, before: int):
  (G, S, D), C = shape, 4096 + shape.S  # not whole tiles
  tiles, n = kernels.Tiles.of(C, S), before + C // S
  lists = kernels.TileLists(Int((tiles.count, K, n)), Int((tiles.count, K)))
  pool, slots = Array((K, L, M, 2, S, D)), Array((P, 2, S, D))
  prefix = kernels.Prefix(pool, slots, Int(()), *[Int((K, before))] * 2, Int(())) if before else None
  f = functools.partial(kernels.prefill_tiles, tiles=tiles, **ON_GPU)
  text = lower(f, Array((C, K, G, D)), *[Array((C, K, D))] * 2, lists, prefix=prefix)
  assert 'name = "prefill_tiles"' in text


@pytest.mark.parametrize("audit", [None, AuditAt(Int(()), Int(()))], ids=["plain", "audited"])
def test_a_step_asks_the_host_nothing(audit: AuditAt | None):
  """A decode step on a GPU has no branch and no loop of unknown length outside its kernels: for either, the host would
  wait for the device, in the middle of a step."""
  model = tiny_model()
  config = EngineConfig(CacheConfig(block_tokens=8, offload=False), SparseConfig(policy="psa", token_budget=64))
  setup = Setup.of(model.config, config, "triton")
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  kv = lambda *dims: f32((*dims, 2, 8, 16))  # noqa: E731
  maps = kernels.Maps(Int((2, 2, 40)), *[Int((12,))] * 3, Int((2, 2, 40)))
  hot = Hot(kv(12), f32((2, 2, 40, 2, 16)), maps, kv(2, 2, 4), Int((4, 16)), Int((4,)), Int(()))
  cache, batch = KVCache(kv(2, 2, 40), hot), DecodeBatch(*[Int((8,))] * 5, None, f32(()), audit)
  mesh = AbstractMesh((1,), ("tp",), axis_types=(AxisType.Auto,))
  f = jax.shard_map(
    functools.partial(decode_step, setup, 16), mesh=mesh, in_specs=Spec(), out_specs=Spec(), check_vma=False
  )
  found = set(primitives(jax.make_jaxpr(f)(model.params, cache, batch).jaxpr))
  assert {"scan", "pallas_call", "argmax"} <= found and not {"cond", "while"} & found


@pytest.mark.parametrize(("n_rows", "width"), [(4, 0), (1, 0), (1, 16)])
@pytest.mark.parametrize("static_layers", [0, 1, 2])  # 2: all
def test_a_segment_does_not_make_the_host_wait(n_rows: int, width: int, static_layers: int):
  """It does in a branch, and in a loop whose trips XLA does not know."""
  model = tiny_model()
  setup = Setup.of(model.config, EngineConfig(CacheConfig(block_tokens=8), SparseConfig(token_budget=512)), "triton")
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  kv = lambda *dims: f32((*dims, 2, 8, 16))  # noqa: E731
  maps = kernels.Maps(Int((2, 2, 40)), *[Int((12,))] * 3, Int((2, 2, 40)))
  hot = Hot(kv(12), f32((2, 2, 40, 2, 16)), maps, kv(2, 2, 4), Int((4, 16)), Int((4,)), Int(()))
  one, row = f32((n_rows,)), Int((n_rows,))
  sampling = SamplingRows(one, one, jax.ShapeDtypeStruct((n_rows,), jnp.uint32), Int((n_rows, 8)), row, one)
  batch = PrefillBatch(Int((128,)), Int(()), row, row, *[Int(())] * 3, row, sampling, static_layers)
  mesh = AbstractMesh((1,), ("tp",), axis_types=(AxisType.Auto,))
  f = jax.shard_map(
    functools.partial(prefill_segment, setup, width), mesh=mesh, in_specs=Spec(), out_specs=Spec(), check_vma=False
  )
  arguments = model.params, KVCache(kv(2, 2, 40), hot), f32((128, 32)), batch
  control = [e for e in equations(jax.make_jaxpr(f)(*arguments).jaxpr) if e.primitive.name in ("scan", "while", "cond")]
  outermost = next(e for e in control if any("dot_general" in str(p) for p in e.params.values()))
  assert outermost.params.get("length") == (static_layers or None)
  assert [e.primitive.name for e in control if e.primitive.name != "scan"] == ["while"] * (not static_layers)


def primitives(jaxpr: Any) -> Iterator[str]:
  """Names of all operations of a program, those of kernels left out."""
  return (equation.primitive.name for equation in equations(jaxpr))


def equations(jaxpr: Any) -> Iterator[Any]:
  """All operations of a program, those of kernels left out."""
  for equation in jaxpr.eqns:
    yield equation
    if equation.primitive.name != "pallas_call":
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from equations(inner)
