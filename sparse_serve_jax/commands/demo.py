"""A small ladder: a few rungs side by side, by default with the reference model: some minutes on a laptop.

  sparse-serve demo [MODEL]

MODEL is a model directory or a GGUF file. Six questions about long texts come at once and are served four times within
one HBM budget, a third of the size of their KV: with dense and sparse attention and all KV in HBM, so that requests
wait for it, then with the KV in DRAM. Every rung is compiled before. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from sparse_serve_jax import runtime, workloads
from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.ladder import rungs
from sparse_serve_jax.ladder.cells import Ladder
from sparse_serve_jax.models import load_model
from sparse_serve_jax.serving import budget, metrics
from sparse_serve_jax.workloads import Item

RUNGS = ("dense", "sparse", "sparse_serve", "psa")  # the others are compared with the first
TASKS = ("single_text", "multi_key", "key_value")  # take turns
ROWS = {
  "ms to first token": ("ttft_mean_s", 1000),
  "ms per token": ("tbt_mean_s", 1000),
  "tokens per s": ("throughput_tok_s", 1),
  "blocks attended": ("blocks_attended", 1),
  "blocks loaded": ("blocks_loaded", 1),
  "HBM hit rate": ("hbm_hit_rate", 1),
  "HBM KV bytes": ("peak_hbm_kv_bytes", 1),
  "DRAM KV bytes": ("peak_dram_kv_bytes", 1),
  "answers right": ("score_mean", 1),
  "tokens as dense": ("tokens_as_first", 1),
}  # name -> key of a cell, and what it is multiplied by
MEANING = """\
dense and sparse serve few requests at a time, as HBM holds the KV of few. The others serve all from DRAM, so a
token of theirs waits for other prompts too. psa has no token budget: it reads until it estimates that it has
95 % of the attention. Blocks count for each layer and KV head; answers are compared up to where they part or end.
A CPU shows no speed."""


@dataclasses.dataclass(frozen=True)
class Questions:
  """What is asked, and how much memory the answers may take: HBM for the KV of two of them, DRAM for that of all."""

  n_prompts: int = 6
  prompt_tokens: int = 2000
  new_tokens: int = 24
  budget: int = 512  # tokens attended to, where a rung has a budget
  rungs: tuple[str, ...] = RUNGS

  @property
  def max_context(self) -> int:
    return self.prompt_tokens + 48  # 64 blocks: one width of block tables, for few programs to compile

  @property
  def workload(self) -> workloads.WorkloadConfig:
    return workloads.WorkloadConfig(
      "needle",
      tasks=TASKS,
      limit=self.n_prompts,
      prompt_tokens=self.prompt_tokens,
      max_new_tokens=self.new_tokens,
    )

  def changes(self, cfg: ModelConfig) -> list[str]:
    """What makes the rungs comparable. HBM is less tails and the like."""
    memory = {"cache.hbm_bytes": 2 * self.kv_bytes(cfg), "cache.dram_bytes": (self.n_prompts + 1) * self.kv_bytes(cfg)}
    sizes = {"sparse.token_budget": self.budget, "cache.lanes": 8, "scheduler.max_context": self.max_context}
    return [f"{key}={value}" for key, value in (memory | sizes).items()]

  def kv_bytes(self, cfg: ModelConfig) -> int:
    """Of a request at most."""
    return self.max_context * budget.kv_bytes(cfg)


def main(directory: str | None = None, of: Questions | None = None) -> None:
  of = of or Questions()
  runtime.configure()
  model = load_model("reference" if directory is None else directory, dtype="float32")
  made = workloads.read(of.workload)(model.tokenizer, of.max_context)
  items = [dataclasses.replace(item, options={"ignore_eos": True}) for item in made if isinstance(item, Item)]
  configs = rungs.read_rungs(of.rungs, of.changes(model.config))
  rungs.check(configs, model.config, items)
  with tempfile.TemporaryDirectory() as folder:
    run = Ladder(model, configs, items, lambda _: np.zeros(len(items)), pathlib.Path(folder))
    cells = {rung: run.cell(rung, 0.0) for rung in of.rungs}  # at no rate: all at once
  rows = {rung: {name: _scaled(cell[key], by) for name, (key, by) in ROWS.items()} for rung, cell in cells.items()}
  asked = f"{of.n_prompts} questions about texts of {of.prompt_tokens} tokens ({', '.join(TASKS)})"
  hbm, all_kv = (f"{n * of.kv_bytes(model.config) / 1e6:.0f} MB" for n in (2, of.n_prompts))
  memory = f"at most {hbm} of HBM for their {all_kv} of KV"
  print(f"{asked}, {of.new_tokens} new tokens each, model {model.name}; {memory}")
  cli.end_with(f"{metrics.table(rows)}\n{MEANING}", rows)


def _scaled(value: float | None, by: int) -> float | None:
  return None if value is None else value * by


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.define_verbose()
  cli.run(main, arguments=["MODEL"], argv=argv)
