"""A process that has imported what tests import, and forks for each copy of the source that it is to test.

A line of its standard input is {"folder": ..., "tests": [...], "out": ...}: the tests are run there, and what pytest
prints goes to the file. A line of its standard output is pytest's exit status. What is imported here is imported once,
and not for each copy: it takes longer than most of the tests.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

IMPORTED = ("numpy", "pytest", "hypothesis", "beartype", "jaxtyping", "jax", "jax.numpy", "flax.struct", "tokenizers")
OPTIONS = ["-q", "-rf", "--tb=no", "-p", "no:cacheprovider"]


def test(folder: str, tests: list[str], out: str) -> int:
  import pytest

  os.chdir(folder)
  sys.path.insert(0, folder)
  file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  for stream in (1, 2):
    os.dup2(file, stream)
  return int(pytest.main([*OPTIONS, f"--rootdir={folder}", *tests]))


def main() -> None:
  for name in IMPORTED:
    importlib.import_module(name)
  for line in sys.stdin:
    child = os.fork()
    if not child:
      status = 1
      try:
        status = test(**json.loads(line))
      finally:
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
  main()
