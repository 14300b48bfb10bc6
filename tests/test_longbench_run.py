"""LongBench served with its KV in DRAM gives the tokens that dense serving in HBM gives."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from absl import flags
from absl.testing import flagsaver

from sparse_serve_jax.commands import run as serve
from sparse_serve_jax.config import EngineConfig, ModelConfig, find_config, from_dict, read_config
from sparse_serve_jax.memory.shape import CacheShape
from tests import jsonl
from tests.tiny import SMALL_SERVING


class Run(NamedTuple):
  summary: dict[str, Any]
  rows: dict[str, dict[str, Any]]  # by request
  config: EngineConfig
  shape: CacheShape


@pytest.fixture
def run(tmp_path, capsys, not_configured):
  """`python -m experiments.serve` on a LongBench directory, in this process."""

  def run(config: str, directory: Path, assignments: Sequence[str], *options: str) -> Run:
    out = tmp_path / config
    arguments = ["--model=random:tiny", "--dtype=float32", "--workload=longbench", f"--longbench_dir={directory}"]
    with flagsaver.flagsaver():
      sets = [f"--set={assignment}" for assignment in assignments]
      flags.FLAGS(["serve", f"--config={config}", f"--out={out}", *arguments, *options, *sets])
      assert serve.main() == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = jsonl.read(out / "requests.jsonl")
    setting = json.loads((out / "run.json").read_text())["setting"]
    engine = from_dict(EngineConfig, setting["config"])
    model = dataclasses.replace(read_config(ModelConfig, find_config("models", "tiny")), dtype="float32")
    assert setting["model"]["dtype"] == "float32" and len({row["request_id"] for row in rows}) == len(rows)
    return Run(summary, {row["request_id"]: row for row in rows}, engine, CacheShape.of(model, engine, 2))

  return run


def check(dense: Run, sparse_serve: Run) -> None:
  """Equal tokens from slots that hold at most an eighth of the KV, though every block is read."""
  assert sparse_serve.rows.keys() == dense.rows.keys()
  for name, row in dense.rows.items():
    assert (
      row["finish_reason"] in ("stop", "length") and row["prompt_tokens"] == sparse_serve.rows[name]["prompt_tokens"]
    )
    assert sparse_serve.rows[name]["output_token_ids"] == row["output_token_ids"], name
    assert row["prompt_tokens"] + len(row["output_token_ids"]) <= sparse_serve.config.sparse.token_budget
  assert dense.summary["refused"] == sparse_serve.summary["refused"] == 0
  assert dense.summary["output_tokens"] > 0

  shape, kv = sparse_serve.shape, sparse_serve.summary["peak_dram_kv_bytes"]
  # Blocks of output that was not written are not in the pool: less than 8 times what slots hold.
  assert 7 * shape.P * shape.block_bytes <= kv <= sparse_serve.config.cache.dram_bytes
  assert sparse_serve.summary["peak_hbm_kv_bytes"] <= sparse_serve.config.cache.hbm_bytes
  assert sparse_serve.summary["blocks_loaded"] > 0 == dense.summary["blocks_loaded"]
  assert sparse_serve.summary["hbm_hit_rate"] < 1 == dense.summary["hbm_hit_rate"]
  assert sparse_serve.summary["blocks_attended"] == dense.summary["blocks_attended"]


@pytest.mark.slow
def test_every_task(run, longbench_dir):
  """Two rows of every file. The budget is above prompt and output; slots take 2.9 MB."""
  options = ["--limit=2"]
  dense = run("dense", longbench_dir, ["cache.hbm_bytes=64MiB", "scheduler.max_context=2560"], *options)
  assert len(dense.rows) == 2 * len(list((longbench_dir / "data").glob("*.jsonl")))
  assert 2560 - 512 - 32 - 1 <= max(row["prompt_tokens"] for row in dense.rows.values()) <= 2560 - 512
  changes = ["sparse.token_budget=4096", "cache.dram_bytes=64MiB", "cache.hbm_bytes=6MiB", "scheduler.max_context=2560"]
  check(dense, run("sparse_serve", longbench_dir, changes, *options))


def write_tasks(directory: Path) -> None:
  """A LongBench of two tasks with two rows each, and one more that --limit leaves out."""
  (directory / "config").mkdir(parents=True)
  (directory / "data").mkdir()
  templates = {
    "qasper": "Here is the log of a harbour.\n{context}\nQuestion: {input}\nAnswer:",
    "gov_report": "Sum up these recipes.\n{context}\nSummary:",
  }
  (directory / "config" / "dataset2prompt.json").write_text(json.dumps(templates))
  (directory / "config" / "dataset2maxlen.json").write_text(json.dumps({"qasper": 20, "gov_report": 40}))
  log = "At {} o'clock the ferry with {} barrels moored at pier {}. "
  recipe = "Boil {} potatoes for {} minutes, then add {} onions. "
  for name, text, question in (("qasper", log, "Where is the ferry?"), ("gov_report_e", recipe, "")):
    rows = [
      {
        "answers": [],
        "all_classes": None,
        "length": n,
        "context": "".join(text.format(i, i * row + 3, i % 5) for i in range(1, n)),
        "input": question,
      }
      for row, n in enumerate((4, 30, 2))
    ]
    jsonl.write(directory / "data" / f"{name}.jsonl", rows)


def test_two_tasks(run, tmp_path):
  write_tasks(tmp_path / "bench")
  options = ["--limit=2", "--prompt_tokens=320"]
  dense = run("dense", tmp_path / "bench", [*SMALL_SERVING, "cache.hbm_bytes=4MiB"], *options)
  prompts = {name: row["prompt_tokens"] for name, row in dense.rows.items()}
  assert set(prompts) == {"qasper-0", "qasper-1", "gov_report_e-0", "gov_report_e-1"}
  assert prompts["qasper-1"] == prompts["gov_report_e-1"] == 319 + len("<user>\n<assistant>")  # BOS is cut
  assert max(prompts["qasper-0"], prompts["gov_report_e-0"]) < 320
  check(
    dense, run("sparse_serve", tmp_path / "bench", [*SMALL_SERVING, "scheduler.batch_control=working_set"], *options)
  )
