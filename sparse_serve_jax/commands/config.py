"""Every key of a serving configuration, or what one configuration comes to.

  sparse-serve config --list
  sparse-serve config psa --set sparse.threshold=0.9

NAME is one of configs/serving or a JSON file. What it extends and --set are applied; it is printed as such a file.
Sizes that are "auto" are derived from the devices where a model is loaded: `sparse-serve doctor MODEL` says them.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import NoReturn

from absl import flags

from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import EngineConfig, describe, load_config, override, shipped, to_json

with cli.group("What is shown"):
  _LIST = flags.DEFINE_bool("list", False, "Show all keys with type, default and meaning, and the names there are.")
  _SET = flags.DEFINE_multi_string("set", [], "Overrides of the configuration, such as cache.hbm_bytes=8GiB.")
_VERBOSE = cli.define_verbose()


def main(name: str | None = None) -> None:
  if _LIST.value and (name or _SET.value):
    raise ValueError("--list shows all keys: it takes no name and no --set")
  if _LIST.value:
    print("\n".join(_listed()))
  elif name is None:
    raise ValueError(f"which? there are {', '.join(shipped('serving'))}; --list shows every key")
  else:
    print(to_json(override(load_config(name), _SET.value)))


def _listed() -> Iterator[str]:
  """Lines on every key, and the names of configurations."""
  for row in describe(EngineConfig):
    yield f"{row.key}  {row.type} (default: {json.dumps(row.default)})"
    yield from textwrap.wrap(row.meaning, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
  yield ""
  yield from textwrap.wrap(f"configurations: {', '.join(shipped('serving'))}", 100, subsequent_indent="  ")


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, ["NAME"], argv=argv)
