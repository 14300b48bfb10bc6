"""The command line: what it prints and writes, how it refuses, and the commands that README.md shows."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from pallas_kernels.maps import Maps
from sparse_serve_jax import runtime, workloads
from sparse_serve_jax.commands import demo
from sparse_serve_jax.config import EngineConfig, find_config, from_dict, load_config, override
from sparse_serve_jax.memory import eviction
from sparse_serve_jax.models import load_model, save_hf
from tests.forks import start
from tests.test_timeline import check_form

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SUMMARY = {
  "requests",
  "prompt_tokens",
  "output_tokens",
  "ttft_mean_s",
  "tbt_mean_s",
  "tbt_p99_s",
  "throughput_tok_s",
  "hbm_hit_rate",
  "blocks_loaded",
  "blocks_saved",
  "peak_hbm_kv_bytes",
  "dram_kv_bytes",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """What `runtime.configure` sets is for a process of its own; test_runtime tests it."""
  monkeypatch.setattr(runtime, "configure", lambda: None)


def rows_of(folder: Path) -> list[dict]:
  return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def commands_in_readme() -> list[list[str]]:
  """Arguments of every `python -m experiments...` of a code block."""
  blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
  lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
  return [shlex.split(line) for line in lines if line.startswith("python -m experiments")]


# ------------------------------------------------------------------------------------------------------------ the shell


def test_the_readmes_experiment_runs(tmp_path):
  """With fewer and shorter prompts."""
  (command,) = (c for c in commands_in_readme() if c[2] == "experiments.serve")
  fewer = ["--prompt_tokens=300", "--limit=3", "--max_new_tokens=5", "--ignore_eos", f"--out={tmp_path / 'run'}"]
  done = subprocess.run(
    [sys.executable, *command[1:], *fewer],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  *table, last = done.stdout.splitlines()
  summary = json.loads(last)
  assert set(summary) >= SUMMARY
  assert (summary["requests"], summary["output_tokens"], summary["refused"]) == (3, 15, 0)
  assert 0.7 * 900 < summary["prompt_tokens"] <= 900 - 3 * len(" 12345\n")  # to the next sentence, and the answer
  assert summary["blocks_saved"] == sum((r["prompt_tokens"] + 4) // 32 for r in rows_of(tmp_path / "run")) * 8
  assert [line.split()[0] for line in table] == ["sparse_serve", *summary]

  run = json.loads((tmp_path / "run" / "run.json").read_text())
  assignments = [after for flag, after in itertools.pairwise(command) if flag == "--set"]
  expected = override(load_config("sparse_serve"), assignments)
  assert from_dict(EngineConfig, run["setting"]["config"]) == expected
  assert "cache.hbm_bytes=8MiB" in assignments and expected.cache.hbm_bytes == 8 << 20
  assert run["setting"]["model"]["name"] == "random:tiny" and run["setting"]["workload"]["limit"] == 3
  assert run["parts"][0]["device"]["platform"] == "cpu"
  check_form(json.loads((tmp_path / "run" / "timeline.json").read_text()))


def test_the_readmes_commands_parse():
  # Others define the same flags in another process; below it is tested that there are such flags.
  commands = [command for command in commands_in_readme() if command[2] == "experiments.serve"]
  assert commands
  for _, _, name, *arguments in commands:
    module = importlib.import_module("sparse_serve_jax.commands.run")
    with flagsaver.flagsaver():
      rest = flags.FLAGS([name, *arguments])
      assert rest == [name] and callable(module.main)
      values = flags.FLAGS.flag_values_dict()
      override(load_config(values["config"]), values["set"])
      assert find_config("models", values["model"].removeprefix("random:"))


def test_what_else_the_readme_names_exists():
  sources = "".join(file.read_text() for file in (ROOT / "sparse_serve_jax" / "commands").glob("*.py"))
  defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', sources))
  assert set(re.findall(r"(?<!XLA_FLAGS=)--(\w+)[= ]", README)) <= defined
  modules = set(re.findall(r"python -m experiments\.(\w+)", README))
  assert {"serve", "bench_kernels", "bench_step"} <= modules <= {f.stem for f in (ROOT / "experiments").glob("*.py")}
  in_python = [ast.literal_eval(f"[{text}]") for text in re.findall(r"overrides=\[(.*?)\]", README)]
  override(
    load_config("psa"), [*re.findall(r"--set[= ]([\w.]+=[\w.:]+)", README), *itertools.chain.from_iterable(in_python)]
  )
  configs = {file.stem for file in (ROOT / "configs" / "serving").glob("*.json")}
  assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) == configs
  targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
  assert {"demo", "test"} <= set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M)) <= set(targets)


@pytest.mark.slow
def test_the_readmes_python_finds_the_answer(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(eviction, "EVICTIONS", dict(eviction.EVICTIONS))
  ask, serve, evict = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
  exec(compile(ask, "README.md", "exec"), {})
  text, answers, _ = capsys.readouterr().out.rsplit("\n", 2)
  assert text.strip() == ast.literal_eval(answers.strip())[0]
  exec(compile(serve, "README.md", "exec"), {})
  assert len(ast.literal_eval(capsys.readouterr().out)) == 8
  exec(compile(evict, "README.md", "exec"), {})
  key = eviction.EVICTIONS["keep_layer_0"](Maps.empty(2, 3, 4, 5)._replace(block_of=jnp.array([0, 5, -1, 12, 23])), 9)
  assert key.tolist() == [9, -1, -1, 9, -1]  # blocks 0 and 12 are of layer 0


def test_the_kernels_readme_runs(capsys):
  (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "pallas_kernels" / "README.md").read_text(), re.M | re.S)
  exec(compile(example, "pallas_kernels/README.md", "exec"), {})
  first, second = (ast.literal_eval(line.split("missed ")[1]) for line in capsys.readouterr().out.splitlines())
  assert first == [[4, 4], [4, 4]] and 0 < sum(map(sum, second)) < 16


# ------------------------------------------------------------------------------------------------------------- the demo


@pytest.mark.slow
@pytest.mark.parametrize("names", [("sparse", "psa"), pytest.param(demo.RUNGS, marks=pytest.mark.soak)], ids=len)
def test_the_demos_rungs(capsys, optimized, names):
  of, size = demo.Questions(n_prompts=3, prompt_tokens=1024, new_tokens=8, budget=256, rungs=names), 32
  demo.main(of=of)
  *printed, last = capsys.readouterr().out.splitlines()
  rungs = json.loads(last)
  assert list(rungs) == printed[1].split() == list(names)

  model = load_model(demo.REFERENCE, dtype="float32")
  hbm = 2 * of.kv_bytes(model.config)  # without offload room for one request
  asked = workloads.read(of.workload)(model.tokenizer, of.max_context)
  assert [item.about["task"] for item in asked] == list(demo.TASKS)
  lengths = [len(item.prompt) for item in asked]
  per_block = model.config.n_layers * model.config.n_kv_heads
  full = sum((length + step) // size for length in lengths for step in range(of.new_tokens - 1)) * per_block
  in_budget = of.n_prompts * (of.new_tokens - 1) * (of.budget // size) * per_block
  assert 0 < in_budget < full
  assert in_budget / 4 < rungs["psa"]["blocks attended"] <= full
  for name, row in rungs.items():
    assert name == "psa" or row["blocks attended"] == (full if name == "dense" else in_budget)
    offloads = name in ("sparse_serve", "psa")
    assert 0 < row["HBM KV bytes"] <= hbm
    assert (row["blocks loaded"] > 0) == offloads == (row["DRAM KV bytes"] > hbm)
    assert 0 < row["HBM hit rate"] < 1 if offloads else row["HBM hit rate"] == 1
    assert min(row["ms to first token"], row["ms per token"], row["tokens per s"]) > 0
    assert row["answers right"] == row["tokens as dense"] == 1


def test_a_model_that_the_demo_cannot_take_is_one_line(tmp_path):
  absent = start("experiments.demo", "/nope")
  assert (absent.returncode, absent.stdout) == (2, "") and absent.stderr.startswith("error: '/nope' is no model: ")
  assert len(absent.stderr.splitlines()) == 1
  save_hf(load_model("random:tiny"), tmp_path)
  (tmp_path / "tokenizer_config.json").unlink()
  with pytest.raises(ValueError, match=f"^{tmp_path} has no tokenizer.json, so text cannot be read or written: .*$"):
    demo.main(str(tmp_path))


def test_make_says_what_it_does_before_it_installs():
  done = subprocess.run(["make", "-n", "demo", "VENV=/nowhere"], cwd=ROOT, capture_output=True, text=True, check=True)
  steps = [
    "Making /nowhere, a virtual environment",
    "Installing the packages",
    " install --constraint",
    "Serving four times",
  ]
  assert sorted(done.stdout.index(step) for step in steps) == [done.stdout.index(step) for step in steps]
  (install,) = [line for line in done.stdout.splitlines() if " install --constraint" in line]
  assert "--quiet" not in install


def test_the_notebook_begins_with_the_reference_model_and_text():
  (notebook,) = (ROOT / "notebooks").glob("*.ipynb")
  first = next("".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code")
  assert "LLM(" in first and "models/reference" in first and "llm.generate(" in first
