"""A few rungs of the ladder side by side, on a tiny random model: no download, a couple of minutes on a laptop.

  python -m experiments.demo

Six long prompts are served four times within one HBM budget far below the size of their KV: dense and sparse attention
with all KV in HBM, so that requests wait for it, then with the KV in DRAM. Every rung first runs once to compile. The
last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from absl import app, logging
from tqdm import tqdm

from sparse_serve_jax import runtime
from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.models import Model, load_model
from sparse_serve_jax.serving import metrics, workload
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.request import Request

N_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 2048, 24
# The KV of six prompts is 12.4 MiB: without offload this HBM holds one request at a time.
CHANGES = [
  "sparse.token_budget=512",
  "cache.rows=8",
  "cache.hbm_bytes=4MiB",
  "cache.dram_bytes=16MiB",
  "scheduler.max_context=2112",
]
RUNGS = ("dense", "sparse", "sparse_serve", "psa")

Row = dict[str, int | float | str | None]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  model = load_model("random:tiny")
  items = workload.needle(model.tokenizer, N_PROMPTS, PROMPT_TOKENS, NEW_TOKENS)
  rows: dict[str, Row] = {}
  outputs: dict[str, list[list[int]]] = {}
  for name in tqdm(RUNGS, unit="rung", disable=None):
    rows[name], outputs[name] = measure(override(load_config(name), CHANGES), model, items)
    rows[name]["tokens as dense"] = _share_equal(outputs[name], outputs["dense"])
  print(f"{N_PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens each, model {model.name}")
  print(metrics.table(rows))
  print(
    "dense and sparse serve one request after another, as HBM holds the KV of one. The others serve all from DRAM, so\n"
    "a token of theirs waits for other prompts too. psa has no token budget: 95 % of the evenly spread attention of\n"
    "random weights is most blocks. This is a CPU and no trained model: neither speed nor accuracy."
  )
  print(json.dumps(rows), flush=True)


def measure(config: EngineConfig, model: Model, items: Sequence[workload.Item]) -> tuple[Row, list[list[int]]]:
  """Serves the items twice with one executor, the second time with everything compiled: returns that one's numbers."""
  executor = JaxExecutor(config, model)
  _serve(Engine(config, model, executor), items)
  engine = Engine(config, model, executor)
  requests = _serve(engine, items)
  summary, usage = metrics.summarize(requests, engine.usage), engine.usage
  row: Row = {
    "ms to first token": _ms(summary.ttft_mean_s),
    "ms per token": _ms(summary.tbt_mean_s),
    "tokens per s": summary.throughput_tok_s,
    "blocks attended": usage.blocks_attended,
    "blocks loaded": usage.blocks_loaded,
    "HBM hit rate": usage.hbm_hit_rate,
    "HBM KV bytes": usage.peak_hbm_kv_bytes,
    "DRAM KV bytes": usage.dram_kv_bytes,
  }
  return row, [request.output_tokens for request in requests]


def _serve(engine: Engine, items: Sequence[workload.Item]) -> list[Request]:
  requests = [engine.add_request(item.prompt, item.max_new_tokens, ignore_eos=True) for item in items]
  engine.run()
  return requests


def _share_equal(outputs: list[list[int]], expected: list[list[int]]) -> float:
  """Of all tokens, those that stand where the other rung has the same one."""
  return float(np.mean(np.array(outputs) == np.array(expected)))


def _ms(seconds: float | None) -> float | None:
  return None if seconds is None else 1000 * seconds


if __name__ == "__main__":
  app.run(main)
