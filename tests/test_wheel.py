"""The wheel: what is in it, and that commands run from it in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_commands_run_from_it_in_another_folder(wheel: Path, tmp_path: Path):
  site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
  with zipfile.ZipFile(wheel) as opened:
    opened.extractall(site)
  elsewhere.mkdir()
  environment = {name: value for name, value in os.environ.items() if name != "SPARSE_SERVE_REFERENCE"}
  environment |= {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "XDG_DATA_HOME": str(tmp_path / "data")}

  def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparse_serve_jax", *arguments]
    return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env=environment)

  code = "import sparse_serve_jax; print(sparse_serve_jax.__file__)"
  where = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, env=environment)
  assert where.stdout.startswith(str(site))
  for arguments, line in (
    (["--help"], "sparse-serve COMMAND [FLAGS]"),
    (["config", "--list"], "cache.hbm_bytes  size or auto"),
    (["config", "psa"], '"policy": "psa"'),
  ):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "") and line in done.stdout
  done = run("generate", "reference", "Hi")
  assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
  assert f"copy it to {tmp_path / 'data' / 'sparse_serve_jax' / 'reference'}" in done.stderr
