"""The main path: one decode step, one prefill segment, each a pure function jitted with the cache donated.

  decode_step      embed -> for each layer: qkv, append to the tail, attend to selected blocks where they lie, MLP
                   -> finished tails go to the pool -> logits, sample
  prefill_segment  some layers of a piece of a prompt, or of several short prompts in one: embed, or what the layers
                   before have left -> for each layer: qkv, digests, blocks enter slots, attention, KV to the pool or
                   into a slab, MLP -> logits, sample

Both are per-device code under `shard_map` over the mesh axis "tp": `programs.py` compiles them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float32, Int32, UInt32

import pallas_kernels as kernels
from sparse_serve_jax.attention.audit import Audit, AuditAt, Stopped, audit
from sparse_serve_jax.attention.decode import Counts, DecodeAttention, Rows, Selector
from sparse_serve_jax.attention.prefill import Before, Piece, PrefillAttention, TileSelector
from sparse_serve_jax.config import EngineConfig, ModelConfig
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.eviction import EVICTIONS, Eviction, Turn, Zones
from sparse_serve_jax.memory.kv_cache import Hot, KVCache
from sparse_serve_jax.memory.loads import LOADS
from sparse_serve_jax.memory.places import Entering, enter_piece
from sparse_serve_jax.memory.saves import SAVES, NewBlocks, Saving, save_digests, save_piece, save_tails
from sparse_serve_jax.mesh import AXIS
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.sampling import ban, greedy, logprobs, sample
from sparse_serve_jax.sampling_params import MAX_LOGPROBS
from sparse_serve_jax.variants import variant

if TYPE_CHECKING:
  Array = Scalar = Any
else:  # of a batch: numpy's before it goes to a program
  Array, Scalar = jax.Array | np.ndarray, jax.Array | np.int32

MLP_TILE = 8192  # tokens that go through the MLP at a time: bounds the d_ff activations of a long prompt
NOT_FINITE = -1  # a row's token when its logits are not


@dataclasses.dataclass(frozen=True)
class Setup:
  """What is fixed when a program is compiled. Engines of equal setups share their programs."""

  model: ModelConfig
  attention: DecodeAttention
  prefill: PrefillAttention
  dense_layers: int
  newest_blocks: int  # of a piece of a prompt, that enter slots in any case; others only enter spare ones
  pins: bool  # whether a piece finds all that comes before it in slots, if these are enough
  keeps: bool  # whether spare slots take what prompts may share
  working_set_steps: int
  saving: Saving
  eviction: Eviction
  zones: Zones
  offload: bool
  shares: bool  # whether several requests may have a block
  implementation: str  # of the kernels: "xla", "triton" or "interpret"

  @classmethod
  def of(cls, model: ModelConfig, config: EngineConfig, implementation: str) -> Setup:
    """For `model`, with kernels in `implementation`. ValueError if `config` names a variant that there is not."""
    cache, selector = host_pool.chosen(config).cache, Selector.of(config)
    pins = cache.offload and config.scheduler.prefill == "chunked"
    saving = Saving(
      save=variant(SAVES, cache.save, "cache.save"),
      summarize=selector.method.summarize,
      summarized_by=selector.method.runs_on(implementation),
      implementation=implementation,
      host_pool=cache.offload and host_pool.memory_kind() is not None,
    )
    return cls(
      model=model,
      attention=DecodeAttention(selector, variant(LOADS, cache.load, "cache.load"), implementation),
      prefill=PrefillAttention(TileSelector.of(config), implementation),
      dense_layers=min(config.sparse.dense_layers, model.n_layers),
      newest_blocks=model.max_context // cache.block_tokens if pins else config.budget_blocks,
      pins=pins,
      keeps=cache.offload and cache.prefix and not pins,
      working_set_steps=config.scheduler.working_set_steps,
      saving=saving,
      eviction=variant(EVICTIONS, cache.eviction, "cache.eviction"),
      zones=cache.zones,
      offload=cache.offload,
      shares=cache.prefix,
      implementation=implementation,
    )

  def turn(self, hot: Hot, n_rows: int, needed: jax.Array | None = None) -> tuple[Hot, Turn]:
    """The victims of a step of `n_rows` rows that begins now, none of them given yet; a prompt's blocks `needed` [n]
    (-1: nothing) are none if it pins, and the last of the spare ones if it keeps."""
    since, (n_heads, n_layers, n_lanes) = hot.stamp(0), hot.tail.shape[:3]
    maps = kernels.tidy(hot.maps) if self.shares else hot.maps
    hot = hot.replace(maps=kernels.saturate(maps, since))
    if needed is not None and hot.slots.shape[0] and (self.pins or self.keeps):
      hot = hot.replace(maps=(kernels.touch if self.pins else kernels.renew)(hot.maps, needed, since))
    n_zones = {"shared": 1, "layer": n_layers, "lane": n_lanes}[self.zones] if hot.slots.shape[0] else 1
    given = jnp.zeros((n_rows, n_heads) if n_zones == 1 else n_zones, jnp.int32)
    return hot, Turn(self.zones, kernels.victims(self.eviction(hot.maps, since), since, n_zones), given)


class SamplingRows(flax.struct.PyTreeNode):
  """How each row's token is drawn: `models.sampling.sample`."""

  temperature: Float32[Array, " B"]  # 0 is greedy
  top_p: Float32[Array, " B"]
  seeds: UInt32[Array, " B"]
  banned: Int32[Array, "B X"]  # token ids that are not drawn, padded with -1
  top_k: Int32[Array, " B"]  # 0 is all
  min_p: Float32[Array, " B"]


class DecodeBatch(flax.struct.PyTreeNode):
  """The rows of a decode step; a padding row has the lane R."""

  lanes: Int32[Array, " B"]
  positions: Int32[Array, " B"]  # tokens already cached
  steps: Int32[Array, " B"]  # decode steps the request has made
  fills: Int32[Array, " B"]  # pool blocks of tails that this step fills; -1: it does not
  tokens: Int32[Array, " B"]  # to decode; -1: the lane's last one
  # None if every row takes its most likely token, which is a program of its own: a branch in one would make the host
  # wait in every step.
  sampling: SamplingRows | None
  threshold: Float32[Scalar, ""] | None = None  # of the stop test, if lists are progressive
  audit: AuditAt | None = None  # of one of the layers whose lists are; a program of its own too
  logprobs: bool = flax.struct.field(pytree_node=False, default=False)  # of all rows; and so is this


class PrefillBatch(flax.struct.PyTreeNode):
  """Layers [first_layer, first_layer + n_layers) of a piece: of a prompt from `start` on, or of whole ones in rows."""

  tokens: Int32[Array, " C"]  # padded
  start: Int32[Scalar, ""]  # a multiple of S; 0 of several
  begins: Int32[Array, " B"]  # where in the piece: multiples of S that ascend from 0 on, C of a padding row
  n_tokens: Int32[Array, " B"]
  first_layer: Int32[Scalar, ""]
  n_layers: Int32[Scalar, ""]
  hidden_at: Int32[Scalar, ""]
  lanes: Int32[Array, " B"]  # R of a padding row
  sampling: SamplingRows | None  # None if every prompt's token is its most likely one: a program of its own
  # `n_layers`, if the program knows it. 0: it does not, and the host waits for the device in each layer. If it is all
  # layers the first is known too, and no weights are copied.
  static_layers: int = flax.struct.field(pytree_node=False, default=0)
  # The blocks' own way to the pool: they leave as a slab of at most so many layers. 0: the program writes them there.
  slab_layers: int = flax.struct.field(pytree_node=False, default=0)
  logprobs: bool = flax.struct.field(pytree_node=False, default=False)


class StepCounts(NamedTuple):
  """What a program did, in blocks over all layers and heads of all devices. On the device one int32 [4]."""

  attended: Any  # full blocks that decode attended to
  missed: Any  # of these, read from the pool because no slot had them
  loaded: Any  # all blocks read from the pool: those, those a load copied, and what came before a piece of a prompt
  slots_used: Any  # slots that hold a block afterwards


class Logprobs(NamedTuple):
  """Of the tokens of a program, and of the most likely ones of each row, most likely first."""

  token: Float32[Array, " B"]
  top_ids: Int32[Array, "B top"]
  top: Float32[Array, "B top"]


class StepOutput(NamedTuple):
  """What a program tells the host."""

  # NOT_FINITE where logits are not; of a prefill one token, which is meant if the last layer was run.
  tokens: Int32[Array, " B"]
  counts: Int32[Array, " 4"]  # the fields of StepCounts
  logprobs: Logprobs | None = None  # if the batch wants them
  audit: Audit | None = None  # likewise


def decode_step(
  setup: Setup, width: int, params: llama.Params, cache: KVCache, batch: DecodeBatch
) -> tuple[KVCache, StepOutput]:
  """One token for every row, by dynamic sparse attention (SparseServe, section 3; PSA, section 2.2).

  Args:
    setup: what is compiled in.
    width: entries of block tables that are looked at: no row has more full blocks.
    params: one device's shard of the weights, see `llama.param_specs`.
    cache: one device's part; updated in place where it is donated.
    batch: the rows.

  Returns:
    The cache after the step, and what the host is told.
  """
  cfg, pool = setup.model, cache.pool
  hot, turn = setup.turn(cache.hot, batch.lanes.shape[0])
  rows = _rows(hot, batch, width)

  def layer(attention, rows, i, carry):
    x, hot, counts, given, free, stopped = carry
    lp = llama.layer_params(params, i)
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    hot = hot.replace(tail=_append(hot.tail, i, batch, k, v))
    partial, hot, of_layer, left = attention(q, pool, hot, i, rows, turn._replace(given=given, free=free))
    if stopped is not None:
      stopped = stopped.noted(i, q, partial, of_layer)
    x = llama.mlp(cfg, lp, llama.attention_out(lp, x, partial.output, AXIS), AXIS)
    return x, hot, jax.tree.map(jnp.add, counts, of_layer), left.given, left.free, stopped

  x = llama.embed(params, jnp.where(batch.tokens < 0, hot.last_token.at[batch.lanes].get(mode="clip"), batch.tokens))
  cos_sin = llama.rope(cfg, batch.positions)
  counts, given, free = Counts.zeros(x.shape[0], hot.tail.shape[0]), turn.given, None
  stopped = batch.audit and Stopped.nowhere(batch.audit, cfg.n_heads // cfg.n_kv_heads, hot)
  parts = (0, setup.dense_layers, setup.attention.dense), (setup.dense_layers, cfg.n_layers, setup.attention)
  for first, end, attention in parts:
    if first < end:
      if attention.selector.takes and hot.slots.shape[0]:
        free = kernels.Free.at_first(hot.maps, turn.victims, given)
      run = functools.partial(layer, attention, attention.selector.lists_of(rows, hot.tail.shape[0]))
      carry = x, hot, counts, given, free, stopped
      x, hot, counts, given, free, stopped = jax.lax.fori_loop(first, end, run, carry)

  # XLA copies a pool that is read and then written where nothing orders the two. Here x does: what attention gave.
  filled = jnp.where(jnp.isfinite(x).all(-1), batch.fills, -1)
  turn = turn._replace(given=given, free=free)
  cache = save_tails(setup.saving, KVCache(pool, hot), batch.lanes, filled, batch.steps, turn)
  found = None
  if stopped is not None:  # only now, for the same reason
    found, hot = audit(setup.attention, stopped, cache.pool, cache.hot, rows)
    cache = cache.replace(hot=hot)
  tokens, of_tokens = _sample(llama.logits(cfg, params, x, AXIS), batch.positions + 1, batch)
  hot = _next(cache.hot, batch.lanes, tokens)
  hot = hot.replace(tables=hot.tables.at[batch.lanes, rows.n_blocks].set(batch.fills, mode="drop"))
  done = _counts(hot, counts.attended.sum(), counts.missed.sum(), counts.loaded.sum())
  return KVCache(cache.pool, hot), StepOutput(tokens, done, of_tokens, found)


def _rows(hot: Hot, batch: DecodeBatch, width: int) -> Rows:
  real, size = batch.lanes < hot.tail.shape[2], hot.tail.shape[4]
  return Rows(
    lanes=batch.lanes,
    tables=hot.tables.at[batch.lanes].get(mode="clip")[:, :width],
    n_blocks=jnp.where(real, batch.positions // size, 0),
    tail_tokens=jnp.where(real, batch.positions % size + 1, 0),
    steps=batch.steps,
    threshold=None if batch.threshold is None else jnp.asarray(batch.threshold),
  )


def _append(tail: jax.Array, layer, batch: DecodeBatch, k, v) -> jax.Array:
  """Writes one token's k, v [B, K, D] to the tails."""
  head, offset = jnp.arange(k.shape[1])[:, None], batch.positions % tail.shape[4]
  kv = jnp.stack([k, v], 2).swapaxes(0, 1)  # [K, B, 2, D]
  return tail.at[head, layer, batch.lanes, :, offset].set(kv, mode="drop")


def _next(hot: Hot, lanes: jax.Array, tokens: jax.Array) -> Hot:
  """After a program: its tokens [B] are the input of the next step of `lanes` [B]."""
  last_token = hot.last_token.at[lanes].set(jnp.maximum(tokens, 0), mode="drop")
  return hot.replace(last_token=last_token, clock=hot.clock + 1)


def prefill_segment(
  setup: Setup, width: int, params: llama.Params, cache: KVCache, hidden: jax.Array | None, batch: PrefillBatch
) -> tuple[KVCache, jax.Array | None, jax.Array | None, StepOutput]:
  """Runs some layers of a piece, which `batch` names; `setup`, `params` and `cache` are as of `decode_step`.

  `hidden` [A, d] has what the piece's previous segment has left, from `hidden_at` on. None if all layers are run.
  `width` entries of the block table hold what comes before the piece; 0: it begins its prompt.

  Returns:
    The cache; `hidden`; the slab [K, Ls, n, 2, S, D], if one is wanted; what the host is told, with it the tokens that
    follow the prompts: they are meant if the last layer was run, as a branch would make the host wait.
  """
  cfg, size, first_layer = setup.model, cache.hot.tail.shape[4], 0 if hidden is None else batch.first_layer
  x, at, n_layers = llama.embed(params, batch.tokens), (batch.hidden_at, 0), batch.static_layers or batch.n_layers
  x = x if hidden is None else jnp.where(first_layer == 0, x, jax.lax.dynamic_slice(hidden, at, x.shape))
  packed = kernels.Packed(jnp.asarray(batch.begins), jnp.asarray(batch.n_tokens))
  cos_sin = llama.rope(cfg, batch.start + packed.nth(jnp.arange(x.shape[0])))
  before = Before.of(cache.hot.tables[batch.lanes[0], :width], batch.start // size) if width else None
  rows, newest = packed.blocks(cache.hot.tables, batch.lanes, batch.start, len(x) // size, size, setup.newest_blocks)
  piece = Piece(before, blocks := rows.max(0), packed.n_tokens[0], packed if batch.lanes.shape[0] > 1 else None)
  hot, turn = setup.turn(cache.hot, 1, blocks if before is None else jnp.concatenate([before.blocks, blocks]))
  given = jnp.zeros(turn.n_zones, jnp.int32)
  # One more share stays: the first misses of a progressive list take what is empty when a decode step begins.
  n_shares = 1 + (1 if setup.zones == "layer" else n_layers)
  room = kernels.room(hot.maps, turn.victims, n_shares) if setup.keeps else given
  own = (rows, batch.lanes) if setup.zones == "lane" else (blocks[None], batch.lanes[:1])
  ids, last_blocks = jnp.arange(blocks.shape[0]), (batch.begins + batch.n_tokens) // size

  def layer(attention, i, carry):
    x, cache, slab, given, loaded = carry
    lp = llama.layer_params(params, i)
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    kv = jnp.stack([k, v]).reshape(2, -1, size, *k.shape[1:]).transpose(3, 1, 0, 2, 4)  # [K, n, 2, S, D]
    new = NewBlocks(kv[:, None], i, ids, blocks)
    cache = cache.replace(hot=save_digests(setup.saving, cache.hot, new))
    brings = setup.pins or (setup.keeps and attention.selector is None)
    entering = Entering(*own, newest, before.blocks if before and brings else ids[:0], setup.pins, room)
    cache, given, brought = enter_piece(cache, new.kv, i, entering, turn._replace(given=given), setup.implementation)
    o, read = attention(q, k, v, cache, i, piece)
    if before is not None:  # which attention has read: only now the pool is written
      new = new._replace(blocks=_after(o, blocks))
    cache = cache.replace(pool=save_piece(setup.saving, cache.pool, new) if slab is None else cache.pool)
    slab = slab if slab is None else slab.at[:, i - batch.first_layer].set(kv)
    tail = cache.hot.tail.at[:, i, batch.lanes].set(kv.at[:, last_blocks].get(mode="clip"), mode="drop")
    tail = with_layout_constraint(tail, Layout(tuple(range(tail.ndim))))  # else XLA may copy all tails for another
    x = llama.attention_out(lp, x, o, AXIS)
    x = _in_tiles(lambda x: llama.mlp(cfg, lp, x, AXIS), x)
    return x, cache.replace(hot=cache.hot.replace(tail=tail)), slab, given, loaded + brought.sum() + read

  slab_dims = hot.tail.shape[0], batch.slab_layers, ids.shape[0], *hot.tail.shape[3:]
  slab = jnp.zeros(slab_dims, hot.tail.dtype) if batch.slab_layers else None
  carry = x, KVCache(cache.pool, hot), slab, given, jnp.int32(0)
  for first, n, attention in setup.prefill.parts(first_layer, n_layers, setup.dense_layers):
    carry = jax.lax.fori_loop(0, n, lambda i, carry, at=first, of=attention: layer(of, at + i, carry), carry)
  x, cache, slab, _, loaded = carry
  last = x.at[batch.begins + batch.n_tokens - 1].get(mode="clip")
  tokens, of_tokens = _sample(llama.logits(cfg, params, last, AXIS), batch.start + batch.n_tokens, batch)
  hot = _next(cache.hot, batch.lanes, tokens)
  hidden = hidden if hidden is None else jax.lax.dynamic_update_slice(hidden, x, at)
  return KVCache(cache.pool, hot), hidden, slab, StepOutput(tokens, _counts(hot, 0, 0, loaded), of_tokens)


def _after(o: jax.Array, places: jax.Array) -> jax.Array:
  """Places (below 0: none) that are not known before `o` is: XLA copies what is read and then written in no order."""
  return jnp.where(places >= 0, places, -1 - jnp.isnan(o.ravel()[0]).astype(jnp.int32))


def _in_tiles(f, x: jax.Array) -> jax.Array:
  """f over x [C, d] in equal tiles of at most MLP_TILE tokens, padded as needed."""
  n = x.shape[0]
  tiles = -(-n // MLP_TILE)
  if tiles == 1:
    return f(x)
  padded = jnp.pad(x, ((0, -n % tiles), (0, 0)))
  return jax.lax.map(f, padded.reshape(tiles, -1, x.shape[1])).reshape(padded.shape)[:n]


def _counts(hot: Hot, attended, missed, loaded) -> jax.Array:
  """The fields of StepCounts, of all devices."""
  slots_used = (hot.maps.block_of >= 0).sum()
  return jax.lax.psum(jnp.array(StepCounts(attended, missed, loaded, slots_used), jnp.int32), AXIS)


def _sample(logits, positions, batch: DecodeBatch | PrefillBatch) -> tuple[jax.Array, Logprobs | None]:
  """The next token of every row of logits [B, V], NOT_FINITE where one of them is not; log probabilities if wanted."""
  if (rows := batch.sampling) is None:
    tokens = greedy(logits)
  else:
    cuts = rows.temperature, rows.top_p, rows.seeds, rows.top_k, rows.min_p
    tokens = sample(ban(logits, rows.banned), positions, *cuts)
  n_top = min(MAX_LOGPROBS, logits.shape[1])
  of_tokens = Logprobs(*logprobs(logits, tokens, n_top)) if batch.logprobs else None
  return jnp.where(jnp.isfinite(logits).all(-1), tokens, NOT_FINITE), of_tokens
