"""The tests notice mistakes: each mutation fails the test that it names, which passes without it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
PARTS = 2  # of the mutations, for processes that run beside each other


def copy_source(to: Path) -> Path:
  for name in ("pallas_kernels", "sparse_serve_jax", "tests"):
    ignored = shutil.ignore_patterns("__pycache__", "goldens")
    shutil.copytree(ROOT / name, to / name, ignore=ignored)
  shutil.copy(ROOT / "pyproject.toml", to)
  return to


class Mutants:
  """Runs tests of copies of the source, one after another, in forks of one process."""

  def __init__(self):
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing them takes longer than the tests
    env["PYTHONWARNINGS"] = "ignore:os.fork:RuntimeWarning"  # no thread of jax has begun
    command = [sys.executable, str(ROOT / "tests" / "mutants.py")]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

  def failed(self, folder: Path, tests: Sequence[str]) -> set[str]:
    """Those of the tests that fail. A test that is not found, or an import that fails, is an error here."""
    out = folder / "out.txt"
    assert self._process.stdin and self._process.stdout
    self._process.stdin.write(json.dumps({"folder": str(folder), "tests": list(tests), "out": str(out)}) + "\n")
    self._process.stdin.flush()
    status, said = self._process.stdout.readline().strip(), out.read_text()
    assert status in ("0", "1"), said
    lines = said.splitlines()
    # "3 failed, 1 passed in 2s": what ran is what was asked for
    words = lines[-1].replace(",", "").split()
    assert sum(int(n) for n, what in itertools.pairwise(words) if what in ("passed", "failed")) == len(tests), said
    return {line.removeprefix("FAILED ").partition(" - ")[0] for line in lines if line.startswith("FAILED ")}

  def close(self) -> None:
    self._process.communicate()  # ends its input, waits for it and closes its pipes


@pytest.fixture
def mutants() -> Iterator[Mutants]:
  mutants = Mutants()
  yield mutants
  mutants.close()


def caught(mutants: Mutants, mutation: Mutation, folder: Path) -> bool:
  path = copy_source(folder) / mutation.file
  source = path.read_text()
  assert source.count(mutation.old) == 1, f"{mutation.name}: {source.count(mutation.old)} places in {mutation.file}"
  path.write_text(source.replace(mutation.old, mutation.new))
  return mutants.failed(folder, mutation.tests) == set(mutation.tests)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
def test_every_mutation_is_caught(mutants: Mutants, tmp_path: Path, part: int):
  mutations = MUTATIONS[part::PARTS]
  found = [caught(mutants, mutation, tmp_path / str(i)) for i, mutation in enumerate(mutations)]
  assert [mutation.name for mutation, yes in zip(mutations, found, strict=True) if not yes] == []


@pytest.mark.soak
def test_the_source_itself_passes(mutants: Mutants, tmp_path: Path):
  tests = sorted({test for mutation in MUTATIONS for test in mutation.tests})
  assert mutants.failed(copy_source(tmp_path / "copy"), tests) == set()
