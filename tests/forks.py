"""`python -m MODULE` in forks of a process that has imported what it will import: that takes longer than most runs.

A line of standard input is {"module": ..., "arguments": [...], "folder": ..., "environment": {...}, "out": [file of its
output, file of its errors]}: the module runs there. A line of standard output is its exit status. Modules whose
imports are tested, or that wait for signals, are started without it.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUR_OWN = ("jax.numpy", "absl.app", "sparse_serve_jax.serving.engine", "sparse_serve_jax.evaluation.accuracy")


class Forks:
  """Runs modules one after another, in forks of one process."""

  def __init__(self, imported: Sequence[str], environment: Mapping[str, str] = os.environ, root: Path = ROOT):
    """`root`: where the packages are."""
    command = [sys.executable, __file__, str(root), *imported]
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment)
    )

  def run(
    self, module: str, *arguments: str, folder: Path = ROOT, environment: Mapping[str, str] = os.environ
  ) -> subprocess.CompletedProcess[str]:
    assert self._process.stdin and self._process.stdout
    with tempfile.TemporaryDirectory(prefix="forks-") as made:
      out = [f"{made}/out", f"{made}/err"]
      asked = dict(module=module, arguments=arguments, folder=str(folder), environment=dict(environment), out=out)
      self._process.stdin.write(json.dumps(asked) + "\n")
      self._process.stdin.flush()
      status = self._process.stdout.readline()
      assert status, "the process that forks has ended"
      said, errors = (Path(file).read_text() for file in out)
    return subprocess.CompletedProcess([module, *arguments], int(status), said, errors)

  def close(self) -> None:
    self._process.communicate()  # ends its input, waits for it and closes its pipes


def start(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
  """Runs one of the project's commands on the CPU."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
  # JAX reads these when it is imported.
  forks = _forks(tuple(sorted((name, of) for name, of in environment.items() if name.startswith("JAX_"))))
  return forks.run(module, *arguments, environment=environment)


@functools.cache
def _forks(of_jax: tuple[tuple[str, str], ...]) -> Forks:
  others = {name: of for name, of in os.environ.items() if not name.startswith("JAX_")}
  forks = Forks(OUR_OWN, {**others, **dict(of_jax)})
  atexit.register(forks.close)
  return forks


def _become(module: str, arguments: list[str], folder: str, environment: dict[str, str], out: list[str]) -> None:
  """What a new process is before it runs the module."""
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.chdir(folder)
  os.environ.clear()
  os.environ.update(environment)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for stream, file in enumerate(out, 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
  faulthandler.enable()
  sys.path[0] = folder
  sys.argv = [module, *arguments]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle, which then ends the input
  sys.path[0] = sys.argv[1]
  for name in sys.argv[2:]:
    importlib.import_module(name)
  gc.freeze()  # what has been imported stays, and is not looked through in each fork
  for line in sys.stdin:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # no thread of jax has begun
      child = os.fork()
    if not child:
      return _become(**json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
  main()
