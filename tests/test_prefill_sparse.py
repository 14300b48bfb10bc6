"""Block-sparse prefill in the engine: what reads everything is dense, and what does not is the same however it runs."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels.digest import cuboid_mean
from sparse_serve_jax import buckets
from sparse_serve_jax.attention.prefill import Before, Piece, PrefillAttention, TileSelector
from sparse_serve_jax.config import EngineConfig, override
from sparse_serve_jax.evaluation import replay
from sparse_serve_jax.memory.kv_cache import Hot, KVCache
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving import budget
from sparse_serve_jax.serving.executor import JaxExecutor
from tests.cases import assert_same_bits
from tests.tiny import config, greedy, new_engine, prompt_of, serve, tiny_model, with_slots

S, N = 8, 10
SHARED = prompt_of(64, seed=1)  # eight blocks that two prompts begin with
# Of lengths whose pieces are all padded to 64 tokens, so that few programs serve them.
PROMPTS = [prompt_of(n, n) for n in (190, 37)] + [SHARED + prompt_of(n, n) for n in (125, 61)]
PREFILLS = {
  "whole": ["scheduler.max_inject_tokens=4096"],
  "pieces": ["scheduler.max_inject_tokens=64"],
  "beside decode rows": ["scheduler.prefill=chunked", "scheduler.max_tokens=18"],
}
QUARTER = "sparse.prefill_share=0.25", "sparse.sink_tokens=0", "sparse.window_tokens=0", *PREFILLS["pieces"]
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def sparse(*changes: str, slots: int = 30, model=None) -> EngineConfig:
  """Few slots, so that pieces read what comes before them from the pool too."""
  conf = config("scheduler.batch_control=none", "sparse.policy=dense", "sparse.prefill=top_k", *changes, block_tokens=S)
  return with_slots(conf, slots, model or tiny_model()) if slots else conf


@functools.cache
def of_a_quarter() -> list[list[int]]:
  """Tokens of all prompts when each tile reads a quarter of what comes before it."""
  return serve(sparse(*QUARTER), tiny_model(), PROMPTS, N)[0]


def in_turn(conf: EngineConfig) -> list[list[int]]:
  """Greedy tokens of prompts that are served one after the other, so that the later find the earlier ones' blocks."""
  engine, tokens = new_engine(conf, tiny_model()), []
  for prompt in PROMPTS:
    request = engine.add_request(prompt, N)
    engine.run()
    tokens.append(request.output_tokens)
  return tokens


@CPU_AND_GPU
@pytest.mark.parametrize(("kind", "by"), [*((kind, "top_k") for kind in PREFILLS), ("whole", "threshold")])
def test_a_share_of_all_is_dense(device, kind: str, by: str):
  """Also of what is shared with a prompt before, which requests of one time and of one after the other do."""
  expected = [greedy("gqa2", tuple(p), N) for p in PROMPTS]
  conf = sparse(f"sparse.prefill={by}", "sparse.prefill_share=1", *PREFILLS[kind])
  assert serve(conf, tiny_model(), PROMPTS, N)[0] == expected
  assert in_turn(conf) == expected


def test_tokens_do_not_depend_on_what_is_shared():
  """Neither on where in a tile a prompt begins after what it shares, nor on blocks that dense steps have made."""
  assert kernels.Tiles.of(1024, S).tile == buckets.TILE
  conf, stem = sparse(*QUARTER, *PREFILLS["whole"], "sparse.window_tokens=16"), prompt_of(239, seed=1)
  engine, prompts, requests = new_engine(conf, tiny_model()), [stem, [*stem[:200], 7], stem[:155], stem[:9]], []
  for n in (1, 5, 5, 17):
    requests.append(engine.add_request(prompts[len(requests)], n))
    engine.run()
  # All queries of a short prompt read it whole. What goes on after its output has more.
  prompts.append([*stem[:9], *requests[-1].output_tokens, *prompt_of(190, seed=4)])
  requests.append(engine.add_request(prompts[-1], 5))
  engine.run()
  assert [request.cached_tokens for request in requests] == [0, 128, 128, 8, 0]
  for prompt, request in zip(prompts, requests, strict=True):
    n = len(request.output_tokens)
    assert request.output_tokens == serve(conf, tiny_model(), [prompt], n)[0][0]


@CPU_AND_GPU
def test_dense_layers_are_dense(device):
  """All of them; and one of two is neither this nor sparse in both."""
  expected = [greedy("gqa2", tuple(p), N) for p in PROMPTS]
  one, both = (serve(sparse(*QUARTER, f"sparse.dense_layers={n}"), tiny_model(), PROMPTS, N)[0] for n in (1, 2))
  assert both == expected and expected != one != of_a_quarter() != expected


RULES = {
  "half of the mass": ["sparse.prefill=threshold", "sparse.prefill_share=0.5"],
  "second layer, no sinks": [
    *("sparse.prefill_share=0.2", "sparse.dense_layers=1", "sparse.sink_tokens=0", "sparse.window_tokens=0")
  ],
  "min-max, best head": ["sparse.prefill_share=0.3", "sparse.method=min_max", "sparse.group_reduce=max"],
}


@CPU_AND_GPU
@pytest.mark.parametrize("rule", RULES)
def test_the_engines_tokens_are_the_replays(device, rule: str):
  """Dense decoding over what a sparse prefill has left. The replay runs whole prompts, and no cache lies between."""
  conf = sparse(*RULES[rule], "cache.hbm_bytes=8MiB", "cache.prefix=false", *PREFILLS["whole"], slots=0)
  model = tiny_model()
  tokens, _ = serve(conf, model, PROMPTS, N)
  rows = np.zeros((len(PROMPTS), 256), np.int32)
  for row, prompt, answer in zip(rows, PROMPTS, tokens, strict=True):
    row[: len(prompt) + N] = prompt + answer
  start = np.array([len(p) for p in PROMPTS], np.int32)
  by_xla = override(conf, ["implementation=xla"])
  prefilled = replay.sparse_prefill(model.config, model.params, by_xla, rows, start)
  found = replay.replay(model.config, model.params, conf, prefilled, start, N - 1)
  assert np.asarray(found.right).all()
  read = np.asarray(found.read)
  assert read.shape == (4, 2) and read[0].min() < 0.9 and (read[1] == 1).all()  # one tile has nothing before it
  assert tokens != [greedy("gqa2", tuple(p), N) for p in PROMPTS]


@CPU_AND_GPU
def test_slots_change_no_token(device):
  """Whether a piece reads what comes before it from slots or from the pool, which may lie in HBM."""
  many, _ = serve(sparse(*QUARTER, slots=400), tiny_model(), PROMPTS, N)
  in_hbm, _ = serve(sparse(*QUARTER, "cache.offload=false", "cache.hbm_bytes=8MiB", slots=0), tiny_model(), PROMPTS, N)
  assert of_a_quarter() == many == in_hbm


def test_tokens_do_not_depend_on_who_prefills_beside():
  """A chunk is cut where a tile ends, whatever others have left of an iteration."""
  chunks = "scheduler.prefill=chunked", "scheduler.chunk_tokens=192", "cache.prefix=false", "sparse.window_tokens=16"
  prompt, conf = prompt_of(230, seed=900), sparse("sparse.prefill_share=0.25", *chunks)
  (alone,), _ = serve(conf, tiny_model(), [prompt], N)
  (_, beside), _ = serve(conf, tiny_model(), [prompt_of(60, seed=5), prompt], N)
  assert alone == beside != greedy("gqa2", tuple(prompt), N)


def test_masses_are_estimated_by_products():
  """Other scores say nothing of a share of the mass."""
  with pytest.raises(ValueError, match=r"'threshold' takes scores for products .* of method 'top_p' are none"):
    TileSelector.of(sparse("sparse.prefill=threshold", "sparse.method=top_p"))


def test_a_sparse_piece_loads_less():
  """What is not read is not loaded; of one token each, which takes no decode step."""

  def loaded(share: float) -> int:
    conf = sparse(*QUARTER, f"sparse.prefill_share={share}")
    return serve(conf, tiny_model(), PROMPTS, 1)[1].usage.blocks_loaded

  assert 0 < loaded(0.25) < 0.8 * loaded(1.0)


def layer_of_a_piece(seed: int) -> tuple[tuple[jax.Array, ...], KVCache, Piece]:
  """q, k, v of 64 tokens, of which 60 are real, after 20 blocks of a pool in layer 1; a third of these in slots."""
  rng, (K, G, L, M, P, D, layer) = np.random.default_rng(seed), (2, 2, 2, 40, 20, 16, 1)
  make = lambda *dims: rng.normal(size=dims).astype(np.float32)  # noqa: E731
  pool, slots = make(K, L, M, 2, S, D), np.full((P, 2, S, D), np.nan, np.float32)
  before, own = np.split(rng.permutation(M)[:27].astype(np.int32), [20])
  slot_of = np.full((K, L, M), -1, np.int32)
  for slot, (head, i) in enumerate(itertools.product(range(K), range(0, 20, 3))):
    slot_of[head, layer, before[i + head]], slots[slot] = slot, pool[head, layer, before[i + head]]
  qkv = 2 * make(64, K, G, D), make(64, K, D), make(64, K, D)
  pool[:, layer, own] = np.stack(qkv[1:])[:, :56].reshape(2, 7, S, K, D).transpose(3, 1, 0, 2, 4)
  kv, ids = jnp.asarray(pool), jnp.arange(M)
  digest = kernels.store_digests(jnp.full((K, L, M, 2, D), jnp.nan), kv, 0, ids, ids, rule=cuboid_mean)
  maps = kernels.Maps.empty(K, L, M, P)._replace(slot_of=jnp.asarray(slot_of))
  nothing = jnp.zeros((1, 27), jnp.int32), jnp.zeros(1, jnp.int32), jnp.int32(0)
  hot = Hot(jnp.asarray(slots), digest, maps, jnp.zeros((K, L, 1, 2, S, D)), *nothing)
  table = np.full(24, -1, np.int32)  # with room for more
  table[:20] = before
  blocks = np.append(own, -1).astype(np.int32)
  piece = Piece(Before(jnp.asarray(table), jnp.int32(20)), jnp.asarray(blocks), jnp.int32(60))
  return tuple(map(jnp.asarray, qkv)), KVCache(kv, hot), piece


@pytest.mark.parametrize("by", ["top_k", "threshold"])
def test_blocks_that_are_not_read_never_matter(by: str):
  """NaN in the slots and the pool of what no tile reads: the output is bit for bit the same, and other blocks count."""
  (q, k, v), cache, piece = layer_of_a_piece(5)
  attention = PrefillAttention(TileSelector.of(sparse(f"sparse.prefill={by}", "sparse.prefill_share=0.3")), "xla")
  assert attention.selector is not None and piece.before is not None
  run = jax.jit(attention)
  expected, loaded = run(q, k, v, cache, jnp.int32(1), piece)
  table = np.concatenate([piece.before.blocks, piece.blocks])
  digests = cache.hot.digest[:, 1, jnp.maximum(jnp.asarray(table), 0)]
  tiles, places = kernels.Tiles.of(64, S), kernels.Places(20, 8, 24)
  read = np.asarray(attention.selector.lists(q, jnp.int32(60), digests, tiles, places, "xla").any_reads(24))[:, :20]
  pool, slots, slot_of = np.array(cache.pool), np.array(cache.hot.slots), np.asarray(cache.hot.maps.slot_of)
  missed = 0
  for head, i in np.ndindex(2, 20):
    block = table[i]
    missed += bool(read[head, i] and slot_of[head, 1, block] < 0)
    if not read[head, i] or slot_of[head, 1, block] >= 0:
      pool[head, 1, block] = np.nan
    if not read[head, i] and slot_of[head, 1, block] >= 0:
      slots[slot_of[head, 1, block]] = np.nan
  poisoned = KVCache(jnp.asarray(pool), cache.hot.replace(slots=jnp.asarray(slots)))
  actual, _ = run(q, k, v, poisoned, jnp.int32(1), piece)
  assert 0 < read.sum() < 30 and int(loaded) == missed > 0
  assert_same_bits(np.asarray(actual)[:60], np.asarray(expected)[:60])
  others, _ = run(q, k, v, cache.replace(pool=-cache.pool), jnp.int32(1), piece)
  assert (np.asarray(others) != np.asarray(expected)).any()


@CPU_AND_GPU
def test_two_devices(device):
  if jax.device_count() < 2:
    pytest.skip(f"needs two devices, there is {jax.device_count()}")
  assert serve(sparse(*QUARTER, "tp=2"), tiny_model(), PROMPTS, N)[0] == of_a_quarter()


def test_kernels_serve():
  """The interpreted kernels: a piece of two tiles that begins a prompt, and one that continues it and is not whole."""
  conf = sparse(
    "sparse.prefill_share=0.25", "sparse.policy=topk", "scheduler.prefill=chunked", "scheduler.chunk_tokens=192"
  )
  interpreted, prompts = config("implementation=interpret", base=conf), [prompt_of(230)]
  assert serve(interpreted, tiny_model(), prompts, 3)[0] == serve(conf, tiny_model(), prompts, 3)[0]


def test_digests_are_there_for_what_selects():
  """Dense decoding needs none, and neither does a dense prefill."""
  vectors = {
    (policy, prefill): CacheShape.of(
      tiny_model().config, sparse(f"sparse.policy={policy}", f"sparse.prefill={prefill}", slots=0), 2
    ).E
    for policy in ("dense", "topk")
    for prefill in ("dense", "top_k", "threshold")
  }
  assert [key for key, n in vectors.items() if n == 0] == [("dense", "dense")] and set(vectors.values()) == {0, 2}


def test_sparse_prefill_is_counted_as_memory():
  def activations(prefill: str) -> int:
    conf = sparse(f"sparse.prefill={prefill}")
    executor = JaxExecutor(conf, tiny_model())
    return budget.Needs.of(tiny_model().config, conf, executor.shape, executor.buckets, cudnn=False).activations

  keys_and_values = 2 * 2 * 256 * 16 * 4  # of 256 tokens, 2 heads of 16 float32
  assert activations("top_k") - activations("dense") > keys_and_values


def test_a_prefill_that_selects_nothing_is_refused():
  model, tokens = tiny_model(), np.zeros((1, 64), np.int32)
  with pytest.raises(ValueError, match="sparse.prefill='dense' selects nothing"):
    replay.sparse_prefill(model.config, model.params, sparse("sparse.prefill=dense"), tokens, np.array([9], np.int32))
  assert kernels.Tiles.of(190 + 2, S).tile == 128  # so that the long prompts here have blocks to choose from
