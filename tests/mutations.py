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
TILES = "tests/test_kernel_tiles.py"
ZONES, RULES, PREFIX = "tests/test_zones.py", "tests/test_stop_rules.py", "tests/test_prefix.py"
AUDIT = "tests/test_audit.py"
STOP = "pallas_kernels/stop.py"
MAPS, RESIDENT, COMMIT = (f"pallas_kernels/{name}.py" for name in ("maps", "residency", "commit"))
ATTEND_XLA = f"{ATTEND}::test_attend[group-1-xla]"
ATTEND_INTERPRET = f"{ATTEND}::test_attend[group-1-interpret]"

MUTATIONS = [
  Mutation(
    "attend swaps K and V",
    "pallas_kernels/attend_xla.py",
    "kv[..., 0, :, :], kv[..., 1, :, :]",
    "kv[..., 1, :, :], kv[..., 0, :, :]",
    (ATTEND_XLA,),
  ),
  Mutation(
    "attend sees one token of the tail too many",
    "pallas_kernels/attend_xla.py",
    "jnp.arange(block_tokens)[None] < tails.tokens[:, None]",
    "jnp.arange(block_tokens)[None] <= tails.tokens[:, None]",
    (ATTEND_XLA,),
  ),
  Mutation(
    "the stop test is not strict",
    STOP,
    "(claims > threshold)",
    "(claims >= threshold)",
    (f"{ATTEND}::test_threshold_one_never_stops[xla]", f"{ATTEND}::test_threshold_one_never_stops[interpret]"),
  ),
  Mutation(
    "prefill sees the next token",
    "pallas_kernels/prefill.py",
    "(place[None] - before <= at)",
    "(place[None] - before <= at + 1)",
    (f"{COPIES}::test_prefill_attention[None-float32-xla]",),
  ),
  Mutation(
    "prefill does not see its own token",
    "pallas_kernels/prefill.py",
    "(place[None] - before <= at)",
    "(place[None] - before < at)",
    (f"{COPIES}::test_prefill_attention[2-float32-xla]",),
  ),
  Mutation(
    "a tile sees the next token",
    "pallas_kernels/prefill_tiles.py",
    "(token - t * tiles.tile <= row)",
    "(token - t * tiles.tile <= row + 1)",
    (f"{TILES}::test_prefill_tiles[None-float32-xla]",),
  ),
  Mutation(
    "the kernel of a tile sees the next token",
    "pallas_kernels/prefill_tiles.py",
    "row[:, None] >= (columns",
    "row[:, None] + 1 >= (columns",
    (f"{TILES}::test_prefill_tiles[None-float32-interpret]",),
  ),
  Mutation(
    "the kernel of a tile leaves out what is left of a turn",
    "pallas_kernels/prefill_tiles.py",
    "  if turn > 1:",
    "  if turn > 99:",
    (f"{TILES}::test_prefill_tiles[3-float32-interpret]",),
  ),
  Mutation(
    "a window of a tile is one block short",
    "pallas_kernels/tiles.py",
    "first - rule.window)",
    "first - rule.window + 1)",
    (f"{TILES}::test_tile_lists[1-2-0.1-top_k-xla]",),
  ),
  Mutation(
    "a threshold leaves out the block that passes it",
    "pallas_kernels/tiles.py",
    "jnp.cumsum(masses, -1) - masses < rule.share",
    "jnp.cumsum(masses, -1) < rule.share",
    (f"{TILES}::test_tile_lists[1-2-0.5-threshold-xla]",),
  ),
  Mutation(
    "the kernel's keys are values",
    "pallas_kernels/attend.py",
    "triton.dot(of.queries, keys, trans_b=True)",
    "triton.dot(of.queries, values, trans_b=True)",
    (ATTEND_INTERPRET,),
  ),
  Mutation(
    "the kernel sees one token of the tail too many",
    "pallas_kernels/attend.py",
    "jnp.arange(block_tokens) < n)",
    "jnp.arange(block_tokens) <= n)",
    (ATTEND_INTERPRET,),
  ),
  Mutation(
    "the kernel's mean of heads counts those that pad",
    STOP,
    "jnp.where(real, claims, 0.0).sum(-1) / n_heads",
    "claims.mean(-1)",
    (f"{RULES}::test_claims_land_beside_the_threshold[mean_of_heads-last_group-interpret]",),
  ),
  Mutation(
    "the last two groups are one",
    STOP,
    "jnp.where(before == jnp.inf, each, 0.5 * (each + jnp.exp2(before - seen)))",
    "jnp.where(before == jnp.inf, each, each)",
    (f"{RULES}::test_claims_land_beside_the_threshold[every_head-last_two_groups-xla]",),
  ),
  Mutation(
    "sinks and window say what is still to come",
    STOP,
    "jnp.where(start >= self.untested, group, jnp.inf)",
    "group",
    (
      f"{RULES}::test_claims_land_beside_the_threshold[every_head-last_two_groups-xla]",
      f"{RULES}::test_claims_land_beside_the_threshold[every_head-least-interpret]",
    ),
  ),
  Mutation(
    "the kernel's sum of a group knows no new maximum",
    "pallas_kernels/attend.py",
    "group = group * old + mass",
    "group = group + mass",
    (f"{RULES}::test_the_heaviest_block_of_a_group_may_come_last[last_group-interpret]",),
  ),
  Mutation(
    "a split of the hits leaves out its last block",
    "pallas_kernels/attend.py",
    "jnp.minimum(first + share, n)",
    "jnp.minimum(first + share, n) - 1",
    (ATTEND_INTERPRET,),
  ),
  Mutation(
    "the misses of some lists are nobody's work",
    "pallas_kernels/attend.py",
    "jax.lax.div(left + (tiling.miss_programs - 1), tiling.miss_programs)",
    "jax.lax.div(left - 1, tiling.miss_programs)",
    (ATTEND_INTERPRET,),
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
    RESIDENT,
    "claimed = jnp.zeros(n_slots, jnp.int8).at[only(hit, slot, n_slots)]",
    "claimed = jnp.zeros(n_slots, jnp.int8).at[only(hit & False, slot, n_slots)]",
    (f"{RESIDENCY}::test_hits_come_first_and_are_never_victims[xla]",),
  ),
  Mutation(
    "the kernel takes a hit as a victim",
    RESIDENT,
    "jnp.ones((cut.chunk,), jnp.int8)",
    "jnp.zeros((cut.chunk,), jnp.int8)",
    (f"{RESIDENCY}::test_hits_come_first_and_are_never_victims[interpret]",),
  ),
  Mutation(
    "a slot used since the program began is a victim",
    RESIDENT,
    "unused(last_used_ref[victim], since_ref[0])",
    "unused(last_used_ref[victim], since_ref[0] + 1)",
    (f"{RESIDENCY}::test_a_slot_used_since_the_program_began_is_no_victim[interpret]",),
  ),
  Mutation(
    "an evicted block keeps its entry",
    COMMIT,
    'slot_of = maps.slot_of.at[head, rest // n_pool, rest % n_pool].set(-1, mode="drop")',
    "slot_of = maps.slot_of",
    (f"{RESIDENCY}::test_victims_are_the_least_recently_used[xla]",),
  ),
  Mutation(
    "the kernel lets an evicted block keep its entry",
    COMMIT,
    "gone, mask=evicted)",
    "gone, mask=evicted & False)",
    (f"{RESIDENCY}::test_victims_are_the_least_recently_used[interpret]",),
  ),
  Mutation(
    "a block that attention never reached is taken for resident",
    COMMIT,
    "enters = (reached | (located.hit & (blocks >= 0))) & (located.place >= 0)",
    "enters = (reached | (blocks >= 0)) & (located.place >= 0)",
    (f"{RESIDENCY}::test_blocks_never_reached_are_not_taken_for_resident[xla]",),
  ),
  Mutation(
    "the kernel takes a block that attention never reached for resident",
    COMMIT,
    "enters = (reached | (listed & (slot >= 0))) & (place >= 0)",
    "enters = (reached | listed) & (place >= 0)",
    (f"{RESIDENCY}::test_blocks_never_reached_are_not_taken_for_resident[interpret]",),
  ),
  Mutation(
    "a hit is no use",
    COMMIT,
    "touched = jnp.where(reached & located.hit, located.slot, into)",
    "touched = into",
    (f"{RESIDENCY}::test_victims_are_the_least_recently_used[xla]",),
  ),
  Mutation(
    "a slot that the step has used is emptied",
    "pallas_kernels/free.py",
    "left = unused(maps.last_used[victims.slots], victims.since)",
    "left = unused(maps.last_used[victims.slots], victims.since + 9)",
    (f"{ZONES}::test_progressive_lists_evict_the_least_recently_used[shared-4-xla]",),
  ),
  Mutation(
    "the kernel empties a slot that the step has used",
    "pallas_kernels/free.py",
    "unused(last_used_ref[slot], since_ref[0])",
    "unused(last_used_ref[slot], since_ref[0] + 9)",
    (f"{ZONES}::test_progressive_lists_evict_the_least_recently_used[shared-4-interpret]",),
  ),
  Mutation(
    "lists of different rows take one slot",
    "pallas_kernels/attend.py",
    "triton.atomic_add(self.taken, zone, end - first)",
    "triton.atomic_add(self.taken, zone, 0 * (end - first))",
    (f"{ZONES}::test_progressive_lists_evict_the_least_recently_used[shared-4-interpret]",),
  ),
  Mutation(
    "a block takes a slot of another zone",
    "sparse_serve_jax/memory/eviction.py",
    "jnp.minimum(lanes, self.n_zones - 1)[:, None]",
    "jnp.minimum(0 * lanes, self.n_zones - 1)[:, None]",
    (f"{ZONES}::test_blocks_stay_in_their_zone[lane-topk]",),
  ),
  Mutation(
    "a stamp grows old without end",
    MAPS,
    "jnp.where(idle, since + OLDEST, stamp)",
    "stamp",
    (f"{RESIDENCY}::test_a_slot_idle_for_long_never_looks_new",),
  ),
  Mutation(
    "a copy forgets who is wanted",
    "pallas_kernels/copy.py",
    "(entry(lane) < n) & wanted",
    "wanted",
    (f"{COPIES}::test_load_blocks[rounds-interpret]",),
  ),
  Mutation(
    "the kernel scores another block's digest",
    "pallas_kernels/score.py",
    "tables_ref[b, i], 0)",
    "tables_ref[b, i] - 1, 0)",
    (f"{SELECTION}::test_score[box-mean-float32-interpret]",),
  ),
  Mutation(
    "scores are read from another block's digest",
    "pallas_kernels/score.py",
    "digest[k, layer, tables[:, None, :]]",
    "digest[k, layer, tables[:, None, :] - 1]",
    (f"{SELECTION}::test_score_without_sinks_and_window",),
  ),
  Mutation(
    "the certified bound takes a block for one key",
    "sparse_serve_jax/evaluation/replay.py",
    "(by_head + off) * q.shape[-1] ** -0.5 + math.log(program.block_tokens)",
    "(by_head + off) * q.shape[-1] ** -0.5",
    ("tests/test_replay.py::test_the_certified_share_is_a_lower_bound",),
  ),
  Mutation(
    "a filled tail's digest goes to the next block",
    "sparse_serve_jax/memory/saves.py",
    "hot.digest, new.kv, new.layer, new.ids, new.blocks, rule",
    "hot.digest, new.kv, new.layer, new.ids, jnp.where(new.blocks >= 0, new.blocks + 1, -1), rule",
    ("tests/test_selection.py::test_digests_are_those_of_their_blocks[mean]",),
  ),
  Mutation(
    "a filled tail is saved whether or not attention is done",
    "sparse_serve_jax/step.py",
    "jnp.where((rows.tail_tokens == size) & jnp.isfinite(x).all(-1), new_block, -1)",
    "jnp.where(rows.tail_tokens == size, new_block, -1)",
    ("tests/test_buckets.py::test_programs_hold_no_second_cache[topk-1-cpu]",),
  ),
  Mutation(
    "logits that are not finite give a token",
    "sparse_serve_jax/step.py",
    "jnp.where(jnp.isfinite(logits).all(-1), tokens, NOT_FINITE)",
    "tokens",
    ("tests/test_not_finite.py::test_weights_that_are_not_finite_end_every_request_at_once",),
  ),
  Mutation(
    "a prompt whose beginning is cached begins anew in its second layer",
    "sparse_serve_jax/serving/scheduler.py",
    "resident.start, resident.layer = resident.first, layer + n_layers",
    "resident.start, resident.layer = 0, layer + n_layers",
    (f"{PREFIX}::test_a_piece_begins_after_what_is_shared_and_has_a_program[scheduler1-expected1]",),
  ),
  Mutation(
    "a shared block is freed by its first owner",
    "sparse_serve_jax/memory/allocator.py",
    "left = blocks[self._owners[blocks] == 0]",
    "left = blocks[self._owners[blocks] >= 0]",
    (f"{PREFIX}::test_a_shared_block_is_free_when_its_last_owner_frees_it",),
  ),
  Mutation(
    "an idle block is given out while an iteration may read it",
    "sparse_serve_jax/memory/allocator.py",
    "if after <= self._completed:\n        break",
    "if after >= 0:\n        break",
    (f"{PREFIX}::test_idle_blocks_pass_both_gates_before_they_are_given_out",),
  ),
  Mutation(
    "an idle block is given out with its residency",
    "sparse_serve_jax/memory/allocator.py",
    "self._reused.append(np.array(evicted, np.int32))",
    "pass",
    (
      f"{PREFIX}::test_idle_blocks_pass_both_gates_before_they_are_given_out",
      f"{PREFIX}::test_the_least_recently_used_gives_way_its_end_first",
    ),
  ),
  Mutation(
    "the beginning of a chain gives way before its end",
    "sparse_serve_jax/memory/allocator.py",
    "blocks[::-1].tolist()",
    "blocks.tolist()",
    (f"{PREFIX}::test_the_least_recently_used_gives_way_its_end_first",),
  ),
  Mutation(
    "a hash does not depend on what comes before",
    "sparse_serve_jax/memory/prefix.py",
    "made = hashlib.blake2b(last, ",
    "made = hashlib.blake2b(",
    (f"{PREFIX}::test_a_chain_tells_tokens_their_places_and_salts_apart",),
  ),
  Mutation(
    "the last token of a prompt is cached",
    "sparse_serve_jax/serving/scheduler.py",
    "(len(request.prompt) - 1) // self._shape.S]",
    "len(request.prompt) // self._shape.S]",
    (f"{PREFIX}::test_the_last_token_is_never_cached",),
  ),
  Mutation(
    "salts do not matter",
    "sparse_serve_jax/serving/scheduler.py",
    "self._shape.S, request.cache_salt)",
    "self._shape.S, None)",
    (f"{PREFIX}::test_salts_are_apart",),
  ),
  Mutation(
    "what was not finite is shared",
    "sparse_serve_jax/serving/scheduler.py",
    "self._prefix.leave(resident.table[resident.first // self._shape.S :])",
    "pass",
    (
      f"{PREFIX}::test_blocks_of_what_was_not_finite_are_not_found",
      f"{PREFIX}::test_nor_those_of_one_that_was_cancelled_before_that_was_known",
    ),
  ),
  Mutation(
    "what sparse steps have made is shared",
    "sparse_serve_jax/serving/scheduler.py",
    '"topk": fits, "psa": 0}',
    '"topk": sys.maxsize, "psa": sys.maxsize}',
    (
      f"{PREFIX}::test_output_is_shared_as_far_as_its_steps_attended_to_everything[topk-24]",
      f"{PREFIX}::test_output_is_shared_as_far_as_its_steps_attended_to_everything[psa-8]",
    ),
  ),
  Mutation(
    "blocks are shared before they have landed",
    "sparse_serve_jax/serving/scheduler.py",
    "if self._late and (self._written_in",
    "if not self._late and (self._written_in",
    (f"{PREFIX}::test_where_saves_are_staged_the_next_waits_until_they_have_landed",),
  ),
  Mutation(
    "a slot that holds a block twice is kept",
    MAPS,
    "(maps.block_of >= 0) & ~found",
    "(maps.block_of < 0) & ~found",
    (f"{RESIDENCY}::test_a_block_that_two_rows_miss_keeps_one_slot[xla]",),
  ),
  Mutation(
    "after a failure the engine goes on over what the device held",
    "sparse_serve_jax/serving/engine.py",
    "      self._executor.reset()\n",
    "      pass\n",
    ("tests/test_failures.py::test_a_device_failure_ends_what_it_held_and_the_rest_goes_on[1-submit]",),
  ),
  Mutation(
    "an interrupt in a callback drops the others",
    "sparse_serve_jax/serving/engine.py",
    "self._to_call.popleft()()",
    "(list(self._to_call), self._to_call.clear())[0][0]()",
    ("tests/test_failures.py::test_an_interrupt_in_a_callback_keeps_the_other_callbacks",),
  ),
  Mutation(
    "working sets are not added up",
    "sparse_serve_jax/serving/scheduler.py",
    "max(0, self.slots - blocks)",
    "self.slots",
    ("tests/test_scheduler.py::test_algorithm_1_has_no_break",),
  ),
  Mutation(
    "a chunked prompt's working set is one chunk",
    "sparse_serve_jax/serving/scheduler.py",
    "(at.start + n_tokens) // self._shape.S * self._shape.L",
    "n_tokens // self._shape.S * self._shape.L",
    ("tests/test_scheduler.py::test_a_chunked_prompt_needs_slots_for_all_its_chunks_and_waits_for_older_requests",),
  ),
  Mutation(
    "a piece through some of the layers costs as much as through all",
    "sparse_serve_jax/serving/scheduler.py",
    "tokens = -(-n_tokens * n_layers // n_all)",
    "tokens = n_tokens * min(n_layers, 1)",
    ("tests/test_scheduler.py::test_a_segment_costs_its_share_of_the_layers",),
  ),
  Mutation(
    "a piece does not keep what comes before it",
    MAPS,
    'maps.last_used.at[slots].set(stamp, mode="drop")',
    "maps.last_used",
    (f"{RESIDENCY}::test_touch_uses_all_layers_and_heads",),
  ),
  Mutation(
    "a stop token comes one token early",
    "sparse_serve_jax/serving/scheduler.py",
    "sampling_of(resident.steps + 1)",
    "sampling_of(resident.steps + 2)",
    ("tests/test_engine_fake.py::test_no_stop_token_comes_before_min_tokens[5]",),
  ),
  Mutation(
    "no banned token of a row but the first is looked at",
    "sparse_serve_jax/models/sampling.py",
    "(token == banned[:, :, None])",
    "(token == banned[:, :1, None])",
    ("tests/test_models.py::test_what_is_banned_does_not_exist",),
  ),
  Mutation(
    "an audit is of the layer before",
    "sparse_serve_jax/attention/audit.py",
    "layer == self.at.layer",
    "layer == jnp.maximum(self.at.layer - 1, 0)",
    (f"{AUDIT}::test_shares_are_those_of_all_keys_and_nothing_else_changes[in_hbm-cpu]",),
  ),
  Mutation(
    "an audit knows no tail",
    "sparse_serve_jax/attention/audit.py",
    "kernels.Tails(hot.tail, row.lanes, row.tail_tokens)",
    "kernels.Tails(hot.tail, row.lanes, row.tail_tokens - 1)",
    (f"{AUDIT}::test_shares_are_those_of_all_keys_and_nothing_else_changes[in_hbm-cpu]",),
  ),
  Mutation(
    "audits cost what the drawn row costs, not the longest",
    "sparse_serve_jax/serving/audit.py",
    "not 0 < max(blocks) <= may_cost",
    "not 0 < min(blocks) <= may_cost",
    (f"{AUDIT}::test_a_long_row_has_its_turn_when_it_can_be_paid_for",),
  ),
  Mutation(
    "a broken promise lowers the threshold",
    "sparse_serve_jax/serving/audit.py",
    "self._log_odds + STEP * (broken - (1 - KEPT))",
    "self._log_odds - STEP * (broken - (1 - KEPT))",
    (f"{AUDIT}::test_broken_promises_raise_the_threshold_and_kept_ones_lower_it",),
  ),
  Mutation(
    "equal bytes are those of the next larger budget",
    "sparse_serve_jax/evaluation/equal_bytes.py",
    "share = min((read - sizes[below]) / width, 1.0) if width > 0 else 0.0",
    "share = 1.0",
    ("tests/test_equal_bytes.py::test_errors_and_nats_at_equal_bytes",),
  ),
  Mutation(
    "pieces of a text overlap",
    "sparse_serve_jax/evaluation/corpus.py",
    "for i in range(0, len(ids) - size + 1, size)]",
    "for i in range(0, len(ids) - size + 1)]",
    ("tests/test_equal_bytes.py::test_pieces_share_no_token",),
  ),
]
