"""Runs notebooks and writes them, outputs and all, as Markdown with images: `make notebooks`.

python tools/render_notebooks.py docs/notebooks                 all of notebooks/
python tools/render_notebooks.py /tmp/out notebooks/01_*.ipynb
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

TIMEOUT_S = 300  # of a cell


def render(notebook: Path, folder: Path) -> Path:
  """Runs a notebook in a process of its own, with the folder that it lies in as the working directory.

  Args:
    notebook: a file, which stays as it is.
    folder: gets NAME.md and, in NAME_files, its images.

  Returns:
    The file NAME.md.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell raised.
  """
  made = nbformat.read(notebook, as_version=4)
  at = {"metadata": {"path": str(notebook.parent)}}
  NotebookClient(made, timeout=TIMEOUT_S, resources=at).execute()
  files = f"{notebook.stem}_files"
  text, resources = MarkdownExporter().from_notebook_node(made, {"output_files_dir": files, "unique_key": "plot"})
  (folder / files).mkdir(parents=True, exist_ok=True)
  for name, data in resources["outputs"].items():
    (folder / name).write_bytes(data)
  out = folder / f"{notebook.stem}.md"
  out.write_text(text, encoding="utf-8")
  return out


def main(folder: str, *notebooks: str) -> None:
  for path in notebooks or sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb")):
    print(render(Path(path), Path(folder)))


if __name__ == "__main__":
  if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
  main(*sys.argv[1:])
