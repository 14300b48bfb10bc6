"""Rungs of the ladder side by side: the same questions, the same memory, one configuration after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from sparse_serve_jax import tasks
from sparse_serve_jax.config import EngineConfig, ModelConfig, load_config, override
from sparse_serve_jax.models import Model, llama
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.request import Request

RUNGS = ("dense", "sparse", "sparse_serve", "psa")  # the others are compared with the first
TASKS = ("single_text", "multi_key", "key_value")  # take turns

Row = dict[str, int | float | str | None]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Questions, and how much memory their answers may take: HBM for the KV of two of them, DRAM for that of all."""

  n_prompts: int = 6
  prompt_tokens: int = 2048
  new_tokens: int = 24
  budget: int = 512  # tokens attended to, where a rung has a budget

  def run(self, model: Model) -> dict[str, Row]:
    """Serves all questions with each rung. Returns what there is to tell of it, by name.

    Raises:
      ValueError: the model has no tokenizer, or its context is too short.
    """
    asked = self.asked(model)
    lengths = [len(model.tokenizer.encode(of.completion, add_special_tokens=False)) for of in asked]
    rows: dict[str, Row] = {}
    outputs: dict[str, list[list[int]]] = {}
    for name in tqdm(RUNGS, unit="rung", disable=None):
      config = override(load_config(name), self.changes(model.config))
      rows[name], outputs[name] = self._measure(config, model, asked)
      rows[name]["answers right"] = share_right(outputs[name], asked, model)
      rows[name]["tokens as dense"] = share_equal(outputs[name], outputs[RUNGS[0]], lengths)
    return rows

  def asked(self, model: Model) -> list[tasks.Instance]:
    names = [TASKS[i % len(TASKS)] for i in range(self.n_prompts)]
    return [tasks.make(name, self.prompt_tokens, i, model.tokenizer, split="eval") for i, name in enumerate(names)]

  def changes(self, cfg: ModelConfig) -> list[str]:
    """What makes the rungs comparable. HBM is less tails and the like."""
    memory = f"cache.hbm_bytes={self.hbm_bytes(cfg)}", f"cache.dram_bytes={(self.n_prompts + 1) * self.kv_bytes(cfg)}"
    return [f"sparse.token_budget={self.budget}", "cache.lanes=8", *memory, f"scheduler.max_context={self._tokens}"]

  def hbm_bytes(self, cfg: ModelConfig) -> int:
    return 2 * self.kv_bytes(cfg)

  def kv_bytes(self, cfg: ModelConfig) -> int:
    """Of a request at most."""
    return self._tokens * 2 * cfg.n_kv_heads * cfg.head_dim * cfg.n_layers * llama.dtype_of(cfg).itemsize

  @property
  def _tokens(self) -> int:
    """Of a request at most."""
    return self.prompt_tokens + 64

  def _measure(
    self, config: EngineConfig, model: Model, asked: Sequence[tasks.Instance]
  ) -> tuple[Row, list[list[int]]]:
    """Serves the prompts twice with one executor, the second time all compiled: returns the numbers of that."""
    executor = JaxExecutor(config, model)
    prompts = [model.tokenizer.encode(instance.prompt) for instance in asked]
    self._serve(Engine(executor), prompts)
    engine = Engine(executor)
    requests = self._serve(engine, prompts)
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

  def _serve(self, engine: Engine, prompts: Sequence[list[int]]) -> list[Request]:
    requests = [engine.add_request(prompt, self.new_tokens, ignore_eos=True) for prompt in prompts]
    engine.run()
    return requests


def share_right(outputs: Sequence[list[int]], asked: Sequence[tasks.Instance], model: Model) -> float:
  """The mean score of the answers."""
  texts = [model.tokenizer.decode(tokens) for tokens in outputs]
  right = [tasks.TASKS[of.task].score(text, of) for text, of in zip(texts, asked, strict=True)]
  return float(np.mean(right))


def share_equal(outputs: Sequence[list[int]], expected: Sequence[list[int]], lengths: Sequence[int]) -> float:
  """Of the other rung's answers, of so many tokens each, the tokens that are the same here."""
  same = [np.equal(a[:n], b[:n]) for a, b, n in zip(outputs, expected, lengths, strict=True)]
  return float(np.concatenate(same).mean())


def _ms(seconds: float | None) -> float | None:
  return None if seconds is None else 1000 * seconds
