"""A few rungs of the ladder side by side, by default on the reference model: some minutes on a laptop.

  python -m experiments.demo [MODEL DIRECTORY]

Six questions about long texts are served four times within one HBM budget, a third of the size of their KV: with dense
and sparse attention and all KV in HBM, so that requests wait for it, then with the KV in DRAM. Every rung first runs
once to compile. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import app, logging
from tqdm import tqdm

from sparse_serve_jax import runtime, tasks
from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.models import Model, llama, load_model
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.request import Request

REFERENCE = pathlib.Path(__file__).resolve().parents[1] / "models" / "reference"
TASKS = ("single_text", "multi_key", "key_value")
N_PROMPTS, PROMPT_TOKENS, NEW_TOKENS, BUDGET = 6, 2048, 24, 512
RUNGS = ("dense", "sparse", "sparse_serve", "psa")

Row = dict[str, int | float | str | None]


def main(argv: list[str]) -> None:
  if len(argv) > 2:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[2:])}")
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  try:
    model = load_model(argv[1] if argv[1:] else REFERENCE, dtype="float32")
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  names = [TASKS[i % len(TASKS)] for i in range(N_PROMPTS)]
  asked = [tasks.make(name, PROMPT_TOKENS, i, model.tokenizer, split="eval") for i, name in enumerate(names)]
  lengths = [len(model.tokenizer.encode(of.completion, add_special_tokens=False)) for of in asked]
  rows: dict[str, Row] = {}
  outputs: dict[str, list[list[int]]] = {}
  for name in tqdm(RUNGS, unit="rung", disable=None):
    rows[name], outputs[name] = measure(override(load_config(name), changes(model)), model, asked)
    rows[name]["answers right"] = _share_right(outputs[name], asked, model)
    rows[name]["tokens as dense"] = _share_equal(outputs[name], outputs["dense"], lengths)
  of = f"{N_PROMPTS} questions about texts of {PROMPT_TOKENS} tokens ({', '.join(TASKS)})"
  hbm, all_kv = (f"{n * _kv_bytes(model) / 1e6:.0f} MB" for n in (2, N_PROMPTS))
  print(f"{of}, {NEW_TOKENS} new tokens each, model {model.name}; at most {hbm} of HBM for their {all_kv} of KV")
  print(metrics.table(rows))
  print(
    "dense and sparse serve few requests at a time, as HBM holds the KV of few. The others serve all from DRAM, so a\n"
    "token of theirs waits for other prompts too. psa has no token budget: it reads until it estimates that it has\n"
    "95 % of the attention. Blocks count for each layer and KV head; answers are compared up to their end. A CPU\n"
    "shows no speed."
  )
  print(json.dumps(rows), flush=True)


def changes(model: Model) -> list[str]:
  """What makes the rungs comparable: HBM for the KV of two requests less tails and the like, DRAM for all."""
  kv_bytes = _kv_bytes(model)
  memory = f"cache.hbm_bytes={2 * kv_bytes}", f"cache.dram_bytes={(N_PROMPTS + 1) * kv_bytes}"
  return [f"sparse.token_budget={BUDGET}", "cache.rows=8", *memory, f"scheduler.max_context={_tokens()}"]


def _tokens() -> int:
  """Of a request at most."""
  return PROMPT_TOKENS + 64


def _kv_bytes(model: Model) -> int:
  """Of a request at most."""
  cfg = model.config
  return _tokens() * 2 * cfg.n_kv_heads * cfg.head_dim * cfg.n_layers * llama.dtype_of(cfg).itemsize


def measure(config: EngineConfig, model: Model, asked: Sequence[tasks.Instance]) -> tuple[Row, list[list[int]]]:
  """Serves the prompts twice with one executor, the second time all compiled: returns the numbers of that."""
  executor = JaxExecutor(config, model)
  prompts = [model.tokenizer.encode(instance.prompt) for instance in asked]
  _serve(Engine(executor), prompts)
  engine = Engine(executor)
  requests = _serve(engine, prompts)
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


def _serve(engine: Engine, prompts: Sequence[list[int]]) -> list[Request]:
  requests = [engine.add_request(prompt, NEW_TOKENS, ignore_eos=True) for prompt in prompts]
  engine.run()
  return requests


def _share_right(outputs: list[list[int]], asked: Sequence[tasks.Instance], model: Model) -> float:
  texts = [model.tokenizer.decode(tokens) for tokens in outputs]
  right = [tasks.TASKS[of.task].score(text, of) for text, of in zip(texts, asked, strict=True)]
  return float(np.mean(right))


def _share_equal(outputs: list[list[int]], expected: list[list[int]], lengths: Sequence[int]) -> float:
  """Of the other rung's answers, of so many tokens each, the tokens that are the same here."""
  same = [np.equal(a[:n], b[:n]) for a, b, n in zip(outputs, expected, lengths, strict=True)]
  return float(np.concatenate(same).mean())


def _ms(seconds: float | None) -> float | None:
  return None if seconds is None else 1000 * seconds


if __name__ == "__main__":
  app.run(main)
