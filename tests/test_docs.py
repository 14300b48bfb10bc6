"""README.md and docs/: what they show runs or parses, what they name exists, and tables and pictures are as made."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")
from pallas_kernels.maps import Maps
from sparse_serve_jax.attention.methods import METHODS
from sparse_serve_jax.config import EngineConfig, find_config, from_dict, load_config, override
from sparse_serve_jax.memory.eviction import EVICTIONS
from sparse_serve_jax.memory.loads import LOADS
from sparse_serve_jax.models.hf_config import FAMILIES, config_from_hf
from sparse_serve_jax.workloads import WORKLOADS, WorkloadConfig
from tests import jsonl
from tests.forks import start
from tests.parsed import NAMES
from tests.test_timeline import check_form
from tests.tiny import config, prompt_of, serve, tiny_model, with_slots
from tools import make_docs

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "CONTRIBUTING.md", *make_docs.pages()]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
SUMMARY = {
  "requests",
  "prompt_tokens",
  "output_tokens",
  "ttft_mean_s",
  "tbt_mean_s",
  "tbt_p99_s",
  "throughput_tok_s",
  "hbm_hit_rate",
  "blocks_loaded",
  "blocks_saved",
  "peak_hbm_kv_bytes",
  "peak_dram_kv_bytes",
}
OTHERS = {"docs/notebooks", "config/", "data/", "traces/TASK_16384_BUDGET.npz", "mine.py"}  # made, or not ours
FIELDS = {
  f"{section.name}.{field.name}"
  for section in dataclasses.fields(EngineConfig)
  if dataclasses.is_dataclass(made := getattr(EngineConfig(), section.name))
  for field in dataclasses.fields(made)
}
pytestmark = pytest.mark.usefixtures("not_configured")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
OTHER_PAGES = [ROOT / name / "README.md" for name in ("pallas_kernels", "models/reference")]  # these name files too
OTHER_PAGES += [ROOT / "CHANGELOG.md", *sorted((ROOT / "experiments").rglob("*.md"))]
TEXTS |= {page: page.read_text(encoding="utf-8") for page in OTHER_PAGES}
all_pages = pytest.mark.parametrize("page", PAGES + OTHER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str = "") -> list[str]:
  """Code blocks of a page, of one language."""
  return [code for of, code in re.findall(r"^```(\w*)\n(.*?)^```", TEXTS[page], re.M | re.S) if of == language]


def spans(page: Path) -> list[str]:
  """What stands between backticks in its text."""
  text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
  return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> Iterator[tuple[str, list[str], bool]]:
  """Name of `sparse-serve NAME`, its arguments, and whether they are a whole line, of all commands of a page."""
  lines = [line.partition("  #")[0] for code in blocks(page) for line in code.replace("\\\n", " ").splitlines()]
  for text, whole in (*((line, True) for line in lines), *((span, False) for span in spans(page))):
    words = shlex.split(text) if re.match(r"(python -m experiments\.|sparse-serve )", text) else []
    if words[:2] == ["python", "-m"]:
      module = words[2].partition(".")[2]
      name = {"serve": "run"}.get(module, module.replace("_", "-"))
      assert (ROOT / "experiments" / f"{module}.py").is_file() or module == "NAME", text
      words = ["sparse-serve", name, *words[3:]]
    if words and not words[1].startswith("-") and "NAME" not in words[1:2] and "--help" not in words:
      yield words[1], words[2:], whole


# ------------------------------------------------------------------------------------------------------------ commands


def test_every_command_parses():
  """Each by the flags of its own process; with a configuration, tasks and methods that there are."""
  asked = defaultdict[str, list[tuple[list[str], bool]]](list)
  for page in PAGES:
    for name, arguments, whole in commands(page):
      asked[name].append((arguments, whole))
  assert (
    {"run", "ladder", "calibrate", "simulate", "accuracy", "bench-step", "longbench", "plot"} <= set(asked) <= NAMES
  )
  assert sum(map(len, asked.values())) > 30
  for name, lines in asked.items():
    done = start("tests.parsed", name, json.dumps(lines))
    assert done.returncode == 0, done.stderr


def test_psa_can_stop_in_what_documents_measure():
  """Before its first test it reads two groups: in a context of no more than these it is dense attention."""
  least = 2 * EngineConfig().sparse.group_blocks * EngineConfig().cache.block_tokens
  lengths = []
  for page in PAGES:
    for name, arguments, whole in commands(page):
      given = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
      if name == "accuracy" and whole and "thresholds" in given:
        lengths += [int(n) for key in ("lengths", "text_lengths") for n in given.get(key, "").split(",") if n]
  assert len(lengths) >= 2 and min(lengths) >= 2 * least


@pytest.mark.slow
def test_the_first_look_at_psa_runs(tmp_path):
  """With fewer and shorter instances: it prints what is to be looked at, and PSA reads less than dense attention."""
  (code,) = [code for code in blocks(ROOT / "docs" / "measuring.md") if "accuracy --model" in code]
  command = shlex.split(code.replace("\\\n", " "))
  done = start("sparse_serve_jax", *command[1:], "--lengths=2048", "--instances=2", f"--out={tmp_path}")
  assert done.returncode == 0, done.stderr
  told = re.findall(r"Look at \*(.+?)\*", TEXTS[ROOT / "docs" / "measuring.md"])
  assert len(told) == 3 and set(told) <= set(re.findall(r"^## (.+)", done.stdout, re.M))
  read = dict(re.findall(r"^\| ([\w. ]+) \| [\d.]+% \((\d+)\) \|$", done.stdout, re.M))
  assert 32 <= int(read["psa 0.8"]) <= int(read["psa 0.95"]) < 0.8 * int(read["dense 1"])
  done = start("sparse_serve_jax", "plot", str(tmp_path))
  assert done.returncode == 0 and list(tmp_path.glob("*.png")), done.stderr


@pytest.mark.parametrize("line", ["--rates=1 --nonsense=2", "--set=cache.nonsense=1", "--model=random:nonsense"])
def test_a_wrong_command_is_noticed(line):
  done = start("tests.parsed", "ladder", json.dumps([[line.split(), False]]))
  assert done.returncode == 1 and "nonsense" in done.stderr


@pages
def test_every_target_of_make_exists(page):
  targets = {
    name for names in re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.M) for name in names.split()
  }
  shown = [line for code in blocks(page) for line in code.splitlines()] + spans(page)
  named = {word for text in shown if (words := re.match(r"make ((?:[a-z-]+ ?)+)", text)) for word in words[1].split()}
  assert named <= targets


def test_the_experiment_runs(tmp_path):
  """That of the first hour, with fewer and shorter prompts."""
  lines = [line for line in blocks(ROOT / "docs" / "first_hour.md") if "--limit=8 \\\n" in line and "needle" in line]
  (command,) = (shlex.split(line.replace("\\\n", " ")) for line in lines)
  fewer = ["--prompt_tokens=300", "--limit=3", "--max_new_tokens=5", "--ignore_eos", f"--out={tmp_path / 'run'}"]
  done = start("sparse_serve_jax", *command[1:], *fewer)
  assert done.returncode == 0, done.stderr
  *table, last = done.stdout.splitlines()
  summary = json.loads(last)
  assert set(summary) >= SUMMARY
  assert (summary["requests"], summary["output_tokens"], summary["refused"]) == (3, 15, 0)
  assert 0.7 * 900 < summary["prompt_tokens"] <= 900 - 3 * len(" 12345\n")  # to the next sentence, and the answer
  rows = jsonl.read(tmp_path / "run" / "requests.jsonl")
  assert summary["blocks_saved"] == sum((r["prompt_tokens"] + 4) // 32 for r in rows) * 8
  assert [line.split()[0] for line in table] == ["sparse_serve", *summary]

  run = json.loads((tmp_path / "run" / "run.json").read_text())
  assignments = [after for flag, after in itertools.pairwise(command) if flag == "--set"]
  expected = override(load_config("sparse_serve"), assignments)
  assert from_dict(EngineConfig, run["setting"]["config"]) == expected
  assert "cache.hbm_bytes=8MiB" in assignments and expected.cache.hbm_bytes == 8 << 20
  assert run["setting"]["model"]["name"] == "random:tiny" and run["setting"]["workload"]["limit"] == 3
  assert run["parts"][0]["device"]["platform"] == "cpu"
  check_form(json.loads((tmp_path / "run" / "timeline.json").read_text()))


# --------------------------------------------------------------------------------------------------------------- names


@all_pages
def test_every_link_works(page):
  """To a file, and to a heading of it."""
  for _, link in re.findall(r"(?<!`)\[([^\]]+)\]\(([^)\s]+)\)", TEXTS[page]):
    if not link.startswith("https://"):
      file, _, anchor = link.partition("#")
      target = page.parent / file if file else page
      assert target.is_file(), f"{page.name}: {link}"
      headings = re.findall(r"^#+ (.+)", target.read_text(encoding="utf-8"), re.M) if anchor else []
      assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


@all_pages
def test_every_path_exists(page):
  """From the top, within the package, or beside the page."""
  for span in spans(page):
    if re.fullmatch(r"[\w.-]+(/[\w.*-]+)*/?", span) and re.search(r"/|\.(py|md|cff|toml)$", span):
      found = [at for top in (ROOT, ROOT / "sparse_serve_jax", page.parent) for at in top.glob(span.rstrip("/"))]
      assert found or span in OTHERS, f"{page.name}: {span}"


@pages
def test_every_flag_exists(page):
  """Of some command, where it stands alone in a sentence; in a command `test_every_command_parses` looks for it."""
  files = (ROOT / "sparse_serve_jax" / "commands").glob("*.py")
  known = {name for file in files for name in re.findall(r'(?:DEFINE_\w+|define_out)\(\s*"(\w+)"', file.read_text())}
  known |= {f"no{name}" for name in known} | {"hypothesis-profile", "model_args"}  # of pytest and lm_eval
  told = {flag for span in spans(page) for flag in re.findall(r"(?:^| )--([\w-]+)", span) if span.startswith("--")}
  assert told <= known, told - known


@pages
def test_every_key_of_the_configuration_exists(page):
  text = " ".join([*spans(page), *blocks(page), *blocks(page, "python")])
  keys = set(re.findall(r"(?<![\w./])((?:cache|sparse|scheduler)\.(?!py\b)[a-z]\w*)", text))
  assert keys <= FIELDS, keys - FIELDS


@pages
def test_every_module_and_name_exists(page):
  text = "\n".join([*spans(page), *re.findall(r"^::: (.+)", TEXTS[page], re.M)])
  for name in set(re.findall(r"(?<![\w/.])((?:sparse_serve_jax|pallas_kernels)(?:\.\w+)+)(?!\w*/)", text)):
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
      try:
        found = importlib.import_module(".".join(parts[:i]))
        break
      except ModuleNotFoundError:
        continue
    for part in parts[i:]:
      found = getattr(found, part)  # which says what is not there


def test_every_rung_is_told():
  told = re.findall(r"^\| `(\w+)` \|", TEXTS[ROOT / "docs" / "configuration.md"].split("## Every key")[0], re.M)
  assert set(told) == {file.stem for file in (ROOT / "configs" / "serving").glob("*.json")}
  assert all(find_config("serving", name) for name in told)


@pages
def test_every_word_of_code_is_in_the_source(page):
  """Names with an underscore, such as metrics and functions, between backticks."""
  source = _source()
  source += "".join(blocks(page, "python"))
  name = r"(?<![\w./-])[a-z][a-z0-9]*(?:_[a-z0-9]+)+(?![\w/])"
  words = {word for span in spans(page) for word in re.findall(name, span)}
  assert not {word for word in words if not re.search(rf"\b{word}\b", source)}


@functools.cache
def _source() -> str:
  folders = ("sparse_serve_jax", "pallas_kernels", "tests", "tools", "experiments", "configs", "examples")
  files = [file for name in folders for file in (ROOT / name).rglob("*") if file.suffix in (".py", ".json")]
  names = " ".join(file.stem for file in files)
  mine = {ROOT / "tests" / "test_docs.py", ROOT / "tools" / "published.py"}
  return names + "".join(file.read_text(encoding="utf-8") for file in files if file not in mine)


# ---------------------------------------------------------------------------------------------------------------- made


def test_the_readme_is_short():
  assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 150


def test_the_readme_begins_with_three_sentences_and_commands():
  opening = re.split(r"^## .+\n", TEXTS[ROOT / "README.md"], flags=re.M)[:2]
  assert len(re.findall(r"\.(?=\s)", opening[0])) == 3
  assert {"make demo", "make test"} <= {line.partition("  #")[0].strip() for line in "".join(opening).splitlines()}


def test_results_of_the_readme_have_their_command_beside_them():
  results = re.split(r"^## ", TEXTS[ROOT / "README.md"].split("\n## Results\n")[1], flags=re.M)[0]
  parts = re.split(r"^(?=\*\*)", results, flags=re.M)[1:]
  assert len(parts) >= 4
  for part in parts:
    assert re.search(r"sparse-serve [^`]+--out=OUT", part), part


@pytest.mark.parametrize("folder", sorted((ROOT / "experiments/results").iterdir()), ids=lambda path: path.name)
def test_results_say_how_they_were_made(folder):
  told = (folder / "README.md").read_text()
  assert re.search(r"experiments[./]\w|sparse-serve \w", told) and re.search(r"[AH]\d00|CPU", told)


@pytest.mark.parametrize("page", make_docs.pages(), ids=lambda page: page.stem)
def test_tables_are_what_the_code_makes(page):
  assert make_docs.filled(TEXTS[page]) == TEXTS[page], "`make docs` makes them anew"


@pytest.mark.parametrize("name", make_docs.PICTURES)
def test_pictures_are_what_the_code_makes(name):
  """Words to the letter, and numbers to a pixel: another matplotlib, or another processor, may place them a little
  differently, and names what it refers to by a hash of them."""
  stored, made = (
    re.sub(r'(?<=[#"])[a-z][0-9a-f]{10}(?=[")])', "name", text)
    for text in ((make_docs.ASSETS / name).read_text(encoding="utf-8"), make_docs.PICTURES[name]())
  )
  number = r"-?\d+\.\d+(?:e-?\d+)?"
  assert re.sub(number, "#", made) == re.sub(number, "#", stored), "`make docs` makes them anew"
  np.testing.assert_allclose(*([float(n) for n in re.findall(number, text)] for text in (made, stored)), atol=1)


def test_a_changed_result_changes_a_page(monkeypatch):
  monkeypatch.setitem(make_docs.TABLES, "accuracy", lambda: "| other |\n")
  readme = TEXTS[ROOT / "README.md"]
  assert make_docs.filled(readme) != readme and "| other |" in make_docs.filled(readme)


def test_the_menu_has_every_page_and_notebook():
  menu = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
  made = [f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")]
  assert sorted(menu) == sorted([*made, *(page.name for page in (ROOT / "docs").glob("*.md"))])


def test_the_site_has_rendered_notebooks(tmp_path):
  """`make docs` renders one that is not there, or is older than the notebook or what that reads."""
  for name in ("Makefile", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path)
  read = [tmp_path / folder / "file" for folder in ("experiments/results/run", "models/reference", "sparse_serve_jax")]
  read += [tmp_path / "pallas_kernels" / "file", tmp_path / "tools" / "render_notebooks.py"]
  notebooks = [tmp_path / "notebooks" / f"{name}.ipynb" for name in "ab"]
  made = [tmp_path / "docs" / "notebooks" / f"{name}.md" for name in "ab"]

  def rendered() -> str:
    left = {name: of for name, of in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "-n", "docs"], cwd=tmp_path, env=left, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.index("mkdocs build --strict")
    return "".join(re.findall(r"render_notebooks.py docs/notebooks notebooks/(.)", done.stdout[:last]))

  for file in (*read, *notebooks, *made):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (2e9, 2e9) if file in made else (1e9, 1e9))
  assert rendered() == ""
  for file in (*read, *notebooks):
    os.utime(file, (3e9, 3e9))
    assert rendered() == (file.stem if file in notebooks else "ab"), file
    os.utime(file, (1e9, 1e9))
  made[0].unlink()
  assert rendered() == "a"


# -------------------------------------------------------------------------------------------------------------- python


ADDED_TO = METHODS, EVICTIONS, LOADS, WORKLOADS, FAMILIES


@pytest.fixture
def added():
  """Runs code of a page and returns what it defines; entries of tables go when a test ends."""
  before = [set(table) for table in ADDED_TO]

  def run(page: str, title: str) -> dict[str, Any]:
    (code,) = re.findall(rf"^## {title}\n.*?^```python\n(.*?)^```", TEXTS[ROOT / page], re.M | re.S)[:1]
    exec(compile(code, page, "exec"), found := {})
    return found

  yield run
  for table, names in zip(ADDED_TO, before, strict=True):
    for name in set(table) - names:
      del table[name]


def test_every_example_is_run():
  """By this file, that of PSA by test_stop_rules, and that of the server by test_server."""
  counted = {page.name: len(blocks(page, "python")) for page in PAGES if blocks(page, "python")}
  assert counted == {"README.md": 1, "first_hour.md": 2, "extending.md": 5, "psa.md": 1, "server.md": 1}


@pytest.mark.slow
def test_the_python_of_the_readme_and_the_first_hour(optimized, capsys, monkeypatch):
  """The reference model finds what it is asked for."""
  monkeypatch.chdir(ROOT)
  (hello,) = blocks(ROOT / "README.md", "python")
  ask, engine = blocks(ROOT / "docs" / "first_hour.md", "python")
  exec(compile(hello, "README.md", "exec"), {})
  text, answers, _ = capsys.readouterr().out.rsplit("\n", 2)
  assert text.strip() == ast.literal_eval(answers.strip())[0]
  exec(compile(ask, "first_hour.md", "exec"), {})
  text, answers, _ = capsys.readouterr().out.rsplit("\n", 2)
  assert text.strip() == ast.literal_eval(answers.strip())[0]
  exec(compile(engine, "first_hour.md", "exec"), {})
  assert len(ast.literal_eval(capsys.readouterr().out)) == 8


def test_a_selection_method(added):
  """As many blocks as hold the share of the weights, sinks and window besides; no more than there are."""
  found = added("docs/extending.md", "A selection method")
  assert len(blocks(ROOT / "docs" / "extending.md", "python")[0].splitlines()) <= 25
  inf = jnp.inf
  scores = jnp.log(jnp.array([[[inf, 0.5, 0.3, 0.15, 0.05], [inf, 0.96, 0.02, 0.01, 0.01]]]))
  assert found["nucleus"](scores, jnp.array([[5, 5]])).tolist() == [[4, 2]]
  assert found["nucleus"](scores, jnp.array([[3, 5]])).tolist() == [[3, 2]]
  prompts = [prompt_of(n, seed=n) for n in (90, 61)]
  _, all_of_it = serve(config(), tiny_model(), prompts, 6)
  _, some = serve(config("sparse.method=twilight"), tiny_model(), prompts, 6)
  assert 0 < some.usage.blocks_attended < all_of_it.usage.blocks_attended


def test_a_load(added):
  """Tokens are those of another load, and each list that misses gets one block ahead."""
  added("docs/extending.md", "A load")
  prompts = [prompt_of(n, seed=n) for n in (90, 61)]
  conf = with_slots(config("sparse.token_budget=64"), 40, tiny_model())
  tokens, fused = serve(conf, tiny_model(), prompts, 6)
  others, first = serve(override(conf, ["cache.load=first_miss"]), tiny_model(), prompts, 6)
  assert others == tokens and first.usage.blocks_loaded == fused.usage.blocks_loaded > 0


def test_an_eviction(added):
  """Slots of layer 0 go last."""
  keep = added("docs/extending.md", "An eviction")["keep_layer_0"]
  maps = Maps.empty(2, 3, 4, 5)._replace(block_of=jnp.array([0, 5, -1, 12, 23]), last_used=jnp.array([1, 7, -1, 2, 4]))
  assert jnp.argsort(keep(maps, jnp.int32(9))).tolist() == [2, 4, 1, 0, 3]  # blocks 0 and 12 are of layer 0
  assert EVICTIONS["keep_layer_0"] is keep


def test_a_model_family(added):
  raw = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
  raw |= {"model_type": "lantern", "architectures": ["LanternForCausalLM"]}
  with pytest.raises(ValueError, match="LanternForCausalLM"):
    config_from_hf(raw)
  added("docs/extending.md", "A model family")
  read = config_from_hf(raw)
  assert (read.qk_norm, read.qkv_bias, read.max_context, read.n_kv_heads) == (True, False, 65536, 4)


def test_a_workload(added):
  added("docs/extending.md", "A workload")
  source = WORKLOADS["countdown"](WorkloadConfig("countdown", limit=3))
  items = list(source(tiny_model().tokenizer, 512))
  assert [item.id for item in items] == ["bottles-0", "bottles-1", "bottles-2"]
  assert tiny_model().tokenizer.decode(items[2].prompt.tolist()).startswith("1 bottles of milk")


def test_the_kernels_readme_runs(capsys):
  (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "pallas_kernels" / "README.md").read_text(), re.M | re.S)
  exec(compile(example, "pallas_kernels/README.md", "exec"), {})
  first, second = (ast.literal_eval(line.split("missed ")[1]) for line in capsys.readouterr().out.splitlines())
  assert first == [[4, 4], [4, 4]] and 0 < sum(map(sum, second)) < 16
