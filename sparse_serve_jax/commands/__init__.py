"""What can be asked from a shell: `sparse-serve NAME ...`, a module of this folder each.

`python -m experiments.NAME` is the same. A command is imported when it is asked for: each defines flags of its own.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import NoReturn

# Title of a group -> name of a command -> what it does. The module of bench-step is `bench_step`.
COMMANDS = {
  "Try it": {
    "demo": "A few rungs of the ladder side by side, on a small model.",
    "generate": "Continue a text.",
    "chat": "Talk with a model in the terminal.",
  },
  "Look": {
    "doctor": "What this machine has, how fast it moves bytes, and what fits.",
    "config": "Every key of a configuration, and what a configuration comes to.",
  },
  "Serve": {
    "serve": "Serve a model over HTTP, in the form of OpenAI's API.",
  },
  "Measure serving": {
    "run": "Serve a workload in this process and measure it.",
    "bench": "Serve a workload by an OpenAI endpoint and measure it.",
    "ladder": "Serve the same requests with every rung, at several rates of arrival.",
    "calibrate": "Fit what an iteration costs, to runs on this machine or to ladders.",
    "simulate": "Serve a workload or a trace in virtual time.",
    "prefix": "What prompts of a trace a prefix cache of a given size would hold.",
  },
  "Measure answers": {
    "accuracy": "What selection methods and budgets cost a model, on generated tasks and text.",
    "longbench": "LongBench through the engine, with its official prompts and scorers.",
  },
  "Measure selections": {
    "selections": "Which blocks decode steps select again, of traces, of a model and drawn ones.",
  },
  "Measure kernels": {
    "bench-kernels": "Every kernel against the bytes it must move.",
    "bench-step": "Whole decode steps against the bytes they must move.",
    "bench-prefill": "Prefill against its products and attention alone.",
  },
  "Results": {
    "plot": "Draw what a folder of results holds, and write its tables.",
  },
  "Train": {
    "train-reference": "Train a small model that retrieves.",
  },
}


def main(name: str | None = None) -> NoReturn:
  """The console script `sparse-serve`, or with a name, one of its commands as a program."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
  from sparse_serve_jax.commands import cli

  name, *arguments = (sys.argv[1:] or ["--help"]) if name is None else [name, *sys.argv[1:]]
  if name in ("--help", "-h", "help"):
    with cli.endings(False, ""):
      print(_help(), flush=True)
      sys.exit(0)
  if name == "--version":
    from sparse_serve_jax import __version__

    with cli.endings(False, ""):
      print(__version__, flush=True)
      sys.exit(0)
  if not any(name in commands for commands in COMMANDS.values()):
    print(f"error: {name!r} is no command; `sparse-serve --help` shows what there is", file=sys.stderr)
    sys.exit(2)
  module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
  if signal.getsignal(signal.SIGINT) is _end:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  sys.exit(module.command([f"sparse-serve {name}", *arguments]))


def _end(*_: object) -> NoReturn:
  """Of an interrupt while modules are imported, which takes a second. Some of JAX's make another error of an exception,
  or abort.
  """
  os.write(2, b"interrupted\n")
  os._exit(128 + signal.SIGINT)


def _help() -> str:
  lines = ["sparse-serve COMMAND [FLAGS]; `sparse-serve COMMAND --help` shows its flags."]
  for title, commands in COMMANDS.items():
    lines += ["", f"{title}:", *(f"  {name:<16} {about}" for name, about in commands.items())]
  return "\n".join(lines)
