"""Serves with a few rungs of the ladder side by side, by default the reference model: some minutes on a laptop.

  python -m experiments.demo [MODEL DIRECTORY]

Six questions about long texts are served four times within one HBM budget, a third of the size of their KV: with dense
and sparse attention and all KV in HBM, so that requests wait for it, then with the KV in DRAM. Every rung first runs
once to compile. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import pathlib

from experiments import cli
from sparse_serve_jax import runtime
from sparse_serve_jax.evaluation import sidebyside
from sparse_serve_jax.models import load_model
from sparse_serve_jax.serving import metrics

REFERENCE = pathlib.Path(__file__).resolve().parents[1] / "models" / "reference"
MEANING = """\
dense and sparse serve few requests at a time, as HBM holds the KV of few. The others serve all from DRAM, so a
token of theirs waits for other prompts too. psa has no token budget: it reads until it estimates that it has
95 % of the attention. Blocks count for each layer and KV head; answers are compared up to their end. A CPU
shows no speed."""


def main(directory: str | None = None, of: sidebyside.Comparison | None = None) -> None:
  of = of or sidebyside.Comparison()
  runtime.configure()
  model = load_model(REFERENCE if directory is None else directory, dtype="float32")
  rows = of.run(model)
  asked = f"{of.n_prompts} questions about texts of {of.prompt_tokens} tokens ({', '.join(sidebyside.TASKS)})"
  hbm, all_kv = (f"{n / 1e6:.0f} MB" for n in (of.hbm_bytes(model.config), of.n_prompts * of.kv_bytes(model.config)))
  memory = f"at most {hbm} of HBM for their {all_kv} of KV"
  print(f"{asked}, {of.new_tokens} new tokens each, model {model.name}; {memory}")
  cli.end_with(f"{metrics.table(rows)}\n{MEANING}", rows)


if __name__ == "__main__":
  cli.define_verbose()
  cli.run(main, arguments=["MODEL DIRECTORY"])
