"""Command lines of documents, parsed as their command does: python -m tests.parsed NAME JSON.

NAME is of `sparse-serve NAME`, JSON a list of [arguments, whether they are the whole line]. What is only a part of a
line gets the flags that the command wants besides.
"""

from __future__ import annotations

import importlib
import json
import sys

from absl import flags

from sparse_serve_jax.attention.methods import METHODS
from sparse_serve_jax.commands import COMMANDS
from sparse_serve_jax.config import find_config, load_config, override
from sparse_serve_jax.tasks import TASKS

NAMES = {name for group in COMMANDS.values() for name in group}
BESIDES = {"model": "DIR", "out": "OUT", "longbench_dir": "DIR", "trace": "FILE", "cost": "FILE", "commit": "0"}
BESIDES |= {"url": "http://127.0.0.1:1", "tokenizer": "DIR"}
PLACES = {"DIR", "OUT", "FILE", "NAME", "models/reference"}  # what the reader puts in, and a model that is there


def check(name: str, arguments: list[str], whole: bool) -> None:
  """Raises what is wrong with a line."""
  values = flags.FLAGS
  values.unparse_flags()
  besides = [] if whole else [f"--{flag}={value}" for flag, value in BESIDES.items() if flag in values]
  rest = values([name, *besides, *arguments])[1:]
  if not set(rest[:1] if name == "generate" else rest) <= PLACES:  # its second one is a text
    raise ValueError(f"{name}: {rest} are no flags")
  given = {flag: values[flag].value for flag in values if values[flag].present or flag == "config"}
  if "set" in values and "train" not in name:
    configs = given.get("rungs") or [values["config"].value] if "config" in values else given.get("rungs", ["psa"])
    for config in configs:
      varied = [of.partition(",")[0] for of in given.get("vary", [])]
      override(load_config(config), [*given.get("set", []), *varied])
  for flag, known in (("tasks", TASKS), ("methods", METHODS)):
    if name == "accuracy" and (unknown := set(given.get(flag) or ()) - {*known, *PLACES, "all"}):
      raise ValueError(f"--{flag}: {unknown}")
  if (model := given.get("model") or "").startswith("random:"):
    find_config("models", model.removeprefix("random:"))


def main(name: str, lines: str) -> None:
  if name not in NAMES:
    sys.exit(f"{name!r} is no command")
  importlib.import_module(f"sparse_serve_jax.commands.{name.replace('-', '_')}")
  for arguments, whole in json.loads(lines):
    try:
      check(name, arguments, whole)
    except (ValueError, flags.Error) as error:
      sys.exit(f"{name} {' '.join(arguments)}: {error}")


if __name__ == "__main__":
  main(*sys.argv[1:])
