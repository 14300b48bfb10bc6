"""Notebooks as they are stored, and as they run: each in a process of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbformat")

from tools import render_notebooks

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def faults(notebook: dict[str, Any]) -> list[str]:
  """What a stored notebook has too much or too little of."""
  found, before = [], {"cell_type": "code"}
  for i, cell in enumerate(notebook["cells"]):
    text = "".join(cell["source"])
    if cell["cell_type"] == "code":
      if cell["outputs"] or cell["execution_count"] is not None:
        found.append(f"cell {i} has outputs or a count")
      if "plt.show()" in text:
        if before["cell_type"] != "markdown" or not re.search(r"\*See\b[^*]+\*", "".join(before["source"])):
          found.append(f"cell {i} plots, and no sentence before it says what to see")
      elif "plt.subplots" in text:
        found.append(f"cell {i} draws what it does not show")
      if re.search(r"\b_[a-z]|\._", re.sub(r"\bfor _ in\b", "", text)):
        found.append(f"cell {i} uses a private name")
    before = cell
  return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_bare_and_say_what_to_see(path: Path):
  notebook = json.loads(path.read_text(encoding="utf-8"))
  assert not faults(notebook)
  assert any("plt.show()" in "".join(cell["source"]) for cell in notebook["cells"])
  assert notebook["cells"][0]["source"][0].startswith("# ")
  assert set(notebook["metadata"]) == {"kernelspec", "language_info"}  # nothing of who ran it


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_show_their_plots(path: Path, tmp_path: Path, optimized):
  """Rendered as the site has them. A cell that raises ends the test."""
  text = render_notebooks.render(path, tmp_path).read_text(encoding="utf-8")
  shown = re.findall(r"!\[png\]\((.+?)\)", text)
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  sources = ["".join(cell["source"]) for cell in cells]
  always = sum(bool(re.search(r"^plt\.show\(\)", source, re.M)) for source in sources)
  assert 4 <= always <= len(shown) == len(set(shown)) <= sum("plt.show()" in source for source in sources)
  assert all((tmp_path / file).stat().st_size > 5_000 for file in shown)
  assert "Warning" not in text


def test_faults_are_found():
  def code(text: str, **more) -> dict[str, Any]:
    return {"cell_type": "code", "source": [text], "outputs": [], "execution_count": None, **more}

  said = {"cell_type": "markdown", "source": ["*See that it rises.*"]}
  assert not faults({"cells": [said, code("plt.show()"), code("x = 1")]})
  for cells, fault in (
    ([code("plt.show()")], "no sentence"),
    ([said, code("x = 1"), code("plt.show()")], "no sentence"),
    ([{"cell_type": "markdown", "source": ["Here is a plot."]}, code("plt.show()")], "no sentence"),
    ([code("x", outputs=[{}])], "outputs"),
    ([code("x", execution_count=3)], "count"),
    ([code("llm.engine._scheduler")], "private"),
    ([said, code("figure, axes = plt.subplots()")], "does not show"),
  ):
    (told,) = faults({"cells": cells})
    assert fault in told
