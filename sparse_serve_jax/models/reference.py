"""Where the reference model lies: it is in the project's sources, and not in an installed package."""

from __future__ import annotations

import os
import pathlib

NAMES = ("reference", "models/reference")
FOLDER = "SPARSE_SERVE_REFERENCE"  # an environment variable


def is_meant(name: str) -> bool:
  """Whether a name stands for the reference model wherever it lies: no model of that name is in this folder."""
  return name.rstrip("/") in NAMES and not (pathlib.Path(name) / "config.json").exists()


def find() -> pathlib.Path:
  """The folder of the reference model: what the environment says, else of this checkout, else of the user's data.

  Raises:
    ValueError: it is nowhere; says where it was looked for, and where to get it.
  """
  told = os.environ.get(FOLDER)
  data = pathlib.Path(os.environ.get("XDG_DATA_HOME") or pathlib.Path.home() / ".local" / "share")
  checkout = pathlib.Path(__file__).resolve().parents[2] / "models" / "reference"
  places = [pathlib.Path(told)] if told else [checkout, data / "sparse_serve_jax" / "reference"]
  for place in places:
    if (place / "config.json").is_file():
      return place
  raise ValueError(
    f"the reference model is not in {' or '.join(map(str, places))}: it is the folder models/reference of the "
    f"project's sources; copy it to {data / 'sparse_serve_jax' / 'reference'}, or let ${FOLDER} name it"
  )


def file(path: str) -> pathlib.Path:
  """A file; one of models/reference is of the reference model, wherever that lies."""
  inside = path.removeprefix("models/reference/")
  return pathlib.Path(path) if inside == path or pathlib.Path(path).exists() else find() / inside
