"""Runs every kernel that writes slots, pool, digests or maps, for a memory checker; see test_sanitizer.py.

  compute-sanitizer --padding=4096 python -m tests.sanitized [op ...] [--plant]

Ends with 1 if a byte differs from what XLA's implementation leaves, that is, also if something beyond what an op may
write has changed. `--plant` writes one block beyond the slots instead: the checker must notice.
"""

from __future__ import annotations

import os
import sys

# One allocation an array, so that a neighbour's memory is out of bounds.
os.environ |= {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from pallas_kernels import triton
from pallas_kernels.digest import cuboid_mean

K, L, M, P, S, D = 2, 2, 128, 512, 16, 64  # pool and slots fill 2 MiB, the least that may be allocated
B, G, N = 3, 4, 5
rng = np.random.default_rng(0)


def random(*dims: int) -> jax.Array:
  return jnp.asarray(rng.normal(size=dims), jnp.bfloat16)


def distinct(n: int, *dims: int) -> jax.Array:
  return jnp.asarray(rng.permutation(n)[: np.prod(dims)].reshape(dims), jnp.int32)


def ops():
  """Name, function of (implementation), of the small case that it runs."""
  pool, slots, tail = random(K, L, M, 2, S, D), random(P, 2, S, D), random(K, L, B, 2, S, D)
  digest, layer = random(K, L, M, 2, D), jnp.int32(1)
  ids, to = distinct(B, B), jnp.array([M - 1, -1, 0], jnp.int32)
  slot = P - 1 - distinct(K * L * B, K, L, B)
  slot = jnp.where(slot % 3 == 1, -1, slot)  # the last slot stays
  blocks = jnp.stack([distinct(M, B, N) for _ in range(K)], 1).at[1, :, -1].set(-1)
  maps = kernels.Maps.empty(K, L, M, P)
  steps = jnp.arange(B)

  def step(implementation, threshold=None, group=None):
    options = dict(implementation=implementation)
    two = jnp.full((B, K), 2)
    first = kernels.propose(maps, kernels.Victims(order[None], jnp.int32(1)), layer, blocks[:, :, :2], two, **options)
    held = kernels.commit(maps, layer, first, two, jnp.int32(1), steps, **options)
    length = (blocks >= 0).sum(-1)
    victims, tails = kernels.Victims(order[None], jnp.int32(2)), kernels.Tails(tail, jnp.arange(B), jnp.full(B, 3))
    if threshold is None:
      located = kernels.propose(held, victims, layer, blocks, length, **options)
      partial, attended, filled = kernels.attend(q, tails, pool, slots, layer, located, **options)
      after = kernels.commit(held, layer, located, attended, jnp.int32(2), steps, **options)
      return filled, after, attended, jnp.isfinite(partial.output)
    free = kernels.Free.at_first(held, victims, jnp.int32(0))
    held, free = kernels.evict(held, victims, free, jnp.int32(P - 2), **options)
    located = kernels.find(held, layer, blocks, length, group=group, **options)
    taking = kernels.Taking(kernels.Stop(threshold, untested=0), free)
    made = kernels.attend_and_take(q, tails, pool, slots, layer, located, taking, **options)
    partial, attended, _, located, free = made
    after = kernels.commit(held, layer, located, attended, jnp.int32(2), steps, **options)
    after, free = kernels.evict(after, victims, free, made.located.missed(attended), **options)
    # Who comes first gets which slot is not said: what is in slots is.
    return after.slot_of >= 0, after.last_selected, attended, free.taken, jnp.isfinite(partial.output)

  q, order = random(B, K, G, D), distinct(P, P)  # in any order: what was used is passed over
  yield "attend", step
  yield "progressive", lambda i: step(i, 0.9, 2)
  to_slot = jnp.where(blocks[0] >= 0, distinct(P, K, N), -1)[None]
  yield "load", lambda i: kernels.load_blocks(pool, slots, layer, blocks[:1], to_slot, implementation=i)
  yield "store", lambda i: kernels.store_blocks(pool, tail, 0, ids, to, implementation=i)
  yield "place", lambda i: kernels.place_blocks(slots, tail, ids, slot, implementation=i)
  yield "digests", lambda i: kernels.store_digests(digest, tail, 0, ids, to, rule=cuboid_mean, implementation=i)
  where = jnp.where(jnp.arange(N) % 2 == 0, to_slot[0], -1)
  yield (
    "gather",
    lambda i: kernels.gather_blocks(pool, slots, layer, jnp.maximum(blocks[0], -1), where, implementation=i),
  )


def plant() -> None:
  """Writes one block beyond the slots, as a kernel with a wrong slot id would."""

  def kernel(_, slots_ref):
    slots_ref[P] = jnp.zeros((2, S, D), jnp.bfloat16)

  slots = random(P, 2, S, D)
  f = triton.call(kernel, out_shape=slots, input_output_aliases={0: 0}, implementation="triton", name="planted")
  jax.block_until_ready(jax.jit(f, donate_argnums=0)(slots))


def main() -> int:
  if "--plant" in sys.argv:
    plant()
    return 0
  implementation = "triton" if jax.default_backend() == "gpu" else "interpret"
  failed = []
  wanted = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
  for name, op in ops():
    if wanted and name not in wanted:
      continue
    print(name, flush=True)  # a crash then says where
    actual, expected = (jax.jit(op, static_argnums=0)(i) for i in (implementation, "xla"))
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), actual, expected)
    if not all(jax.tree.leaves(same)):
      failed.append(name)
  print("differ:", ", ".join(failed) or "none")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
