"""The tests notice mistakes: each mutation fails the test that it names, which passes without it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent


def copy_source(to: Path) -> Path:
  for name in ("pallas_kernels", "sparse_serve_jax", "tests"):
    ignored = shutil.ignore_patterns("__pycache__", "goldens")
    shutil.copytree(ROOT / name, to / name, ignore=ignored)
  shutil.copy(ROOT / "pyproject.toml", to)
  return to


def failed(folder: Path, tests: Sequence[str]) -> set[str]:
  """Runs tests of a copy; those that fail. A test that is not found, or an import that fails, is an error here."""
  env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
  env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing them takes longer than the tests
  command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", *tests]
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
  assert done.returncode in (0, 1), done.stdout + done.stderr
  lines = done.stdout.splitlines()
  # "3 failed, 1 passed in 2s": what ran is what was asked for
  words = lines[-1].replace(",", "").split()
  assert sum(int(n) for n, what in itertools.pairwise(words) if what in ("passed", "failed")) == len(tests)
  return {line.removeprefix("FAILED ").partition(" - ")[0] for line in lines if line.startswith("FAILED ")}


def caught(mutation: Mutation, folder: Path) -> bool:
  path = copy_source(folder) / mutation.file
  source = path.read_text()
  assert source.count(mutation.old) == 1, f"{mutation.name}: {source.count(mutation.old)} places in {mutation.file}"
  path.write_text(source.replace(mutation.old, mutation.new))
  return failed(folder, mutation.tests) == set(mutation.tests)


@pytest.mark.slow
def test_every_mutation_is_caught(tmp_path: Path):
  with ThreadPoolExecutor(2) as pool:
    folders = [tmp_path / str(i) for i in range(len(MUTATIONS))]
    found = list(pool.map(caught, MUTATIONS, folders))
  assert [mutation.name for mutation, yes in zip(MUTATIONS, found, strict=True) if not yes] == []


@pytest.mark.slow
def test_the_source_itself_passes(tmp_path: Path):
  tests = sorted({test for mutation in MUTATIONS for test in mutation.tests})
  assert failed(copy_source(tmp_path / "copy"), tests) == set()
