"""The wheel: what is in it, and that commands run from it in another folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sparse_serve_jax.commands import COMMANDS
from tests import forks
from tests.test_simulation import cost

pytest.importorskip("hatchling")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
  """The wheel, made without a network."""
  folder = tmp_path_factory.mktemp("wheel")
  command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (file,) = folder.glob("*.whl")
  return file


def test_what_is_in_it(wheel: Path):
  with zipfile.ZipFile(wheel) as opened:
    names = opened.namelist()
    (told,) = [name for name in names if name.endswith("entry_points.txt")]
    assert opened.read(told).decode().split() == [
      "[console_scripts]",
      "sparse-serve",
      "=",
      "sparse_serve_jax.commands:main",
    ]
  assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sparse_serve_jax", "pallas_kernels"}
  inside = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("sparse_serve_jax/**/*") if path.is_file()}
  inside = {name for name in inside if "__pycache__" not in name}
  configs = {f"sparse_serve_jax/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("configs/*/*.json")}
  assert {"sparse_serve_jax/py.typed", "sparse_serve_jax/commands/doctor.py"} <= inside and len(configs) > 20
  assert inside | configs <= set(names)


SMALL = ["--set=cache.hbm_bytes=8MiB", "--set=cache.dram_bytes=64MiB", "--set=scheduler.max_context=512"]


def test_commands_run_from_it_in_another_folder(wheel: Path, tmp_path: Path):
  site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
  with zipfile.ZipFile(wheel) as opened:
    opened.extractall(site)
  elsewhere.mkdir()
  environment = {name: value for name, value in os.environ.items() if name != "SPARSE_SERVE_REFERENCE"}
  environment |= {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "XDG_DATA_HOME": str(tmp_path / "data")}
  code = "import sparse_serve_jax; print(sparse_serve_jax.__file__)"
  where = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, env=environment)
  assert where.stdout.startswith(str(site))

  made = forks.Forks(forks.OUR_OWN, environment, site)
  run = functools.partial(made.run, "sparse_serve_jax", folder=elsewhere, environment=environment)
  try:
    names = [name for of in COMMANDS.values() for name in of]
    for arguments, line in (
      (["--help"], "sparse-serve COMMAND [FLAGS]"),
      *(([name, "--help"], f"sparse-serve {name}") for name in names),
      (["config", "--list"], "cache.hbm_bytes  size or auto"),
      (["config", "psa"], '"policy": "psa"'),
    ):
      done = run(*arguments)
      assert (done.returncode, done.stderr) == (0, "") and line in done.stdout, done.stderr
    (elsewhere / "trace.jsonl").write_text(
      '{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [0, 1]}\n'
    )
    (elsewhere / "cost.json").write_text(json.dumps(dataclasses.asdict(cost())))
    asked = ["--limit=2", "--prompt_tokens=300", "--max_new_tokens=2", *SMALL]
    for arguments, line in (
      (["generate", "random:tiny", "Hi", "--max_tokens=2", *SMALL], ""),
      (["prefix", "--trace=trace.jsonl"], '"all"'),
      (["simulate", "--cost=cost.json", *asked], '"requests": 2,'),
    ):
      done = run(*arguments)
      assert done.returncode == 0 and line in done.stdout, done.stderr
    done = run("generate", "reference", "Hi")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"copy it to {tmp_path / 'data' / 'sparse_serve_jax' / 'reference'}" in done.stderr
  finally:
    made.close()
