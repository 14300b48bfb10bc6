"""The command line: what it prints and writes, how it refuses, and the commands that README.md shows."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import demo, serve
from sparse_serve_jax import runtime
from sparse_serve_jax.config import EngineConfig, find_config, from_dict, load_config, override
from sparse_serve_jax.evaluation import ladder, tasks
from sparse_serve_jax.models import ByteTokenizer, load_model, save_hf
from sparse_serve_jax.serving.engine import Engine
from tests.tiny import SMALL_SERVING

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
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
  "dram_kv_bytes",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """What `runtime.configure` sets is for a process of its own; test_runtime tests it."""
  monkeypatch.setattr(runtime, "configure", lambda: None)


def in_process(*arguments: str) -> None:
  """`python -m experiments.serve`, but for the process."""
  with flagsaver.flagsaver():
    serve.main(flags.FLAGS(["serve", *SMALL, *arguments]))


SMALL = [f"--set={assignment}" for assignment in SMALL_SERVING] + ["--ignore_eos", "--max_new_tokens=6"]


def rows_of(folder: Path) -> list[dict]:
  return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def commands_in_readme() -> list[list[str]]:
  """Arguments of every `python -m experiments...` of a code block."""
  blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
  lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
  return [shlex.split(line) for line in lines if line.startswith("python -m experiments")]


# ------------------------------------------------------------------------------------------------------------ the shell


def test_the_readmes_experiment_runs(tmp_path):
  """With fewer and shorter prompts."""
  (command,) = (c for c in commands_in_readme() if c[2] == "experiments.serve")
  fewer = ["--prompt_tokens=300", "--limit=3", "--max_new_tokens=5", "--ignore_eos", f"--out={tmp_path / 'run'}"]
  done = subprocess.run(
    [sys.executable, *command[1:], *fewer],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  *table, last = done.stdout.splitlines()
  summary = json.loads(last)
  assert set(summary) >= SUMMARY
  assert (summary["requests"], summary["output_tokens"], summary["refused"]) == (3, 15, 0)
  assert 0.9 * 900 < summary["prompt_tokens"] <= 900
  assert summary["blocks_saved"] == sum((r["prompt_tokens"] + 4) // 32 for r in rows_of(tmp_path / "run")) * 8
  assert [line.split()[0] for line in table] == ["sparse_serve", *summary]

  setting = json.loads((tmp_path / "run" / "config.json").read_text())
  assignments = [after for flag, after in itertools.pairwise(command) if flag == "--set"]
  expected = override(load_config("sparse_serve"), assignments)
  assert from_dict(EngineConfig, setting["config"]) == expected
  assert "cache.hbm_bytes=8MiB" in assignments and setting["config"]["cache"]["hbm_bytes"] == 8 << 20
  assert setting["model"]["name"] == "random:tiny" and setting["flags"]["limit"] == 3
  assert set(setting["versions"]) >= {"jax", "sparse_serve_jax"} and setting["device"]["platform"] == "cpu"


def test_the_readmes_commands_parse():
  # Others define the same flags in another process; below it is tested that there are such flags.
  commands = [command for command in commands_in_readme() if command[2] == "experiments.serve"]
  assert commands
  for _, _, name, *arguments in commands:
    module = importlib.import_module(name)
    with flagsaver.flagsaver():
      rest = flags.FLAGS([name, *arguments])
      assert rest == [name] and callable(module.main)
      values = flags.FLAGS.flag_values_dict()
      override(load_config(values["config"]), values["set"])
      assert find_config("models", values["model"].removeprefix("random:"))


def test_what_else_the_readme_names_exists():
  sources = "".join(file.read_text() for file in (ROOT / "experiments").glob("*.py"))
  defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', sources))
  assert set(re.findall(r"(?<!XLA_FLAGS=)--(\w+)[= ]", README)) <= defined
  modules = set(re.findall(r"python -m experiments\.(\w+)", README))
  assert {"serve", "bench_kernels", "bench_step"} <= modules <= {f.stem for f in (ROOT / "experiments").glob("*.py")}
  in_python = [ast.literal_eval(f"[{text}]") for text in re.findall(r"overrides=\[(.*?)\]", README)]
  override(EngineConfig(), [*re.findall(r"--set[= ]([\w.]+=\w+)", README), *itertools.chain.from_iterable(in_python)])
  configs = {file.stem for file in (ROOT / "configs" / "serving").glob("*.json")}
  assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) == configs
  targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
  assert {"demo", "test"} <= set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M)) <= set(targets)


@pytest.mark.slow
def test_the_readmes_python_finds_the_answer(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  (example,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
  exec(compile(example, "README.md", "exec"), {})
  text, answers, _ = capsys.readouterr().out.rsplit("\n", 2)
  assert text.strip() == ast.literal_eval(answers.strip())[0]


def test_the_kernels_readme_runs(capsys):
  (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "pallas_kernels" / "README.md").read_text(), re.M | re.S)
  exec(compile(example, "pallas_kernels/README.md", "exec"), {})
  first, second = (ast.literal_eval(line.split("missed ")[1]) for line in capsys.readouterr().out.splitlines())
  assert first == [[4, 4], [4, 4]] and 0 < sum(map(sum, second)) < 16


# --------------------------------------------------------------------------------------------------------- rows, errors


def test_a_row_for_every_request(tmp_path, capsys):
  """Times stand in the order in which things happened; two runs give the same tokens."""
  for name in ("one", "two"):
    in_process("--workload=needle", "--prompt_tokens=200", "--limit=6", "--rate=200", f"--out={tmp_path / name}")
  rows = rows_of(tmp_path / "one")
  assert {row["request_id"] for row in rows} == {f"needle-{i}" for i in range(6)}
  arrivals = {row["request_id"]: row["arrival_s"] for row in rows}
  assert arrivals["needle-0"] > 0 and sorted(arrivals.values()) == [arrivals[f"needle-{i}"] for i in range(6)]
  for row in rows:
    assert (row["finish_reason"], len(row["output_token_ids"]), len(row["token_s"])) == ("length", 6, 6)
    assert 180 < row["prompt_tokens"] <= 200
    times = [row["arrival_s"], row["scheduled_s"], row["first_token_s"], *row["token_s"], row["finish_s"]]
    assert times == sorted(times) and row["token_s"][0] == row["first_token_s"]
  tokens = [{row["request_id"]: row["output_token_ids"] for row in rows_of(tmp_path / n)} for n in ("one", "two")]
  assert tokens[0] == tokens[1]
  summary = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert summary["requests"] == 6 and summary["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)


def test_what_cannot_run_is_refused_and_the_rest_runs(tmp_path, capsys):
  prompts = [
    {"request_id": "long", "prompt": "x" * 500},
    {"request_id": "good", "prompt": "A good one.", "max_new_tokens": 4},
    {"request_id": "foreign", "prompt_token_ids": [1, 2, 99999]},
    {"prompt_token_ids": [5, 6, 7], "max_new_tokens": 40},
  ]
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
  in_process("--workload=jsonl", f"--jsonl={tmp_path / 'in.jsonl'}", f"--out={tmp_path}")
  said = capsys.readouterr()
  summary = json.loads(said.out.splitlines()[-1])
  assert (summary["requests"], summary["refused"], summary["output_tokens"]) == (2, 2, 4 + 6)
  rows = {row["request_id"]: row for row in rows_of(tmp_path)}
  assert set(rows) == {"long", "good", "foreign", "line-4"}
  assert [rows[name]["finish_reason"] for name in ("long", "foreign")] == ["refused"] * 2
  assert "501 prompt + 6 output tokens = 507, but only 384 tokens would fit" in rows["long"]["error"]
  assert "99999 at position 2" in rows["foreign"]["error"]
  refusals = [line for line in said.err.splitlines() if line.startswith("refused: ")]
  assert refusals == [f"refused: {rows[name]['error']}" for name in ("long", "foreign")]

  engine = Engine(override(load_config("sparse_serve"), SMALL_SERVING), load_model("random:tiny"))
  request = engine.add_request(ByteTokenizer().encode("A good one."), 4, ignore_eos=True)
  engine.run()
  assert rows["good"]["output_token_ids"] == request.output_tokens


def test_an_interrupted_run_keeps_its_rows(tmp_path, capsys, monkeypatch):
  step = Engine.step

  def interrupted(self: Engine):
    if any((tmp_path / "requests.jsonl").read_text()):
      raise KeyboardInterrupt
    return step(self)

  monkeypatch.setattr(Engine, "step", interrupted)
  with pytest.raises(SystemExit) as exit:
    in_process("--workload=needle", "--prompt_tokens=200", "--limit=6", f"--out={tmp_path}")
  assert exit.value.code == 130
  assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; rows so far are in {tmp_path}"
  assert 0 < len(rows_of(tmp_path)) < 6 and (tmp_path / "config.json").is_file()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--set=sparse.token_bugdet=64"], "unknown key 'sparse.token_bugdet'; the nearest is 'sparse.token_budget'"),
    (["--set=cache.hbm_bytes=100"], "cache.hbm_bytes=100 is below the minimum of"),
    (["--config=spars_serve"], "no serving configuration 'spars_serve'; there are: dense"),
    (["--model=random:huge"], "no models configuration 'huge'; there are:"),
    (["--model=absent"], "'absent' is no model"),
    (["--workload=longbench"], "--workload=longbench needs --longbench_dir"),
    (["--workload=longbench", "--longbench_dir=absent"], "dataset2prompt.json is missing"),
    (["--workload=jsonl"], "--workload=jsonl needs --jsonl"),
    (["--rate=0"], "the rate of arrivals must be above 0"),
  ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
  with pytest.raises(SystemExit) as exit:
    in_process(*arguments)
  assert exit.value.code == 2
  said = capsys.readouterr()
  (line,) = said.err.splitlines()
  assert line.startswith("error: ") and message in line and not said.out
  with pytest.raises((ValueError, OSError)):
    in_process(*arguments, "--verbose")


# ------------------------------------------------------------------------------------------------------------- the demo


@pytest.mark.slow
def test_the_demos_rungs(capsys):
  of, size = ladder.Comparison(n_prompts=3, prompt_tokens=1024, new_tokens=8, budget=256), 32
  demo.main(of=of)
  *printed, last = capsys.readouterr().out.splitlines()
  rungs = json.loads(last)
  assert list(rungs) == printed[1].split() == ["dense", "sparse", "sparse_serve", "psa"]

  model = load_model(demo.REFERENCE, dtype="float32")
  changes = " ".join(of.changes(model.config))
  hbm = int(re.findall(r"hbm_bytes=(\d+)", changes)[0])  # without offload room for one request
  asked = of.asked(model)
  assert [instance.task for instance in asked] == list(ladder.TASKS)
  lengths = [len(model.tokenizer.encode(instance.prompt)) for instance in asked]
  per_block = model.config.n_layers * model.config.n_kv_heads
  full = sum((length + step) // size for length in lengths for step in range(of.new_tokens - 1)) * per_block
  in_budget = of.n_prompts * (of.new_tokens - 1) * (of.budget // size) * per_block
  assert rungs["dense"]["blocks attended"] == full
  assert rungs["sparse"]["blocks attended"] == rungs["sparse_serve"]["blocks attended"] == in_budget < full
  assert in_budget / 4 < rungs["psa"]["blocks attended"] <= full
  for name, row in rungs.items():
    offloads = name in ("sparse_serve", "psa")
    assert 0 < row["HBM KV bytes"] <= hbm
    assert (row["blocks loaded"] > 0) == offloads == (row["DRAM KV bytes"] > hbm)
    assert 0 < row["HBM hit rate"] < 1 if offloads else row["HBM hit rate"] == 1
    assert min(row["ms to first token"], row["ms per token"], row["tokens per s"]) > 0
    assert row["answers right"] == row["tokens as dense"] == 1


def test_a_model_that_the_demo_cannot_take_is_one_line(tmp_path):
  absent = subprocess.run([sys.executable, "-m", "experiments.demo", "/nope"], cwd=ROOT, capture_output=True, text=True)
  assert (absent.returncode, absent.stdout) == (2, "") and absent.stderr.startswith("error: '/nope' is no model: ")
  assert len(absent.stderr.splitlines()) == 1
  save_hf(load_model("random:tiny"), tmp_path)
  (tmp_path / "tokenizer_config.json").unlink()
  with pytest.raises(ValueError, match="tokenizer"):
    demo.main(str(tmp_path))


def test_share_right():
  model = load_model("random:tiny")
  asked = [tasks.make("multi_key", 512, seed, model.tokenizer, split="eval") for seed in range(2)]
  outputs = [model.tokenizer.encode(text, add_special_tokens=False) for text in (asked[0].completion + "and", " 1\n")]
  assert ladder.share_right(outputs, asked, model) == 0.5


def test_share_equal():
  assert ladder.share_equal([[1, 2], [3, 4]], [[1, 9], [3, 4]], lengths=[2, 2]) == 0.75
  assert ladder.share_equal([[1, 2, 5], [3, 4, 6]], [[1, 9, 0], [3, 0, 7]], lengths=[2, 1]) == 2 / 3
