"""The demo, and `make`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from sparse_serve_jax import workloads
from sparse_serve_jax.commands import demo
from sparse_serve_jax.models import load_model, reference, save_hf
from tests.forks import start

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = reference.find()
pytestmark = pytest.mark.usefixtures("not_configured")


@pytest.mark.slow
@pytest.mark.parametrize("names", [("sparse", "psa"), pytest.param(demo.RUNGS, marks=pytest.mark.soak)], ids=len)
def test_the_demos_rungs(capsys, optimized, names):
  of, size = demo.Questions(n_prompts=3, prompt_tokens=1024, new_tokens=8, budget=256, rungs=names), 32
  demo.main(of=of)
  *printed, last = capsys.readouterr().out.splitlines()
  rungs = json.loads(last)
  assert list(rungs) == printed[1].split() == list(names)

  model = load_model(REFERENCE, dtype="float32")
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
  with pytest.raises(ValueError, match=f"^{tmp_path} has no tokenizer.json, so text cannot be read: .*$"):
    demo.main(str(tmp_path))


def test_make_keeps_the_environment_of_an_interpreter_that_was_chosen(tmp_path):
  """A later target need not choose it again; another choice makes it anew."""
  for name in (".made-by-python3.11", ".installed"):
    (tmp_path / name).touch()

  def said(*choice: str) -> str:
    command = ["make", "-n", "demo", f"VENV={tmp_path}", *choice]
    env = {name: of for name, of in os.environ.items() if name not in ("MAKEFLAGS", "PYTHON")}  # of a make around us
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout

  assert "Making" not in said() and "Making" not in said("PYTHON=python3.11")
  assert "Making" in said("PYTHON=python3.12")


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


def test_the_first_notebook_begins_with_the_reference_model_and_text():
  (notebook,) = (ROOT / "notebooks").glob("01_*.ipynb")
  cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
  first = "".join("".join(cell["source"]) for cell in cells[:2])
  assert "LLM(" in first and "models/reference" in first and "llm.generate(" in first
