"""The tests notice mistakes: each mutation fails the test that it names, which passes without it."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.forks import Forks
from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ("numpy", "pytest", "hypothesis", "beartype", "jaxtyping", "jax", "jax.numpy", "flax.struct", "tokenizers")
OPTIONS = ("-q", "-rf", "--tb=no", "-p", "no:cacheprovider")


def copy_source(to: Path) -> Path:
  for name in ("pallas_kernels", "sparse_serve_jax", "tests", "configs"):
    ignored = shutil.ignore_patterns("__pycache__", "goldens")
    shutil.copytree(ROOT / name, to / name, ignore=ignored)
  shutil.copy(ROOT / "pyproject.toml", to)
  return to


class Mutants:
  """Runs tests of copies of the source, one after another."""

  def __init__(self):
    self._environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    self._environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing them takes longer than the tests
    self._forks = Forks(IMPORTED, self._environment)

  def failed(self, folder: Path, tests: Sequence[str]) -> set[str]:
    """Those of the tests that fail. A test that is not found, or an import that fails, is an error here."""
    arguments = *OPTIONS, f"--rootdir={folder}", *tests
    done = self._forks.run("pytest", *arguments, folder=folder, environment=self._environment)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    # "3 failed, 1 passed in 2s": what ran is what was asked for
    words = lines[-1].replace(",", "").split()
    ran = sum(int(n) for n, what in itertools.pairwise(words) if what in ("passed", "failed"))
    assert ran == len(tests), done.stdout
    return {line.removeprefix("FAILED ").partition(" - ")[0] for line in lines if line.startswith("FAILED ")}

  def close(self) -> None:
    self._forks.close()


@pytest.fixture
def mutants() -> Iterator[Mutants]:
  mutants = Mutants()
  yield mutants
  mutants.close()


def places(mutation: Mutation) -> int:
  return (ROOT / mutation.file).read_text().count(mutation.old)


def test_every_mutation_has_its_place():
  """One only, so that a change of the source changes its mutation too, before the soak is run."""
  assert {mutation.name: places(mutation) for mutation in MUTATIONS if places(mutation) != 1} == {}


def caught(mutants: Mutants, mutation: Mutation, folder: Path) -> bool:
  path = copy_source(folder) / mutation.file
  path.write_text(path.read_text().replace(mutation.old, mutation.new))
  return mutants.failed(folder, mutation.tests) == set(mutation.tests)


@pytest.mark.soak
def test_every_mutation_is_caught(mutants: Mutants, tmp_path: Path):
  found = [caught(mutants, mutation, tmp_path / str(i)) for i, mutation in enumerate(MUTATIONS)]
  assert [mutation.name for mutation, yes in zip(MUTATIONS, found, strict=True) if not yes] == []


@pytest.mark.soak
def test_the_source_itself_passes(mutants: Mutants, tmp_path: Path):
  tests = sorted({test for mutation in MUTATIONS for test in mutation.tests})
  assert mutants.failed(copy_source(tmp_path / "copy"), tests) == set()
