"""Mistakes in the source, each with a quick test that must notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
  """`old`, found exactly once in `file`, becomes `new`; then `tests` must fail (pytest ids, each by itself)."""

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]


ATTEND, RESIDENCY, COPIES, SELECTION = (
  f"tests/test_kernel_{name}.py" for name in ("attend", "residency", "copies", "selection")
)
MAPS = "pallas_kernels/residency.py"
ATTEND_XLA = f"{ATTEND}::test_attend[group-1-xla]"
ATTEND_INTERPRET = f"{ATTEND}::test_attend[group-1-interpret]"

MUTATIONS = [
  Mutation(
    "attend swaps K and V",
    "pallas_kernels/reference.py",
    "kv[..., 0, :, :], kv[..., 1, :, :]",
    "kv[..., 1, :, :], kv[..., 0, :, :]",
    (ATTEND_XLA,),
  ),
  Mutation(
    "attend sees one token of the tail too many",
    "pallas_kernels/reference.py",
    "jnp.arange(tail.shape[4])[None] < tail_tokens[:, None]",
    "jnp.arange(tail.shape[4])[None] <= tail_tokens[:, None]",
    (ATTEND_XLA,),
  ),
  Mutation(
    "the stop test is not strict",
    "pallas_kernels/reference.py",
    "(seen > log_threshold)",
    "(seen >= log_threshold)",
    (f"{ATTEND}::test_threshold_one_never_stops[xla]",),
  ),
  Mutation(
    "prefill sees the next token",
    "pallas_kernels/reference.py",
    "(place[None] - before <= at)",
    "(place[None] - before <= at + 1)",
    (f"{COPIES}::test_prefill_attention[None-float32-xla]",),
  ),
  Mutation(
    "prefill does not see its own token",
    "pallas_kernels/reference.py",
    "(place[None] - before <= at)",
    "(place[None] - before < at)",
    (f"{COPIES}::test_prefill_attention[2-float32-xla]",),
  ),
  Mutation(
    "the kernel's keys are values",
    "pallas_kernels/attend.py",
    "s = mass(keys, every)",
    "s = mass(values, every)",
    (ATTEND_INTERPRET,),
  ),
  Mutation(
    "the kernel sees one token of the tail too many",
    "pallas_kernels/attend.py",
    "jnp.arange(block_tokens) < tail_tokens_ref[b]",
    "jnp.arange(block_tokens) <= tail_tokens_ref[b]",
    (ATTEND_INTERPRET,),
  ),
  Mutation(
    "the kernel's stop test is not strict",
    "pallas_kernels/attend.py",
    "(log_p > log_threshold)",
    "(log_p >= log_threshold)",
    (f"{ATTEND}::test_threshold_one_never_stops[interpret]",),
  ),
  Mutation(
    "release leaves a freed block in its slot",
    MAPS,
    'maps.slot_of.at[:, :, freed].set(-1, mode="drop")',
    "maps.slot_of",
    (f"{RESIDENCY}::test_release_forgets_all_layers_and_heads",),
  ),
  Mutation(
    "release leaves the slot taken",
    MAPS,
    'maps.block_of.at[slots].set(-1, mode="drop")',
    "maps.block_of",
    (f"{RESIDENCY}::test_release_forgets_all_layers_and_heads",),
  ),
  Mutation(
    "a hit is taken as a victim",
    MAPS,
    'age = maps.last_used.at[jnp.where(hit, slot, n_slots)].set(_PROTECTED, mode="drop")',
    "age = maps.last_used",
    (f"{RESIDENCY}::test_hits_are_never_victims",),
  ),
  Mutation(
    "an evicted block keeps its entry",
    MAPS,
    'slot_of = maps.slot_of.at[head, rest // n_pool, rest % n_pool].set(-1, mode="drop")',
    "slot_of = maps.slot_of",
    (f"{RESIDENCY}::test_victims_are_the_least_recently_used",),
  ),
  Mutation(
    "a block that attention never reached is taken for resident",
    MAPS,
    "enters = reached & ~proposal.hit & (proposal.slot >= 0)",
    "enters = ~proposal.hit & (proposal.slot >= 0)",
    (f"{RESIDENCY}::test_blocks_never_reached_are_not_taken_for_resident",),
  ),
  Mutation(
    "a hit is no use",
    MAPS,
    "touched = out_of_range(reached & (proposal.slot >= 0), proposal.slot, n_slots)",
    "touched = slot",
    (f"{RESIDENCY}::test_victims_are_the_least_recently_used",),
  ),
  Mutation(
    "scores are read from another block's digest",
    "pallas_kernels/score.py",
    "digest[k, layer, tables[:, None, :]]",
    "digest[k, layer, tables[:, None, :] - 1]",
    (f"{SELECTION}::test_score_without_sinks_and_window",),
  ),
  Mutation(
    "a filled tail's digest goes to the next block",
    "sparse_serve_jax/step.py",
    "to = jnp.where(blocks >= 0, blocks, digest.shape[2])",
    "to = jnp.where(blocks >= 0, blocks + 1, digest.shape[2])",
    ("tests/test_selection.py::test_digests_are_those_of_their_blocks[mean]",),
  ),
]
