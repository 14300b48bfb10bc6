"""Self-written rows, predictions and folders in LongBench's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_serve_jax.models import ByteTokenizer
from tests import jsonl

ROOT = Path(__file__).resolve().parent.parent
BYTES = ByteTokenizer()
BOS, EOS, NEWLINE = BYTES.bos_token_id, BYTES.eos_token_ids[0], 10
TEMPLATES = {
  "qasper": "Paper: {context}\n\n Question: {input}\nAnswer:",
  "samsum": "Examples.\n{context}\n\n{input}",
  "trec": "{context}\n{input}",
  "lcc": "{context}Next line:\n",
}
MAX_NEW = {"qasper": 6, "samsum": 8, "trec": 5, "lcc": 4}


def row_of(i: int, **changes: Any) -> dict[str, Any]:
  given = {"context": f"barge {i} " * (i + 1), "input": f"which {i}?", "answers": [f"barge {i}"]}
  return given | {"all_classes": ["barge", "pier"], "length": 1000 * i} | changes


def write_release(folder: Path, **n_rows: int) -> Path:
  """A folder in LongBench's layout, with so many self-written rows for each named file."""
  (folder / "config").mkdir(parents=True)
  (folder / "data").mkdir()
  (folder / "config" / "dataset2prompt.json").write_text(json.dumps(TEMPLATES))
  (folder / "config" / "dataset2maxlen.json").write_text(json.dumps(MAX_NEW))
  for name, n in n_rows.items():
    jsonl.write(folder / "data" / f"{name}.jsonl", [row_of(i) for i in range(n)])
  return folder


def predicted(pred: str, *answers: str, classes: list[str] | None = None, length: int = 0) -> dict[str, Any]:
  return {"pred": pred, "answers": list(answers), "all_classes": classes, "length": length}
