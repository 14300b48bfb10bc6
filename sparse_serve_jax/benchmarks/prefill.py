"""Times of whole prompts of a model with random weights, from their arrival to their first tokens, on one GPU.

An engine serves requests that ask for one token each, all at once: the time is that of prefill with all that belongs to
it, saves, slots and host. The floor of a row is what the matrix products and dense attention by cuDNN over contiguous
keys take when each is timed alone, in the same run: a reference, and no bound. "cached" finds all but a sixteenth
(`NEW`) of each prompt in the cache: of 32,000 tokens 30,000, a long context that is asked a new question. Before
2026-11-29 it left a tenth.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import lax

import pallas_kernels as kernels
from sparse_serve_jax.benchmarks import step, timing
from sparse_serve_jax.benchmarks.timing import Effort, Report, Row, Timing
from sparse_serve_jax.config import EngineConfig, ModelConfig, load_config, override
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import Model, llama
from sparse_serve_jax.models.tokenizer import ByteTokenizer
from sparse_serve_jax.serving.budget import kv_bytes
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor

# How prompts are served: name -> changes of configs/serving/sparse_serve, whose prefill is layer-segmented and dense.
WAYS = {
  # What saves cost: nothing leaves the device. It comes first, as rows of other ways tell how much longer they take.
  "hbm_pool": ("cache.offload=false",),
  "layer_segmented": (),
  "chunked": ("scheduler.prefill=chunked",),
  "quarter": ("sparse.prefill=top_k", "sparse.prefill_share=0.25"),
  "eighth": ("sparse.prefill=top_k", "sparse.prefill_share=0.125"),
  "cached": (),  # all but a sixteenth of each prompt is in the cache
  "no_prefix": ("cache.prefix=false",),  # what looking for shared blocks costs
  "save_direct": ("cache.save=direct",),
  "save_per_block": ("cache.save=per_block",),
  "chunked_512": ("scheduler.prefill=chunked", "scheduler.chunk_tokens=512"),
}
HBM_BYTES = 8 << 30  # slots and slabs
CONTEXT = 4096  # at least; shorter ones have no room for packs of short prompts
NEW = 1 / 16  # share of a prompt that "cached" does not find
PRODUCT_TOKENS = 8192  # tokens that products are timed with at most
MOST_SECONDS = 15  # of a case's rounds that are timed, unless two take longer
WEIGHTS = ("wqkv", "wo", "w_gate_up", "w_down")
SMOKE_SIZES = {"3x300": (3, 300)}  # longer than what a tile of queries reads whole
SMOKE_CHANGES = (*step.SMOKE_CHANGES, "cache.hbm_bytes=8MiB")


@dataclasses.dataclass(frozen=True)
class Case:
  """Requests of equal length that arrive together."""

  n_requests: int
  n_tokens: int
  way: str  # a name in WAYS

  def config(self, cfg: ModelConfig, given: Sequence[str]) -> EngineConfig:
    """Its cache just holds the prompts. `given` overrides it.

    Raises:
      ValueError: `given` is wrong, or the prompt is longer than the model's context.
    """
    if self.n_tokens >= cfg.max_context:
      raise ValueError(f"a prompt of {self.n_tokens} tokens and one more exceed the model's context, {cfg.max_context}")
    base = override(load_config("sparse_serve"), given)
    blocks = self.n_requests * (-(-(self.n_tokens + 1) // base.cache.block_tokens) + 1)
    blocks += (1 + self.n_requests) * self.n_new // base.cache.block_tokens  # a cached prompt's own end, and the last's
    pool = blocks * base.cache.block_tokens * kv_bytes(cfg)
    defaults = [
      f"cache.dram_bytes={pool}",
      f"cache.lanes={max(8, self.n_requests)}",
      f"scheduler.max_context={max(CONTEXT, self.n_tokens + 1)}",
      f"cache.hbm_bytes={HBM_BYTES + (pool if self.way == 'hbm_pool' else 0)}",
    ]
    return override(base, [*defaults, *WAYS[self.way], *given])

  @property
  def n_new(self) -> int:
    """Tokens of a prompt that the cache does not have."""
    return max(1, round(NEW * self.n_tokens)) if self.way == "cached" else self.n_tokens

  def prompts(self, vocab_size: int, round: int) -> list[np.ndarray]:
    """Of one round; those of "cached" begin alike in all rounds."""
    prompts = [np.random.default_rng(i).integers(0, vocab_size, self.n_tokens) for i in range(self.n_requests)]
    for i, prompt in enumerate(prompts):
      prompt[self.n_tokens - self.n_new :] = np.random.default_rng((i, round)).integers(0, vocab_size, self.n_new)
    return prompts


def serve(case: Case, config: EngineConfig, model: Model, report: Report) -> tuple[Timing, Row]:
  """The time until the last first token, over rounds of new prompts; and what the two before, which compile, took, and
  iterations and blocks read from DRAM of the last."""
  engine = Engine(JaxExecutor(config, model))
  seconds, steps, loaded = [], 0, 0
  # The first round fills the cache that the others find, the second compiles.
  for i in range(report.effort.calls + 2):
    if i > 3 and sum(seconds[2:]) + seconds[-1] > MOST_SECONDS:
      break
    prompts, usage = case.prompts(model.config.vocab_size, i), engine.usage
    at = usage.iterations, usage.blocks_loaded
    requests = [engine.add_request(prompt, 1) for prompt in prompts]
    engine.run()  # their last blocks may still be on their way to the pool when the next round begins
    seconds.append(max(r.first_token_time or math.inf for r in requests) - requests[0].arrival_time)
    steps, loaded = usage.iterations - at[0], usage.blocks_loaded - at[1]
    if wrong := [request.finish_reason for request in requests if request.finish_reason != "length"]:
      raise RuntimeError(f"{len(wrong)} of {len(requests)} requests ended by {wrong[0]!r}")
  return Timing.of(seconds[2:], 1), dict(iterations=steps, loaded=loaded, compiling_s=sum(seconds[:2]))


def products_us(cfg: ModelConfig, params: llama.Params, n_tokens: int, effort: Effort) -> float:
  """us of all matrix products of all layers for so many tokens, in parts of at most PRODUCT_TOKENS."""
  n = min(n_tokens, PRODUCT_TOKENS)

  def op(states, params, x):
    def layer(i, state):
      lp = llama.layer_params(params, i)
      for name in WEIGHTS:
        w = lp[name].reshape(_depth(cfg, name), -1)
        state = state | {name: _product(x[w.shape[0]], w)}
      return state

    # Of one layer there is no loop, and XLA would drop products that the next variant overwrites: they take turns.
    first, second = states
    return (second, lax.fori_loop(0, cfg.n_layers, layer, first)), ()

  shapes = {name: params["layers"][name][0].size // _depth(cfg, name) for name in WEIGHTS}
  dtype, device = llama.dtype_of(cfg), timing.device_sharding()
  states = tuple({name: step.random(0, (n, width), dtype, device) for name, width in shapes.items()} for _ in range(2))
  widths = {_depth(cfg, name) for name in shapes}
  variants = [{d: step.random(seed, (n, d), dtype, device) for d in widths} for seed in range(2)]
  measured, _, _ = timing.measure(op, variants, effort, state=states, shared=params)
  return measured.us * n_tokens / n


def _depth(cfg: ModelConfig, name: str) -> int:
  """Rows of a weight as one matrix."""
  return {"wo": cfg.n_heads * cfg.head_dim, "w_down": cfg.d_ff}.get(name, cfg.d_model)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
  return jax.numpy.dot(x, w, precision=lax.Precision.HIGHEST if x.dtype == np.float32 else None)


def attention_us(cfg: ModelConfig, n_tokens: int, n_before: int, effort: Effort) -> float:
  """us of the dense attention of all layers: of so many tokens, and over so many before them, as two calls."""
  dtype, device, on = llama.dtype_of(cfg), timing.device_sharding(), timing.implementation_here()
  dims = (cfg.n_kv_heads, cfg.head_dim)

  def inputs(seed):
    q = step.random(seed, (n_tokens, dims[0], cfg.group, dims[1]), dtype, device)
    kv = [step.random(seed + i, (n_tokens, *dims), dtype, device) for i in (1, 2)]
    return q, *kv, *(step.random(seed + i, (max(1, n_before), *dims), dtype, device) for i in (3, 4))

  def op(state, _, inputs):
    q, k, v, k_before, v_before = inputs
    own = kernels.prefill_attention(q, k, v, None, implementation=on)
    if n_before == 0:
      return state, own
    heads = q.reshape(1, n_tokens, -1, dims[1])
    cudnn = "cudnn" if llama.attends_fused(cfg) else "xla"
    return state, (own, jax.nn.dot_product_attention(heads, k_before[None], v_before[None], implementation=cudnn))

  measured, _, _ = timing.measure(op, [inputs(seed) for seed in (0, 10)], effort)
  return measured.us * cfg.n_layers


def measure(
  report: Report, cfg: ModelConfig, sizes: Mapping[str, tuple[int, int]], ways: Sequence[str], given: Sequence[str]
) -> None:
  """Adds the rows of all sizes, each by all ways, to the report.

  Args:
    report: what it goes to.
    cfg: the model.
    sizes: requests and tokens of each, by name.
    ways: names in WAYS.
    given: overrides of the configuration.
  """
  mesh, tokenizer = make_mesh(1), ByteTokenizer()
  model = Model(cfg, step.random_params(cfg, mesh), tokenizer, (), "random")
  products = functools.cache(lambda n: products_us(cfg, model.params, n, report.effort))
  attention = functools.cache(lambda n, before: attention_us(cfg, n, before, report.effort))

  def row(name: str, case: Case) -> Row:
    measured, others = serve(case, case.config(cfg, given), model, report)
    gc.collect()  # the engine's cache, before the next one is made
    n = case.n_requests
    parts = dict(products=n * products(case.n_new), attention=n * attention(case.n_new, case.n_tokens - case.n_new))
    floor = sum(parts.values())
    others |= dict(ttft_ms=measured.us / 1e3, tokens_per_s=n * case.n_tokens / measured.us * 1e6)
    if without := report.results.get(f"prefill-{name} hbm_pool", {}).get("us"):  # saves
      others["times_hbm_pool"] = measured.us / without
    return timing.row(measured, floor, {}, floors_us=parts, times_floor=measured.us / floor, **others)

  for name, (n, tokens) in sizes.items():
    for way in ways:
      report.add("prefill", f"{name} {way}", functools.partial(row, name, Case(n, tokens, way)))
