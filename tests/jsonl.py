"""Files with one JSON object a line: what commands write, and what people bring."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
  with file.open(encoding="utf-8") as lines:
    return [json.loads(line) for line in lines]


def write(file: Path, rows: Iterable[Mapping[str, Any]], ensure_ascii: bool = False) -> Path:
  """Half of a surrogate pair can only be written with `ensure_ascii`, as an escape."""
  file.write_text("".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows), encoding="utf-8")
  return file
