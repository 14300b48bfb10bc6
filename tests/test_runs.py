"""The runs that measure the papers' results: each line of experiments/workloads/README.md, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from sparse_serve_jax.config import load_config, override
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import load_model
from tests.forks import ROOT, start

GROUPS = [
  [shlex.split(line)[1:] for line in block.splitlines()]
  for block in re.findall(
    r"^```\n(.*?)^```", (ROOT / "experiments" / "workloads" / "README.md").read_text(encoding="utf-8"), re.M | re.S
  )
]
FOLDERS = {line[-1].rpartition("/")[2]: line for group in GROUPS for line in group if line[-1].startswith("--out=OUT/")}
SMALL = {
  "ladder": [
    *("--model=random:tiny", "--limit=3", "--prompt_tokens=300", "--max_new_tokens=9"),
    *(
      f"--set={change}"
      for change in (
        *("cache.dram_bytes=4MiB", "cache.hbm_bytes=2MiB", "cache.lanes=4", "scheduler.max_batch=4"),
        *("sparse.token_budget=128", "sparse.sink_tokens=8", "sparse.window_tokens=16", "scheduler.max_context=384"),
      )
    ),
  ],
  "bench-step": ["--smoke", "--steps=2", "--set=cache.hbm_bytes=2MiB", "--set=sparse.token_budget=192"],
  "bench-prefill": ["--smoke"],
  "bench-kernels": ["--smoke"],
  "calibrate": [],
  "simulate": [],
}


def run(line: list[str], out: Path) -> dict:
  """The last line of what a command prints."""
  name, *arguments = line
  small = list(SMALL[name])
  if "--rates=0" not in arguments and name == "ladder":
    small.append("--rates=20")
  if any(argument.startswith("--set=tp=") for argument in arguments):
    small.append("--set=tp=2")  # devices of a test
  given = [argument.replace("OUT", str(out)) for argument in arguments if argument != "--overload"]
  done = start(f"experiments.{name.replace('-', '_')}", *given, *small)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_every_line_parses():
  for name in {line[0] for group in GROUPS for line in group}:
    lines = [(line[1:], True) for group in GROUPS for line in group if line[0] == name]
    done = start("tests.parsed", name, json.dumps(lines))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_bursts_and_what_their_costs_predict(tmp_path):
  """A fit to two bursts, of all four. In so short a time the device is the noise: nothing is told of how well, and a
  floor of rates that were measured while others ran may lie above the time."""
  bursts, (fits, compares) = GROUPS[0], GROUPS[1]
  for line in bursts:
    told = run(line, tmp_path)
    assert all(0 < of["floor_share"]["0"] < 10 and of["ttft_mean_s"]["0"] > 0 for of in told.values())
  assert run(fits, tmp_path)["iterations"] > 10
  assert len(run(compares, tmp_path)) == 8


# Others differ from these by values only: `make soak` runs them.
ONE_OF_EACH = {"arrivals", "kernels", "crossover"}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.soak)
    for name in FOLDERS
    if name not in ("W1", "W2", "W3", "W4")
  ],
)
def test_a_run(name, tmp_path):
  told, line = run(FOLDERS[name], tmp_path), FOLDERS[name]
  if line[0] == "ladder":
    rungs = [line for line in (tmp_path / name / "results.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rungs) >= len(told) > 0
  else:
    assert told and not any("error" in row for row in told.values())
  keys = {"loads": "loading_share", "prefill": "times_hbm_pool", "kernels": "times_whole", "crossover": "times_sparse"}
  assert name not in keys or any(keys[name] in row for row in told.values())


@pytest.mark.parametrize("name", [name for name, line in FOLDERS.items() if line[0] == "ladder"])
def test_every_rung_has_room_for_the_longest_request(name):
  """On the machine that a run is meant for, of which no run takes more than 89 GiB of the host, but on four GPUs."""
  line = FOLDERS[name]
  files = [argument.partition("=")[2] for argument in line if argument.startswith("--flagfile=")]
  given = [*(flag for file in files for flag in (ROOT / file).read_text().splitlines()), *line]
  changes = [argument.removeprefix("--set=") for argument in given if argument.startswith("--set=")]
  values = dict(
    argument[2:].split("=", 1) for argument in given if re.match("--(model|rungs|prompt_tokens|max_new)", argument)
  )
  model = load_model(values["model"]).config
  varied = [argument.removeprefix("--vary=").partition(",")[0] for argument in given if argument.startswith("--vary=")]
  longest = int(values.get("prompt_tokens", 32000)) + int(values.get("max_new_tokens", 2048))
  for rung in values["rungs"].split(","):
    shape = CacheShape.of(model, override(load_config(rung), [*changes, *varied]), 2)
    assert shape.max_context >= longest and (shape.pool_bytes <= 89 << 30 or "70b" in name)
