"""Costs that are fitted to what a ladder kept, or to this machine, and what they predict."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sparse_serve_jax.config import override
from sparse_serve_jax.ladder.folder import LadderFolder, claim, read_rung
from sparse_serve_jax.models import load_model
from sparse_serve_jax.serving import run
from sparse_serve_jax.serving.clock import Virtual
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.simulation import calibrate
from sparse_serve_jax.simulation.cost import Work, read_cost
from sparse_serve_jax.simulation.executor import SimulatedExecutor
from sparse_serve_jax.simulation.measure import Iteration, Stopwatch, from_columns, to_columns
from sparse_serve_jax.workloads import Item, WorkloadConfig, generated, load_workload
from tests.forks import start
from tests.test_simulation import config, cost, items
from tests.tiny import SMALL_SERVING


def text(n: int, seed: int) -> WorkloadConfig:
  asked = {"limit": n, "prompt_tokens": 300, "max_new_tokens": 40, "seed": seed, "shortest": 0.25}
  return override(load_workload("text"), asked)


def ladder_folder(folder: Path, workload: WorkloadConfig, asked: list[Item], dtype: str = "float32") -> None:
  """A ladder's folder whose cell was served at the costs of `cost`, and not on a device."""
  model = load_model("random:tiny", dtype)
  conf, clock, n = config("cache.save=direct"), Virtual(), len(asked)
  prices = cost(decode_rows=3e-4, prefill_pairs=1e-9, programs=2e-4)
  device = SimulatedExecutor(conf, model.config, prices, clock, vectors=2)
  watch = Stopwatch(device)
  engine = Engine(device, clock=clock, observer=watch.observe)
  served = run.serve(engine, asked, np.zeros(n), lambda _: None)
  configs = {"mine": conf, "small": override(conf, ["scheduler.max_context=256"])}
  claim(folder, configs, model, workload, None, seed=0)
  LadderFolder(folder).add_cell({"rung": "mine", "rate": 0.0} | served.to_dict(), watch.iterations)


def test_costs_of_a_ladders_cell_predict_that_of_another_workload(tmp_path):
  """What the two have in common are the costs, to which neither refers: they are found by what iterations took."""
  for name, workload in (("one", text(12, 0)), ("other", text(20, 1))):
    ladder_folder(tmp_path / name, workload, items(*(of.tolist() for of in generated.lengths(workload)[:2])))
  (tmp_path / "rows.jsonl").write_text('{"prompt": 5}\n' + '{"prompt": "abcdefghi", "max_tokens": 9}\n' * 3)
  some_refused = override(load_workload("jsonl"), {"path": str(tmp_path / "rows.jsonl")})
  ladder_folder(tmp_path / "rows", some_refused, items([10] * 3, [9] * 3))
  ladder_folder(tmp_path / "bfloat16", text(1, 0), items([90], [9]), "bfloat16")

  def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return start(f"experiments.{name}", f"--cost={tmp_path / 'cost.json'}", "--config=mine", *arguments)

  fitted = command("calibrate", f"--ladder={tmp_path / 'one'}")
  assert fitted.returncode == 0, fitted.stderr
  assert json.loads(fitted.stdout.splitlines()[-1])["mean_error"] < 0.01
  made = command("simulate", f"--ladder={tmp_path / 'one'},{tmp_path / 'other'},{tmp_path / 'rows'}")
  assert made.returncode == 0, made.stderr
  told = json.loads(made.stdout.splitlines()[-1])
  assert list(told) == [f"{name} 0 {how}" for name in ("one", "other", "rows") for how in ("simulated", "measured")]
  assert [told[f"rows 0 {how}"][of] for how in ("simulated", "measured") for of in ("requests", "refused")] == [
    3,
    0,
  ] * 2
  off = told["other 0 simulated"]
  assert told["other 0 measured"]["requests"] == off["requests"] == 20
  assert abs(off["throughput_tok_s off by"]) < 0.03 and abs(off["ttft_mean_s off by"]) < 0.03
  for arguments, message in (
    ([f"--ladder={tmp_path}"], "run.json"),
    ([f"--ladder={tmp_path / 'one'}", "--config=psa"], "has no rung 'psa', but mine"),
    ([f"--ladder={tmp_path / 'one'}", "--limit=3", "--repeats=2"], "leave out --"),
  ):
    for name in ("calibrate", "simulate"):
      wrong = command(name, *arguments)
      assert wrong.returncode == 2 and message in wrong.stderr
  mixed = command("calibrate", f"--ladder={tmp_path / 'one'},{tmp_path / 'bfloat16'}")
  assert mixed.returncode == 2
  assert "costs are of one model and device, these are of random:tiny in bfloat16 on " in mixed.stderr


def test_without_a_decode_step_nothing_says_what_psa_reads(tmp_path):
  ladder_folder(tmp_path, text(1, 0), items([90], [9]))
  with pytest.raises(ValueError, match="no step says what PSA reads: 0 rows"):
    calibrate._blocks_read(read_rung(tmp_path, "mine").ran, [])


def test_a_ladders_device_is_the_one_that_made_its_cells(tmp_path):
  """And not one that has told what is there again."""
  ladder_folder(tmp_path, text(1, 0), items([90], [9]))
  run = json.loads((tmp_path / "run.json").read_text())
  run["parts"].insert(0, {"device": {"platform": "gpu", "kind": "NVIDIA", "count": 1}})
  run["setting"]["configs"]["mine"]["cache"]["save"] = "auto"
  (tmp_path / "run.json").write_text(json.dumps(run))
  found = read_rung(tmp_path, "mine")
  assert (found.ran.device, found.ran.config.cache.save, found.max_request_tokens) == ("NVIDIA", "staged", 256)


@pytest.mark.slow
def test_costs_of_this_machine_serve_the_same_in_virtual_time(tmp_path):
  """Nothing is told of how well: in so short a time the device is the noise."""
  file = tmp_path / "cost.json"
  same = [f"--cost={file}", "--limit=3", "--prompt_tokens=200", "--max_new_tokens=60", "--repeats=1"]
  same += [f"--set={change}" for change in SMALL_SERVING]
  late = start("experiments.calibrate", *same, "--rate=2")
  assert late.returncode == 2 and "arrivals.process is poisson" in late.stderr and not file.exists()
  long = start("experiments.calibrate", *same, "--prompt_tokens=1000")
  assert long.returncode == 2 and "and a request has room for 384" in long.stderr and not file.exists()
  fitted = start("experiments.calibrate", *same)
  assert fitted.returncode == 0, fitted.stderr
  about = read_cost(file).about
  assert (about.model, about.dtype) == ("random:tiny", "float32") and about.iterations > 10
  assert json.loads(fitted.stdout.splitlines()[-1])["iterations"] == about.iterations
  made = start("experiments.simulate", *same, "--compare")
  assert made.returncode == 0, made.stderr
  told = json.loads(made.stdout.splitlines()[-1])
  assert list(told) == ["simulated", "measured 1"]
  for key in ("requests", "prompt_tokens", "output_tokens", "blocks_attended"):
    assert told["simulated"][key] == told["measured 1"][key] > 0


def test_iterations_are_read_as_they_were_written():
  one = Iteration(Work(*range(1, 11)), 3, 40, 5, 0.25)
  assert from_columns(json.loads(json.dumps(to_columns([one, one])))) == [one, one]
  with pytest.raises(ValueError, match="iterations lack decode_rows, seconds"):
    from_columns({key: of for key, of in to_columns([one]).items() if key not in ("decode_rows", "seconds")})
