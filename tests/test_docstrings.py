"""docs/api.md and the docstrings behind it. Read from the syntax trees: every public name has a docstring, which names
each parameter, and each error that the body raises.

What need not be said twice: a parameter whose class has its name (`maps: Maps`, `batch: DecodeBatch`); one that the
module's docstring tells between backticks, or a function that the docstring names between backticks; a method that is
told by a protocol which its class's docstring names so.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator

import pytest

from tests.test_architecture import FILES, ROOT

Definition = ast.FunctionDef | ast.ClassDef
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ENTRIES = [  # a dotted name, and the members that are shown of a module: None for all
  (name, members and members.split(", "))
  for name, members in re.findall(r"^::: (\S+)(?:\n {4}options:\n {6}members: \[(.*)\])?$", PAGE, re.M)
]
MADE = ("__init__", "__new__", "__post_init__")  # what they raise the class tells


@functools.cache
def tree(module: str) -> ast.Module:
  return ast.parse(FILES[module].read_text(encoding="utf-8"))


def exported(module: str) -> list[str]:
  """`__all__`, or without one the public functions and classes."""
  for node in tree(module).body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
      return ast.literal_eval(node.value)
  return [node.name for node in tree(module).body if isinstance(node, Definition) and not node.name.startswith("_")]


def find(module: str, name: str) -> tuple[str, Definition | None] | None:
  """The module in which a name is defined, and its definition, None of a value; None if there is no such name."""
  imports = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom) and node.module != module]
  for node in imports:
    of = node.module or ""
    if of in FILES and name in [alias.name for alias in node.names] and (found := find(of, name)):
      return found
  for node in tree(module).body:
    if isinstance(node, Definition) and node.name == name:
      return module, node
    targets = [*getattr(node, "targets", []), getattr(node, "target", None)]  # of assignments
    if name in [target.id for target in targets if isinstance(target, ast.Name)]:
      return module, None
  return None


def entry(path: str, members: list[str] | None) -> list[tuple[str, Definition | None, str]]:
  """What an entry of the page shows: where it is defined, its definition there, and its name."""
  module, _, name = path.rpartition(".")
  module, names = (path, members or exported(path)) if path in FILES else (module, [name])
  return [(*found, name) for name in names for found in [find(module, name)] if found]


SHOWN = [of for path, members in ENTRIES for of in entry(path, members)]


def methods(of: ast.ClassDef) -> Iterator[ast.FunctionDef]:
  for node in of.body:
    if not isinstance(node, ast.FunctionDef) or "overload" in map(ast.unparse, node.decorator_list):
      continue
    if not node.name.startswith("_") or node.name in (*MADE, "__call__"):
      yield node


def text(node: ast.AST) -> str:
  assert isinstance(node, Definition)
  return ast.get_docstring(node) or ""


def names(doc: str, parameter: str) -> bool:
  """Whether a docstring names a parameter: as a word; one of two letters or less between backticks, with a shape or as
  an entry of `Args`."""
  word = re.escape(parameter)
  if len(parameter) > 2:
    return re.search(rf"(?<![\w.]){word}(?!\w)", doc) is not None
  return re.search(rf"`{word}`|\b{word} \[|^ *{word}: ", doc, re.M) is not None


def is_told_by_its_class(arg: ast.arg) -> bool:
  kind = ast.unparse(arg.annotation).split(".")[-1] if arg.annotation else ""
  return re.fullmatch(r"[A-Z]\w+", kind) is not None and len(arg.arg) > 2 and kind.lower().endswith(arg.arg)


def raised(node: ast.AST) -> set[str]:
  """Names of the errors that a body raises, those of functions in it apart."""
  found = set[str]()
  for inner in ast.iter_child_nodes(node):
    if isinstance(inner, ast.Raise) and inner.exc is not None:
      error = inner.exc.func if isinstance(inner.exc, ast.Call) else inner.exc
      found |= {name for name in [ast.unparse(error).split(".")[-1]] if name[0].isupper() and name != "StopIteration"}
    if not isinstance(inner, (*Definition.__args__, ast.Lambda)):
      found |= raised(inner)
  return found


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
  args = node.args
  every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
  return [arg for arg in every if arg.arg not in ("self", "cls")]


def untold(node: ast.FunctionDef, others: list[str], doc: str) -> list[str]:
  """What a docstring lacks; `others` are docstrings of the callables that it names."""
  lacks = [
    arg.arg
    for arg in parameters(node)
    if not is_told_by_its_class(arg) and not any(names(of, arg.arg) for of in (doc, *others))
  ]
  return lacks + sorted(error for error in raised(node) if error not in doc)


@functools.cache
def protocols() -> dict[str, ast.ClassDef]:
  classes = (node for module in FILES for node in tree(module).body if isinstance(node, ast.ClassDef))
  return {node.name: node for node in classes if "Protocol" in map(ast.unparse, node.bases)}


def referred(doc: str, module: str, of: ast.ClassDef | None) -> list[str]:
  """What else tells of parameters: between backticks the module, and functions of it or of the class that are named."""
  found = re.findall(r"`[^`]+`", ast.get_docstring(tree(module)) or "")
  for name in re.findall(r"`(?:\w+\.)*(\w+)`", doc):
    inner = [node for node in of.body if isinstance(node, ast.FunctionDef) and node.name == name] if of else []
    there = find(module, name)
    found += [text(node) for node in (*inner, there and there[1]) if isinstance(node, ast.FunctionDef)]
  return found


def lacking(module: str, name: str, node: Definition) -> dict[str, list[str]]:
  """What docstrings of a public name and its public methods lack, by dotted name."""
  if isinstance(node, ast.FunctionDef):
    doc = text(node)
    found = {name: untold(node, referred(doc, module, None), doc) if doc else ["a docstring"]}
  else:
    found = {name: [] if text(node) else ["a docstring"]}
    of = [protocols()[word] for word in re.findall(r"`(\w+)`", text(node)) if word in protocols()]
    told = {method.name for protocol in of for method in methods(protocol) if text(method)}
    for method in methods(node):
      doc = text(method) + "\n\n" + text(node) * (method.name in MADE)
      if method.name in ("__new__", "__post_init__"):  # of fields
        found[f"{name}.{method.name}"] = sorted(error for error in raised(method) if error not in doc)
      elif text(method) or method.name == "__init__":
        found[f"{name}.{method.name}"] = untold(method, referred(doc, module, node), doc)
      elif method.name not in told:
        found[f"{name}.{method.name}"] = ["a docstring"]
  return {f"{module}.{of}": lacks for of, lacks in found.items() if lacks}


def test_docstrings_name_parameters_and_errors():
  found = {}
  for module, node, name in SHOWN:
    if node is not None:
      found |= lacking(module, name, node)
  assert len(SHOWN) > 150 and not found, "\n".join(f"{name}: {', '.join(lacks)}" for name, lacks in found.items())


SOURCE = '''
def f(maps: Maps, blocks, n: int, *, options: dict | None = None, **more):
  """Of `blocks` [K, n] and options, and **more; `n`.

  Raises:
    ValueError: there are none.
  """
  def later():
    raise TypeError
  if n:
    raise ValueError(n)
'''


@pytest.mark.parametrize(
  ("before", "after", "lacks"),
  [
    ("", "", []),
    ("`blocks` [K, n]", "what is", ["blocks"]),
    ("`n`", "n", ["n"]),
    ("maps: Maps", "maps: Maps | None", ["maps"]),
    (" and options", "", ["options"]),
    ("**more;", "what not;", ["more"]),
    ("    ValueError: there", "    There", ["ValueError"]),
    ("raise ValueError(n)", "raise NotImplementedError", ["NotImplementedError"]),
  ],
)
def test_what_is_not_told_is_noticed(before, after, lacks):
  assert before in SOURCE
  (node,) = ast.parse(SOURCE.replace(before, after, 1) if before else SOURCE).body
  assert isinstance(node, ast.FunctionDef)
  assert untold(node, [], text(node)) == lacks


def test_a_method_without_a_docstring_is_noticed():
  """But for one that a protocol tells."""
  (node,) = ast.parse('class A:\n  """A `Tokenizer`."""\n  def encode(self): ...\n  def later(self): ...').body
  assert isinstance(node, ast.ClassDef)
  assert lacking("sparse_serve_jax.outputs", "A", node) == {"sparse_serve_jax.outputs.A.later": ["a docstring"]}


def test_every_entry_of_the_page_is_read():
  assert len(ENTRIES) == PAGE.count("\n::: ") > 30


@pytest.mark.parametrize(("path", "members"), ENTRIES)
def test_what_the_page_shows_exists(path, members):
  assert path in FILES or entry(path, None), path
  assert {name for *_, name in entry(path, members)} >= set(members or ()), path


def test_the_page_has_all_that_is_exported():
  """By `__all__` of a package; a function that hides the module of its name, by itself: the site shows the module."""
  shown = {(module, name) for module, _, name in SHOWN}
  for module in FILES:
    if FILES[module].name == "__init__.py" and "__all__" in FILES[module].read_text():
      for name in exported(module):
        if found := find(module, name):
          assert found[1] is None or (found[0], name) in shown, f"{module}.{name} is not in docs/api.md"
          assert f"{module}.{name}" not in FILES or f"{module}.{name}.{name}" in dict(ENTRIES), f"{module}.{name}"


def imports() -> Iterator[tuple[str, str]]:
  """Module and name of what README, the pages, examples and notebooks import of ours."""
  sources = [path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))]
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    cells = json.loads(path.read_text())["cells"]
    sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
  for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
    sources += re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
  for source in sources:
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.ImportFrom) and node.module in FILES:
        yield from ((node.module, alias.name) for alias in node.names)


def test_the_page_has_what_documents_import():
  """Modules, functions and classes; and tables, or the modules in which they stand."""
  shown = {(module, name) for module, _, name in SHOWN}
  asked = list(imports())
  assert len(asked) > 30
  for module, name in asked:
    found = find(module, name)
    if f"{module}.{name}" in FILES:
      assert any(f"{of}.".startswith(f"{module}.{name}.") for of, _ in ENTRIES), f"{module}.{name}"
    else:
      assert found and ((found[0], name) in shown or (found[1] is None and found[0] in dict(ENTRIES))), (
        f"{module}.{name}"
      )
