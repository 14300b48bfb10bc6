"""Every command that README.md and docs/ show is run as it stands there, made small by the flags of one table.

Of a flag that is given twice the last one counts, so these are appended. A command without an entry in RULES fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import jsonl
from tests.forks import ROOT, start
from tests.longbench import write_release
from tests.test_docs import PAGES, TEXTS, blocks, spans
from tests.test_runs import SMALL

# A model of random weights, and requests of up to 384 tokens. Commands that compile the same shapes share programs.
SERVED = [flag for flag in SMALL["ladder"] if flag.startswith(("--model", "--set"))]
ASKED = ["--limit=3", "--prompt_tokens=300", "--max_new_tokens=5"]
ANSWERS = ["--model=random:tiny", "--lengths=640", "--text_lengths=640", "--instances=2", "--steps=128"]
ANSWERS += ["--tasks=key_value", "--methods=cuboid_mean", "--budgets=128", "--thresholds=0.5", "--workers=0"]
ANSWERS += ["--requests=1", "--trace_steps=40", "--prefill_shares=0.5", "--prefill_thresholds=0.8"]
HELP = "tests/test_cli.py::test_every_command_has_help_in_sentences_and_groups"
HERE = "tests/test_docs_run.py"

# A pattern of whole commands -> the flags that make them small; or the test that runs them; or why none does.
RULES: dict[str, list[str] | str] = {
  r"sparse-serve --help": [],
  r"sparse-serve config (NAME|--list)": [],
  r"sparse-serve doctor DIR": [],
  r"sparse-serve generate DIR .+": ["--max_tokens=5", *SERVED[1:]],
  r"sparse-serve chat DIR": ["--message=Hi", "--max_tokens=5", *SERVED[1:]],
  r"sparse-serve run (?!.*(--hosts|/tmp/run)).+": [*SERVED, *ASKED],
  r"sparse-serve ladder (?!.*(--flagfile|--ray|--rates=0$)).+": [*SERVED, *ASKED, "--rungs=dense,psa", "--rates=20"],
  r"sparse-serve calibrate .+": [*SERVED, *ASKED, "--limit=12"],
  r"sparse-serve simulate .+": [*SERVED, *ASKED],
  r"sparse-serve accuracy --model=DIR --out=OUT": ANSWERS,
  r"sparse-serve accuracy .*--axes=.*": ANSWERS,
  r"sparse-serve accuracy --model=DIR --parts=text .+": ANSWERS,
  r"sparse-serve longbench .+": [*SERVED, "--tasks=trec", "--limit=1"],
  r"sparse-serve prefix .+": [],
  # Another test runs these, or what differs by values only.
  r"sparse-serve ([a-z][a-z-]+|NAME --help)": HELP,
  r"python -m experiments\.NAME": "tests/test_commands.py::test_every_module_under_experiments_is_a_command",
  r"sparse-serve generate models/reference .+": f"{HERE}::test_the_first_question_has_the_answer_that_is_told",
  r"sparse-serve run .+ --out=/tmp/run": "tests/test_docs.py::test_the_experiment_runs",
  r"sparse-serve run .+ --hosts=2 .+": "tests/test_hosts.py::test_two_processes_have_the_tokens_of_one",
  r"sparse-serve ladder (--flagfile=.+|--rates=0)": "tests/test_runs.py::test_bursts_and_what_their_costs_predict",
  r"sparse-serve ladder .+ --ray": "tests/test_spread.py::test_the_ladder_has_the_same_rows",
  r"sparse-serve accuracy .+ --ray": "tests/test_spread.py::test_accuracy_is_that_of_one_process_and_goes_on",
  r"sparse-serve accuracy .*--out=/tmp/accuracy .+": "tests/test_docs.py::test_the_first_look_at_psa_runs",
  r"sparse-serve accuracy .*--parts=selections .+": "tests/test_accuracy.py::test_a_run_goes_on",  # traces of PSA too
  r"sparse-serve accuracy --model=models/reference --out=OUT": f"{HERE}::test_a_block_runs",  # that of DIR
  r"sparse-serve accuracy --(parts=prefill|methods=NAME)": f"{HERE}::test_a_block_runs",  # a part of it
  r"sparse-serve plot DIR": "tests/test_docs.py::test_the_first_look_at_psa_runs",
  r"sparse-serve bench-kernels .+": "tests/test_bench.py::test_bench_kernels",
  r"sparse-serve bench-step .+": "tests/test_bench.py::test_bench_step",
  r"sparse-serve bench-prefill .+": "tests/test_bench.py::test_bench_prefill",
  r"sparse-serve train-reference .+": "tests/test_training.py::test_the_program_in_two_pieces",
  r"(sparse-serve demo DIR|make demo)": "tests/test_experiments.py::test_the_demos_rungs",
  r"sparse-serve serve .+ --replicas=2 .+": "tests/test_replicas.py::test_a_signal_ends_it_after_what_it_has",
  r"(sparse-serve serve (?!.*--replicas)|sparse-serve bench |curl ).+": f"{HERE}::test_a_server_answers",
  r"python -c .+": f"{HERE}::test_a_stop_rule_of_ones_own_is_measured",
  r"lm_eval .+": "tests/test_lm_eval.py::test_likelihoods_are_those_of_a_forward_pass",
  r"python -m tests\.load": "tests/test_load.py::test_a_server_under_load",
  r"make docs": "tests/test_docs.py::test_the_site_has_rendered_notebooks",
  r"make notebooks": "tests/test_notebooks.py::test_notebooks_run_and_show_their_plots",
  # No test runs these.
  r"pip install .+": "takes packages from a network",
  r"make (gpu|test-gpu|constraints .+)": "takes packages from a network",
  r"make (test|soak|format|clean .+)": "is what runs this test, or changes or removes files",
  r"source .+": "changes the shell that it is typed in",
  r"ray start": "starts a cluster that goes on",
}
TRACE = {"timestamp": 0, "input_length": 90, "output_length": 4, "hash_ids": [1]}
CARDS = [ROOT / name / "README.md" for name in ("pallas_kernels", "models/reference")]
PROGRAMS = r"(sparse-serve|python -m|pip|make|curl|lm_eval|ray|git|source) \S"
GROUPS = {  # of commands: a block, of which later ones may read what earlier ones wrote, or what stands in a sentence
  tuple(line.partition("  #")[0].strip() for line in re.sub(r"\\\n\s*", "", code).splitlines())
  for page in PAGES
  for code in blocks(page)
} | {(span,) for page in (*PAGES, *CARDS) for span in spans(page) if re.match(PROGRAMS, span)}
LINES = sorted({line for group in GROUPS for line in group})


def rules_of(line: str) -> list[list[str] | str]:
  return [rule for pattern, rule in RULES.items() if re.fullmatch(pattern, line)]


def arguments(line: str, folder: Path) -> list[str]:
  """Those of a command of `sparse-serve`, made small, with files in a folder for what a reader puts in."""
  words = shlex.split(line.replace("/tmp/", f"{folder.parent}/"))[1:]
  (more,) = rules_of(line)
  for file, of in (("FILE.jsonl", {"prompt": "Once upon a time"}), ("FILE.trace", TRACE)):
    jsonl.write(folder / file, [of])
  (folder / "notes").mkdir()
  (folder / "notes" / "a.txt").write_text("The sky is blue. " * 200)
  places = {
    "DIR": "random:tiny",
    "NAME": "psa",
    "--out=DIR": f"--out={folder / 'out'}",
    "--jsonl=FILE": f"--jsonl={folder / 'FILE.jsonl'}",
    "--trace=FILE": f"--trace={folder / 'FILE.trace'}",
    "--text=notes/": f"--text={folder / 'notes'}",
  }
  if "--longbench_dir=DIR" in words:
    places["--longbench_dir=DIR"] = f"--longbench_dir={write_release(folder / 'release', trec=100)}"
  return [*(places.get(word, word).replace("=OUT", f"={folder / 'out'}") for word in words), *more]


def test_every_command_has_one_rule():
  wrong = [f"{line}: {len(rules_of(line))} rules" for line in LINES if len(rules_of(line)) != 1]
  assert not wrong, "give each one entry in RULES:\n" + "\n".join(wrong)
  assert len(LINES) > 60 and not rules_of("sparse-serve nonsense --out=OUT")


@pytest.mark.parametrize("pattern", RULES)
def test_every_rule_is_of_a_command_and_every_test_is_there(pattern):
  assert any(re.fullmatch(pattern, line) for line in LINES)
  if (rule := RULES[pattern]) and isinstance(rule, str) and "::" in rule:
    file, _, name = rule.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), rule


def test_a_line_that_another_test_runs_stands_there():
  runs = (ROOT / "experiments" / "workloads" / "README.md").read_text(encoding="utf-8").splitlines()
  lines = [line for line in LINES if "--flagfile" in line]
  assert lines and set(lines) <= set(runs)


@pytest.mark.slow
@pytest.mark.parametrize(
  "group",
  sorted(group for group in GROUPS if any(isinstance(rule, list) for line in group for rule in rules_of(line))),
  ids=lambda group: group[-1][:60],
)
def test_a_block_runs(group, tmp_path):
  lines = [line for line in group if isinstance(rules_of(line)[0], list)]
  for i, line in enumerate(lines):
    (folder := tmp_path / str(i)).mkdir()
    done = start("sparse_serve_jax", *arguments(line, folder))
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert done.stdout.strip(), line
    told = [line for line in lines[: i + 1] if "--out" in line]
    assert len(list(tmp_path.rglob("run.json"))) == len(told), line


@pytest.mark.slow
def test_the_first_question_has_the_answer_that_is_told():
  text = TEXTS[ROOT / "docs" / "first_hour.md"]
  (line,) = [line for line in LINES if line.startswith("sparse-serve generate models/reference")]
  done = start("sparse_serve_jax", *shlex.split(line)[1:])
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == re.findall(r"^answers (\d+)\.", text, re.M)


@pytest.mark.slow
def test_a_stop_rule_of_ones_own_is_measured(tmp_path):
  """By worker processes too, which do not know it."""
  (example,) = blocks(ROOT / "docs" / "psa.md", "python")
  *kept, _, _ = example.splitlines(keepends=True)
  (tmp_path / "mine.py").write_text("".join(kept))
  (line,) = [line for line in LINES if "import mine" in line]
  _, *words = shlex.split(line.replace("OUT", str(tmp_path / "out")))
  command = [sys.executable, *words, *ANSWERS, "--parts=tasks", "--workers=1"]
  done = subprocess.run(
    command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  cases = {row["case"] for row in jsonl.read(tmp_path / "out" / "results.jsonl")}
  assert any("heaviest" in case for case in cases), cases


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_server_answers(tmp_path):
  """What docs/server.md starts and asks, and what docs/measuring.md measures it with."""
  from tests.test_server import KEY, Process

  (serve,) = [line for line in LINES if re.match("sparse-serve serve .*--port=", line)]
  (curl,) = [line for line in LINES if line.startswith("curl ")]
  (bench,) = [line for line in LINES if line.startswith("sparse-serve bench --url")]
  _, _, model, port, *flags = shlex.split(serve)
  url = f"http://127.0.0.1:{port.removeprefix('--port=')}"
  assert url in curl and url in bench
  server = Process(ROOT / model, *flags)
  try:
    words = shlex.split(curl.replace(url, server.url))
    command = [*words, "--silent", "--show-error", "--fail", "-H", f"Authorization: Bearer {KEY}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["usage"]["completion_tokens"] == 5
    words = shlex.split(bench.replace(url, server.url).replace("/tmp", str(tmp_path)))
    small = [f"--tokenizer={ROOT / model}", *ASKED, "--rate=20", "--nowarm_up"]
    done = start("sparse_serve_jax", *words[1:], *small, OPENAI_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["requests"] == 3
  finally:
    assert server.close() == 0
