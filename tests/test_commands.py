"""The console script: every command is told, found, and the same as its module under `experiments`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_serve_jax import __version__, commands

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for group in commands.COMMANDS.values() for name in group]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
  code = "import sys; from sparse_serve_jax.commands import main; sys.argv[0] = 'sparse-serve'; main()"
  return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_command(arguments):
  done = start(*arguments)
  assert (done.returncode, done.stderr) == (0, "")
  assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == NAMES


def test_the_version():
  assert start("--version").stdout == f"{__version__}\n"


def test_an_unknown_command_is_refused():
  done = start("serv")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "error: 'serv' is no command; `sparse-serve --help` shows what there is\n"


def test_a_command_takes_its_flags_and_says_its_name():
  assert "--rungs" in start("ladder", "--help").stdout
  done = start("ladder", "--nonsense")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nonsense" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_a_module(name):
  assert importlib.util.find_spec(f"sparse_serve_jax.commands.{name.replace('-', '_')}")


def test_every_module_under_experiments_is_a_command():
  for file in (ROOT / "experiments").glob("[!_]*.py"):
    (line,) = [line for line in file.read_text().splitlines() if line.startswith("from ")]
    module = line.split()[1].rpartition(".")[2]
    assert line == f"from sparse_serve_jax.commands.{module} import command"
    assert module.replace("_", "-") in NAMES
