"""The shape of the code: which room may look into which, and how large a room may grow. Read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sparse_serve_jax"

# Imports go down: a room imports its own rank and lower ones. The package, whose `__init__` offers LLM, is a room too.
RANKS = {
  "pallas_kernels": 0,
  f"{PACKAGE}.config": 1,
  f"{PACKAGE}.runtime": 1,
  f"{PACKAGE}.mesh": 1,
  f"{PACKAGE}.processes": 1,
  f"{PACKAGE}.progress": 1,
  f"{PACKAGE}.cluster": 1,
  f"{PACKAGE}.hosts": 1,
  f"{PACKAGE}.variants": 1,
  f"{PACKAGE}.files": 1,
  f"{PACKAGE}.tokenizing": 1,
  f"{PACKAGE}.sampling_params": 1,
  f"{PACKAGE}.tasks": 1,
  f"{PACKAGE}.workloads": 2,
  f"{PACKAGE}.buckets": 2,
  f"{PACKAGE}.detokenizer": 2,
  f"{PACKAGE}.prompting": 2,
  f"{PACKAGE}.models": 3,
  f"{PACKAGE}.attention": 3,
  f"{PACKAGE}.memory": 3,
  f"{PACKAGE}.step": 4,
  f"{PACKAGE}.programs": 4,
  f"{PACKAGE}.serving": 5,
  f"{PACKAGE}.simulation": 6,
  f"{PACKAGE}.outputs": 6,
  f"{PACKAGE}.llm": 6,
  PACKAGE: 7,
  f"{PACKAGE}.results": 8,
  f"{PACKAGE}.server": 8,
  f"{PACKAGE}.training": 8,
  f"{PACKAGE}.evaluation": 9,
  f"{PACKAGE}.ladder": 10,
  f"{PACKAGE}.benchmarks": 9,
  f"{PACKAGE}.plots": 11,
  f"{PACKAGE}.commands": 12,
  f"{PACKAGE}.__main__": 13,
  "experiments": 13,
}

# Scheduling runs without a device, so that a simulator can stand in for it.
WITHOUT_JAX = [
  f"{PACKAGE}.serving.scheduler",
  f"{PACKAGE}.serving.request",
  f"{PACKAGE}.serving.plan",
  f"{PACKAGE}.serving.metrics",
  f"{PACKAGE}.serving.audit",
  f"{PACKAGE}.serving.clock",
  f"{PACKAGE}.serving.run",
  f"{PACKAGE}.serving.loop",
  f"{PACKAGE}.serving.timeline",
  f"{PACKAGE}.memory.allocator",
  f"{PACKAGE}.memory.prefix",
  f"{PACKAGE}.tasks",
  f"{PACKAGE}.workloads",
  f"{PACKAGE}.serving.engine",
  f"{PACKAGE}.simulation.cost",
  f"{PACKAGE}.simulation.reuse",
  f"{PACKAGE}.simulation.executor",
  f"{PACKAGE}.simulation.prefix",
  f"{PACKAGE}.memory.layout",
  f"{PACKAGE}.memory.shape",
  f"{PACKAGE}.buckets",
]

FILE_LINES = 500
LONGER: dict[str, str] = {}  # path -> why it may be longer
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
MAIN_PATH_LINES = 1145  # a quarter of them are the papers' baselines, audits and sparse prefill
FUNCTION_LINES = 60
PARAMETERS = 8


def module_name(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
  module_name(path): path
  for folder in ("pallas_kernels", PACKAGE, "experiments")
  for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(name: str, tree: ast.AST) -> set[str]:
  """Absolute names of the modules that `tree`, the source of module `name`, imports, wherever it does."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        package = name if FILES.get(name, Path()).name == "__init__.py" else name.rpartition(".")[0]
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base]) if base else ".".join(parents)
      # `from package import module` imports the module; `from module import name` the module.
      inner = {f"{base}.{alias.name}" for alias in node.names}
      modules = {module for module in inner if module in FILES or not base.startswith((PACKAGE, "pallas_kernels"))}
      found |= modules | ({base} if len(modules) < len(inner) else set())
  return found


IMPORTS = {name: imports_of(name, ast.parse(path.read_text())) for name, path in FILES.items()}


def imports_any(name: str, *wanted: str) -> bool:
  return any(module == w or module.startswith(f"{w}.") for module in IMPORTS[name] for w in wanted)


def room(name: str) -> str:
  """The longest entry of RANKS that holds a module."""
  inside = [key for key in RANKS if name == key or (name.startswith(f"{key}.") and key != PACKAGE)]
  assert inside, f"{name} has no place in RANKS: give its room a rank"
  return max(inside, key=len)


def first_party(name: str) -> set[str]:
  return {module for module in IMPORTS[name] if module in FILES}


def test_imports_of_reads_every_form():
  source = """
import numpy as np, jax.experimental.pallas.triton
from sparse_serve_jax import config, LLM
from sparse_serve_jax.config import EngineConfig
from jax.experimental.pallas import triton as plgpu
from . import step
from .serving.plan import Plan
def late():
  import tokenizers
"""
  assert imports_of(f"{PACKAGE}.llm", ast.parse(source)) == {
    "numpy",
    "jax.experimental.pallas.triton",
    "sparse_serve_jax",
    "sparse_serve_jax.config",
    "sparse_serve_jax.step",
    "sparse_serve_jax.serving.plan",
    "tokenizers",
  }


def test_imports_go_down():
  rank = {name: RANKS[room(name)] for name in FILES}
  up = [f"{name} imports {module}" for name in FILES for module in first_party(name) if rank[module] > rank[name]]
  assert not up


def test_no_circles():
  done: set[str] = set()

  def visit(name: str, chain: tuple[str, ...]):
    assert name not in chain, " -> ".join([*chain[chain.index(name) :], name])
    if name not in done:
      for module in sorted(first_party(name)):
        visit(module, (*chain, name))
      done.add(name)

  for name in FILES:
    visit(name, ())


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("pallas_kernels")])
def test_kernels_stand_alone(name: str):
  allowed = {"jax", "jaxtyping", "numpy", "pallas_kernels", *sys.stdlib_module_names}
  assert {module.partition(".")[0] for module in IMPORTS[name]} <= allowed


def test_one_file_knows_each_backend():
  users = [name for name in FILES if imports_any(name, "jax.experimental.pallas.triton")]
  assert len(users) <= 1 and all(name.startswith("pallas_kernels.") for name in users)
  assert not [name for name in FILES if imports_any(name, "jax.experimental.pallas.ops")]  # deprecated
  assert [name for name in FILES if imports_any(name, "jax._src")] == [
    "pallas_kernels.prefill"
  ]  # cuDNN, which says why


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_scheduling_imports_no_jax(name: str):
  assert not imports_any(name, "jax", "jaxlib", "flax", "optax", "orbax", "pallas_kernels")


def test_scheduling_loads_no_jax():
  """Nor does anything that these modules bring in."""
  code = f"import sys, {', '.join(WITHOUT_JAX)}; print('jax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert out.strip() == "False"


def test_files_are_short():
  lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in FILES.values()}
  assert not {path: n for path, n in lines.items() if n > FILE_LINES and path not in LONGER}
  assert not [path for path in LONGER if lines.get(path, 0) <= FILE_LINES]


def test_main_path_is_short():
  """`step.py` and what it calls, kernels, configuration and docstrings aside."""
  path, waiting = set(), [f"{PACKAGE}.step"]
  while waiting:
    name = waiting.pop()
    if name not in path and RANKS[room(name)] >= 2:
      path.add(name)
      waiting.extend(first_party(name))
  lines = {name: code_lines(FILES[name]) for name in sorted(path)}
  assert {f"{PACKAGE}.models.llama", f"{PACKAGE}.memory.kv_cache"} <= path
  assert sum(lines.values()) <= MAIN_PATH_LINES, lines


def code_lines(path: Path) -> int:
  """Lines of a file but for docstrings and empty ones."""
  source = path.read_text()
  nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED) and ast.get_docstring(node)]
  told = {line for node in nodes for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
  return sum(bool(line.strip()) and i not in told for i, line in enumerate(source.splitlines(), 1))


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
  """All but Pallas kernels, which take refs and are read from top to bottom: "file:name" and the tree."""
  for path in FILES.values():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef) and not any(name.endswith(("_ref", "refs")) for name in parameters(node)):
        yield f"{path.relative_to(ROOT).as_posix()}:{node.name}", node


def parameters(node: ast.FunctionDef) -> list[str]:
  args = node.args
  named = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg])]
  return [arg.arg for arg in named if arg.arg not in ("self", "cls")]


def test_functions_fit_a_screen():
  lines = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
  assert not {name: n for name, n in lines.items() if n > FUNCTION_LINES}


def test_parameter_lists_are_short():
  lengths = {name: len(parameters(node)) for name, node in functions()}
  assert not {name: n for name, n in lengths.items() if n > PARAMETERS}
