"""lm-eval asks the server as it would ask any other: likelihoods of choices, and texts up to a stop string.

Needs `pip install "lm-eval[api]"`; skips without it. Its tasks are files, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "lm-eval[api]"')
pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import forward, load_model, place_params
from tests.test_server import KEY, Process, with_template

pytestmark = pytest.mark.slow
QUESTIONS = [
  ("The quick brown fox jumps over the lazy", [" dog", " cat and the moon", " fox"]),
  ("Once upon a time there was a", [" king", " little girl who lived", "."]),
  ("1, 2, 3, 4,", [" 5", " 9, 9"]),
]
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
GO_ON = """
task: go_on
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [" the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  """A server, its model's folder, and one with the tasks."""
  folder = tmp_path_factory.mktemp("lm_eval")
  model = with_template(folder)
  file = folder / "questions.jsonl"
  file.write_text("".join(json.dumps({"question": q, "choices": c}) + "\n" for q, c in QUESTIONS))
  (folder / "tasks").mkdir()
  for name, task in (("choose", CHOOSE), ("go_on", GO_ON)):
    (folder / "tasks" / f"{name}.yaml").write_text(task.replace("FILE", str(file)))
  server = Process(model)
  yield server, model, folder
  server.close()


def evaluate(served, kind: str, path: str, task: str, *flags: str) -> list[dict[str, Any]]:
  """What lm-eval logs of each question, in order."""
  server, _, folder = served
  out = folder / f"{kind}-{task}"
  of = f"model=reference,base_url={server.url}{path},num_concurrent=2,max_retries=1,auth_token={KEY}"
  command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", of, "--tasks", task, *flags]
  command += ["--include_path", str(folder / "tasks"), "--log_samples", "--output_path", str(out)]
  environment = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
  done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  (samples,) = out.rglob("samples_*.jsonl")
  return sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])


def loglikelihood(model: Any, scores: Any, context: list[int], choice: list[int]) -> float:
  ids = [*context, *choice]
  padded = np.zeros(64, np.int32)
  padded[: len(ids)] = ids
  told = np.asarray(scores(padded))
  return float(sum(told[len(context) + i - 1, token] for i, token in enumerate(choice)))


def test_likelihoods_are_those_of_a_forward_pass(served):
  rows = evaluate(served, "local-completions", "/v1/completions", "choose")
  model = load_model(str(served[1]), dtype="float32")
  params = place_params(model, make_mesh(1))
  scores = jax.jit(lambda tokens: jax.nn.log_softmax(forward(model.config, params, jnp.asarray(tokens))))
  assert [row["doc"]["question"] for row in rows] == [question for question, _ in QUESTIONS]
  for row, (question, choices) in zip(rows, QUESTIONS, strict=True):
    context = model.tokenizer.encode(question, add_special_tokens=False)
    whole = [model.tokenizer.encode(question + choice, add_special_tokens=False) for choice in choices]
    assert all(ids[: len(context)] == context for ids in whole)
    expected = [loglikelihood(model, scores, context, ids[len(context) :]) for ids in whole]
    told = [float(of[0][0]) for of in row["resps"]]
    assert told == pytest.approx(expected, abs=2e-3)
    assert row["acc"] == float(np.argmax(expected) == 0)


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_texts_are_those_of_the_server(served, kind):
  server = served[0]
  chat = kind == "local-chat-completions"
  path = "/v1/chat/completions" if chat else "/v1/completions"
  rows = evaluate(served, kind, path, "go_on", *(["--apply_chat_template"] if chat else []))
  for row, (question, _) in zip(rows, QUESTIONS, strict=True):
    body = {"max_tokens": 12, "temperature": 0, "stop": [" the"]}
    if chat:
      body |= {"messages": [{"role": "user", "content": question}]}
      expected = server.http.post(path, json=body).json()["choices"][0]["message"]["content"]
    else:
      # lm-eval encodes without special tokens.
      body |= {"prompt": question, "add_special_tokens": False}
      expected = server.http.post(path, json=body).json()["choices"][0]["text"]
    assert row["resps"] == [[expected]] and " the" not in expected
