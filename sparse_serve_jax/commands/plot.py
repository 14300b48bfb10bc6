"""Draws what a folder of results holds, and writes its tables.

  sparse-serve plot DIR [--out=DIR]

A folder of a ladder, an accuracy experiment, a run of a workload, here or by an endpoint, benchmarks or selections:
pictures as .png, tables as Markdown and CSV. Nothing is measured anew. The last line of stdout is a JSON object: the
files that were written.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NoReturn

from sparse_serve_jax import results
from sparse_serve_jax.commands import cli

_OUT = cli.define_out("Folder of pictures and tables; by default the folder of the results.", required=False)
_VERBOSE = cli.define_verbose()


def main(folder: str | None = None) -> None:
  if folder is None:
    raise ValueError("which folder? `plot DIR` draws what DIR holds")
  try:
    from sparse_serve_jax.plots import folder as drawing  # slow to import
  except ImportError as error:
    raise ValueError(f"plots need the packages of '.[eval]': {error}") from None
  source = pathlib.Path(folder)
  if not source.is_dir():
    raise ValueError(f"{source} is no folder")
  written = drawing.draw(source, results.make_folder(_OUT.value or source))
  cli.end_with("\n".join(map(str, written)), {"files": [str(file) for file in written]})


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, arguments=["DIR"], argv=argv)
