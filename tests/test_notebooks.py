"""Notebooks as they are stored, and as they run: each in a process of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbformat")
pytest.importorskip("matplotlib")

import matplotlib as mpl
from matplotlib import pyplot as plt

from tests.forks import start
from tests.tiny import SMALL_SERVING
from tools import render_notebooks

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, RENDERED = sorted((ROOT / "notebooks").glob("*.ipynb")), ROOT / "docs" / "notebooks"


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
def test_notebooks_run_and_show_their_plots(path: Path, optimized):
  """Rendered where the site has them, so `make docs` need not do it again. A cell that raises ends the test."""
  text = render_notebooks.render(path, RENDERED).read_text(encoding="utf-8")
  shown = re.findall(r"!\[png\]\((.+?)\)", text)
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  sources = ["".join(cell["source"]) for cell in cells]
  always = sum(bool(re.search(r"^plt\.show\(\)", source, re.M)) for source in sources)
  assert 4 <= always <= len(shown) == len(set(shown)) <= sum("plt.show()" in source for source in sources)
  assert all((RENDERED / file).stat().st_size > 5_000 for file in shown)
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


def run_results(monkeypatch, mine: Path | None = None) -> dict[str, Any]:
  """What notebook 03 defines, with MINE set."""
  monkeypatch.chdir(NOTEBOOKS[0].parent)
  cells = json.loads(Path("03_results.ipynb").read_text(encoding="utf-8"))["cells"]
  code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
  assert code.count("\nMINE = None") == 1
  with mpl.rc_context():
    plt.switch_backend("agg")
    exec(compile(code.replace("\nMINE = None", f"\nMINE = {mine and str(mine)!r}"), "03_results", "exec"), found := {})
    plt.close("all")
  return found


def test_the_committed_ladder_is_drawn(monkeypatch):
  """They lie a folder deeper than what a command writes; the one at most rates, with the goodput its table tells."""
  found = run_results(monkeypatch)
  table = found["ladder"].with_name("results.md").read_text(encoding="utf-8")
  told = re.findall(r"^goodput of (\w+): (?:below )?([\d.]+) requests/s(, the lowest)?", table, re.M)
  assert len(told) >= 2 and [rung for rung, _, _ in told] == found["rungs"]
  assert found["goodput"] == [0 if none else pytest.approx(float(rate), abs=0.01) for _, rate, none in told]
  assert list(found["kernels"]) == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]


@pytest.mark.slow
def test_what_commands_write_is_drawn(tmp_path, monkeypatch):
  """In the folder of --out, or in one that holds several; a section without rows of one's own shows the others."""
  small = [f"--set={change}" for change in SMALL_SERVING]
  asked = "--model=random:tiny --rungs=sparse_serve --limit=2 --prompt_tokens=300 --max_new_tokens=3"
  answers = "--model=random:tiny --parts=tasks --tasks=copy --lengths=512 --instances=2 --steps=130 --thresholds=0.9"
  for name, *arguments in (
    ("ladder", *asked.split(), "--rates=20,30", *small, f"--out={tmp_path / 'ladder'}"),
    ("accuracy", *answers.split(), "--methods=cuboid_mean", "--budgets=64", f"--out={tmp_path / 'accuracy'}"),
    ("bench_kernels", "--smoke", "--ops=score", f"--out={tmp_path / 'bench'}"),
  ):
    done = start(f"experiments.{name}", *arguments)
    assert done.returncode == 0, done.stderr
  found = run_results(monkeypatch, tmp_path)
  assert found["ladder"] == tmp_path / "ladder" / "cells.jsonl" and len(found["cells"]) == 2
  assert found["accuracies"] == json.loads((tmp_path / "accuracy" / "summary.json").read_text())["accuracies"]
  assert list(found["kernels"]) == ["cpu"] and found["texts"] and found["steps"][0]["device"] == "NVIDIA H200"
  found = run_results(monkeypatch, tmp_path / "ladder")
  assert found["ladder"] == tmp_path / "ladder" / "cells.jsonl"
  assert len(found["kernels"]) == 2 and len(found["accuracies"]) > 100
