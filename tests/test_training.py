"""Training: the sequences hold what they ask for, the loop learns, a run that stops goes on as if it had not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_serve_jax.config import ModelConfig, find_config, read_config
from sparse_serve_jax.models import ByteTokenizer, Model, forward, init_params, load_model, save_hf
from sparse_serve_jax.serving import budget
from sparse_serve_jax.training import attention_losses, data, trainer
from sparse_serve_jax.training.config import AttentionLossWeights, Optimizer, Sources, Stage, TrainConfig
from sparse_serve_jax.training.run import Run, _check_memory
from sparse_serve_jax.training.vocabulary import train_tokenizer
from tests import forks, jsonl

MODEL = ModelConfig(
  vocab_size=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128, max_context=64,
  tie_embeddings=True, dtype="float32",
)  # fmt: skip
TOY = TrainConfig(
  MODEL,
  stages=(Stage(64, 32, 300),),
  optimizer=Optimizer(learning_rate=6e-3, warmup_steps=20, decay_steps=100, weight_decay=0.01),
  sources=Sources(repeat=1.0),
)


class Ids(ByteTokenizer):
  """Of which only the size of the vocabulary is asked."""

  vocab_size = MODEL.vocab_size


def shortened(*stages: Stage) -> TrainConfig:
  optimizer = dataclasses.replace(TOY.optimizer, warmup_steps=1, decay_steps=1)
  return dataclasses.replace(TOY, stages=stages, optimizer=optimizer)


# -------------------------------------------------------------------------------------------------------- the sequences


@pytest.mark.parametrize("source", ["text", "repeat", "recall", "tasks"])
@pytest.mark.parametrize("seed", [1, 3, 5])
def test_sequences_are_functions_of_their_seed(source: str, seed: int):
  config, tokenizer = dataclasses.replace(TOY, sources=Sources(**{source: 1.0})), ByteTokenizer()
  make = lambda seed: data.sequence(config, tokenizer, 400, np.random.default_rng(seed))  # noqa: E731
  (tokens, weights, index), again, other = make(seed), make(seed), make(seed + 1)
  assert data.SOURCES[index] == source
  assert tokens.shape == (401,) and weights.shape == (400,) and tokens.dtype == np.int32 and weights.dtype == np.float32
  assert tokens.tolist() == again[0].tolist() != other[0].tolist() and weights.tolist() == again[1].tolist()
  assert ((tokens >= 0) & (tokens < tokenizer.vocab_size)).all()
  context = np.float32(config.context_weight)
  of_answers = {float(w) for w in weights} - {0.0, float(context)}
  assert of_answers == (set() if source == "text" else {float(weights.max())})
  if source == "tasks":  # the whole answer weighs a fifth of the sequence, or its tokens 1 each
    n_answer = (weights >= 1).sum()
    assert weights.max() == pytest.approx(max(1, 80 / n_answer))
  elif source != "text":
    assert weights.max() == 1


def test_a_repeated_run_can_be_copied():
  """A token that counts follows its predecessor as it did before; of a huge vocabulary none comes by chance."""
  for seed in range(5):
    tokens, answer = data._repeat(np.random.default_rng(seed), 500, vocab=1 << 40)
    assert 0.35 < answer.mean() < 0.55
    for i in np.flatnonzero(answer):
      (before,) = np.flatnonzero(tokens[: i - 1] == tokens[i - 1])
      assert tokens[before + 1] == tokens[i]


def test_a_key_recalls_its_value_and_a_list_itself():
  sizes, lists = set(), 0
  for seed in range(40):
    tokens, answer = data._recall(np.random.default_rng(seed), 600, vocab=5000)
    first = int(np.flatnonzero(answer)[0])
    half = next(n for n in range(first, 0, -1) if sorted(tokens[:n]) == sorted(tokens[n : 2 * n]))
    if tokens[:half].tolist() == tokens[half : 2 * half].tolist():
      lists += 1
      assert 1 <= first - half <= 6 and answer[first:].all()  # all but the first key
      continue
    before = first - half  # of a key and what follows every key
    n_value = next(i for i in range(first, len(answer)) if not answer[i]) - first
    width = int(np.diff(np.flatnonzero(np.diff(answer.astype(int)) == 1))[0])
    pairs = tokens[:half].reshape(-1, width)
    value = slice(before, before + n_value)
    values = {tuple(pair[:before]): pair[value] for pair in pairs.tolist()}
    asked = tokens[half : 2 * half].reshape(-1, width).tolist()
    assert len(values) == len(pairs) and all(values[tuple(pair[:before])] == pair[value] for pair in asked)
    assert len({tuple(pair[before + n_value :]) for pair in pairs.tolist()}) == 1
    sizes.add((before, n_value, width))
  assert len(sizes) > 8 and 4 < lists < 20


def test_a_context_is_asked_about_as_often_as_there_is_room():
  tokenizer, n_questions = ByteTokenizer(), []
  for seed in range(30):
    ids, answer = data._task(np.random.default_rng(seed), 8000, tokenizer)
    assert len(ids) <= 8000
    asked, *others = (tokenizer.decode(ids.tolist())).split("Question: ")[1:]
    begins = np.flatnonzero(np.diff(answer.astype(int)) == 1)
    assert len(begins) == len(others) + 1
    for question in (asked, *others):
      assert " Answer:" in question and question.endswith("\n")
    n_questions.append(len(begins))
  assert 1 in n_questions and max(n_questions) > 10


def test_workers_make_the_same_batches():
  config = shortened(Stage(32, 4, 3), Stage(64, 2, 2))
  alone, spread = (list(data.batches(config, Ids(), 1, workers)) for workers in (0, 2))
  assert [batch.tokens.shape for batch in alone] == [(4, 33), (4, 33), (2, 65), (2, 65)]
  for a, b in zip(alone, spread, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.weights, b.weights)


def test_the_tokenizer_keeps_digits_and_lines_apart():
  tokenizer, again = train_tokenizer(600, n_documents=4), train_tokenizer(600, n_documents=4)
  text = "The special code of brave-otter is 48213.\nAnswer: 48213\nété"
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text and again.encode(text) == ids and tokenizer.vocab_size == 600
  pieces = [tokenizer.decode([i]) for i in ids]
  assert all(len(piece.strip()) == 1 for piece in pieces if any(c.isdigit() for c in piece))
  assert all(piece == "\n" for piece in pieces if "\n" in piece)
  # So prompt and completion may be encoded one by one.
  whole = tokenizer.encode("Answer: 48213\n")
  assert whole == tokenizer.encode("Answer:") + tokenizer.encode(" 48213\n", add_special_tokens=False)


# ------------------------------------------------------------------------------------------------------------- the loop


def test_the_forward_pass_is_the_models():
  params = trainer.init_params(MODEL, jax.random.key(0))
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 40)).astype(np.int32))
  batched, _ = trainer.forward(MODEL, params, tokens)
  for row, expected in zip(batched, tokens, strict=True):
    np.testing.assert_allclose(row, forward(MODEL, params, expected), rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_weighted_mean():
  params = trainer.init_params(MODEL, jax.random.key(0))
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, MODEL.vocab_size, (2, 9)).astype(np.int32)
  weights = rng.choice([0.0, 0.25, 1.0], (2, 8)).astype(np.float32)
  batch = data.Batch(tokens, weights, np.array([3, 1], np.int32))
  nats, found = trainer.loss(TOY, params, batch, jax.random.key(0), AttentionLossWeights())
  answers, right = found["answers"], found["right"]
  log_p = jax.nn.log_softmax(jnp.stack([forward(MODEL, params, row[:-1]) for row in jnp.asarray(tokens)]))
  picked = np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], 2)[..., 0]
  assert nats == pytest.approx(-(weights * picked).sum() / weights.sum(), rel=1e-4)
  hits = np.asarray(log_p.argmax(-1)) == tokens[:, 1:]
  for i, row in (3, 0), (1, 1):
    of_row = weights[row] == 1
    assert (int(answers[i]), int(right[i])) == (of_row.sum(), hits[row][of_row].sum())
  assert int(answers.sum()) == (weights == 1).sum()


def test_the_loss_has_what_the_stage_says_of_attention(monkeypatch):
  """Where answers are predicted, as many as there are here; of all layers."""
  monkeypatch.setattr(trainer, "QUERIES_PER_SEQUENCE", 3)
  monkeypatch.setattr(attention_losses, "MAX_KL_NATS", 0.0)
  monkeypatch.setattr(attention_losses, "TOP_BLOCKS", 2)
  params, rng = trainer.init_params(MODEL, jax.random.key(0)), np.random.default_rng(0)
  tokens, answers = rng.integers(0, MODEL.vocab_size, (2, 201)).astype(np.int32), np.array([[150, 199, 170]] * 2)
  weights = np.full((2, 200), TOY.context_weight, np.float32)
  np.put_along_axis(weights, answers, 1.0, 1)
  batch, at = data.Batch(tokens, weights, np.zeros(2, np.int32)), jnp.asarray(answers)
  look = lambda q, k: {name: of(q, k, at) for name, of in attention_losses.LOSSES.items()}  # noqa: E731
  _, expected = trainer.forward(MODEL, params, jnp.asarray(tokens[:, :-1]), look)
  assert min(expected.values()) > 1e-5

  def loss(**weights: float) -> tuple:
    return trainer.loss(TOY, params, batch, jax.random.key(0), AttentionLossWeights(**weights))

  nats, plain = loss()
  assert nats == plain["loss"] and not plain["attention"]
  of_stage = {"digest": 2.0, "sharpness": 3.0, "diffuseness": 4.0}
  total, found = loss(**of_stage)
  assert found["attention"] == {name: pytest.approx(float(x), rel=1e-4) for name, x in expected.items()}
  assert total == pytest.approx(float(nats + sum(of_stage[name] * x for name, x in expected.items())), rel=1e-4)
  assert [*loss(sharpness=1.0)[1]["attention"]] == ["sharpness"]


def test_attention_counts_in_the_stages_that_say_so(tmp_path, monkeypatch):
  monkeypatch.setattr(attention_losses, "BLOCK_TOKENS", 8)
  config, found = shortened(Stage(64, 1, 2), Stage(64, 1, 2, AttentionLossWeights(digest=1.0))), []
  run = trainer.Trainer(config, tmp_path)
  run.run(data.batches(config, Ids(), 0, 0), 1000, lambda step, metrics, _: found.append(metrics.attention))
  assert not any(found[:2]) and all(of["digest"] > 0 for of in found[2:]) and len(found) == 4


@pytest.mark.slow
def test_it_learns_to_copy(tmp_path, optimized):
  """The tokens are uniform: without looking back nothing is below ln 64 = 4.16 nats."""
  losses = []
  run = trainer.Trainer(TOY, tmp_path)
  run.run(data.batches(TOY, Ids(), 0, 0), 1000, lambda step, metrics, _: losses.append(float(metrics.loss)))
  assert len(losses) == TOY.steps and losses[0] > 4
  assert np.mean(losses[-20:]) < 3


def test_a_run_that_stops_goes_on(tmp_path):
  config = shortened(Stage(32, 4, 2), Stage(64, 2, 3))

  def train(name: str, *seconds: float) -> trainer.Trainer:
    for limit in seconds:
      run = trainer.Trainer(config, tmp_path / name)
      run.run(data.batches(config, Ids(), run.step, 0), limit)
    return run

  whole = train("whole", 1000)
  pieces = train("pieces", 0, 0, 1000)  # 0: a step, then time is over
  assert whole.step == pieces.step == 5
  for a, b in zip(*(jax.tree.leaves(run.state) for run in (whole, pieces)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_a_failure_leaves(tmp_path):
  """The steps made until then are saved."""
  config = shortened(Stage(32, 4, 5))

  def batches():
    yield from itertools.islice(data.batches(config, Ids(), 0, 0), 3)
    raise OSError("no more")

  run = trainer.Trainer(config, tmp_path)
  with pytest.raises(OSError, match="no more"):
    run.run(batches(), 1000)
  assert trainer.Trainer(config, tmp_path).step == 3


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt", "array_metadatas/process_0", "ocdbt.process_0/d/*"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_checkpoint_that_is_damaged_is_one_line(tmp_path, capfd, file, gone):
  trainer.Trainer(TOY, tmp_path).save()
  checkpoint = tmp_path / "checkpoints" / "0" / "default"
  damaged = max(checkpoint.glob(file), key=lambda file: file.stat().st_size)
  if not gone:
    os.truncate(damaged, damaged.stat().st_size // 2)
  elif damaged.parent.name != "array_metadatas":  # which may be missing
    damaged.unlink()
  else:
    os.truncate(damaged, 0)
  capfd.readouterr()
  with pytest.raises(ValueError, match=f"^{checkpoint}") as error:
    trainer.Trainer(TOY, tmp_path)
  assert "\n" not in str(error.value) and re.search("cannot be read|not JSON|no whole checkpoint", str(error.value))
  assert capfd.readouterr().err == ""


def test_a_checkpoint_that_memory_has_no_room_for_is_not_called_damaged(tmp_path, monkeypatch):
  import orbax.checkpoint as ocp  # slow to import

  trainer.Trainer(TOY, tmp_path).save()

  def full(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

  monkeypatch.setattr(ocp.CheckpointManager, "restore", full)
  with pytest.raises(jax.errors.JaxRuntimeError, match="^RESOURCE_EXHAUSTED"):
    trainer.Trainer(TOY, tmp_path)


def test_a_checkpoint_that_a_disk_has_no_room_for_is_one_line(tmp_path, monkeypatch, caplog):
  run = trainer.Trainer(TOY, tmp_path)

  def full(*_, **__):
    logging.getLogger("absl").error("Traceback (most recent call last), of a thread")
    late = RuntimeError("Event loop is closed")
    sys.unraisablehook(types.SimpleNamespace(exc_type=RuntimeError, exc_value=late, exc_traceback=None, object=None))
    raise ValueError(
      'RESOURCE_EXHAUSTED: Error writing "params.embed/0.0" in OCDBT database at local file "/tmp/d/": Failed writing: '
      "\"/tmp/d/2dda\": Failed to write 9 bytes to file 4: No space left on device [os_error_code='28'] [source='x']"
    )

  with monkeypatch.context() as patch, pytest.raises(OSError) as error:
    patch.setattr(run._checkpoints, "save", full)
    run.save()
  assert str(error.value) == f"{tmp_path / 'checkpoints' / '0'} cannot be written: No space left on device"
  assert not caplog.records
  run.save()
  assert trainer.Trainer(TOY, tmp_path).step == 0


def test_a_run_starts_from_parameters(tmp_path):
  other = trainer.init_params(MODEL, jax.random.key(7))
  given = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), other)  # as a shipped model has them
  run = trainer.Trainer(TOY, tmp_path, start_from=given)
  jax.tree.map(np.testing.assert_array_equal, run.state.params, jax.tree.map(lambda x: x.astype(np.float32), given))


@pytest.mark.filterwarnings("ignore:.*it never comes")  # 64 tokens are too few for those of bytes
def test_a_run_starts_from_a_loaded_model(tmp_path):
  """When it goes on, the model is not needed any more."""
  save_hf(Model(MODEL, init_params(MODEL, 3), ByteTokenizer(), (), "given"), tmp_path / "given")
  given = load_model(tmp_path / "given").params
  run = trainer.Trainer(TOY, tmp_path / "run", start_from=given)
  jax.tree.map(np.testing.assert_array_equal, run.state.params, init_params(MODEL, 3))
  run.save()
  shutil.rmtree(tmp_path / "given")
  assert trainer.Trainer(TOY, tmp_path / "run", start_from=given).step == 0


def test_parameters_of_another_model_are_refused(tmp_path):
  other = trainer.init_params(dataclasses.replace(MODEL, d_model=32), jax.random.key(0))
  with pytest.raises(ValueError, match="of another model"):
    trainer.Trainer(TOY, tmp_path, start_from=other)


def test_only_norms_do_not_decay():
  config = dataclasses.replace(TOY.optimizer, learning_rate=0.5, warmup_steps=0, weight_decay=0.5)
  params = trainer.init_params(dataclasses.replace(MODEL, qk_norm=True), jax.random.key(0))
  optimizer = trainer.optimizer_of(config, 100)
  nothing = jax.tree.map(jnp.zeros_like, params)
  with jax.numpy_dtype_promotion("standard"):
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    assert bool((update == 0).all()) == path[-1].key.endswith("norm"), path


# ---------------------------------------------------------------------------------------------------------- the program

RUN = {
  "model": {
    "vocab_size": 600, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 64,
    "max_context": 320, "tie_embeddings": True, "dtype": "float32",
  },
  "stages": [{"tokens": 128, "sequences": 2, "steps": 3}, {"tokens": 320, "sequences": 2, "steps": 2}],
  "sources": {"text": 1, "tasks": 2},
  "optimizer": {"warmup_steps": 1},
}  # fmt: skip


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
  return forks.start("experiments.train_reference", "--workers=0", *arguments)


@pytest.mark.slow
def test_the_program_in_two_pieces(tmp_path):
  """The second goes on where the first stopped and leaves a model that others can load."""
  (tmp_path / "run.json").write_text(json.dumps(RUN))
  arguments = f"--config={tmp_path / 'run.json'}", f"--out={tmp_path / 'run'}", "--verbose"
  first = start(*arguments, "--seconds=0")
  assert json.loads(first.stdout.splitlines()[-1]) == {"steps": 1, "of": 5}, first.stderr
  refused = start(*arguments[:2])
  assert refused.returncode == 2 and "--resume goes on with it" in refused.stderr.splitlines()[-1]
  (tmp_path / "other.json").write_text(json.dumps(RUN | {"seed": 1}))
  other = start(f"--config={tmp_path / 'other.json'}", arguments[1], "--resume")
  assert other.returncode == 2 and "config.seed was 0 and is 1" in other.stderr.splitlines()[-1]
  second = start(*arguments, "--resume", "--log_every=2")
  assert second.returncode == 0, second.stderr
  result = json.loads(second.stdout.splitlines()[-1])
  assert result == {"steps": 5, "of": 5}
  rows = jsonl.read(tmp_path / "run" / "metrics.jsonl")
  assert [row["step"] for row in rows] == [2, 4, 5] and rows[-1]["tokens"] == 320
  model = load_model(tmp_path / "run" / "hf")
  assert model.config.n_layers == 2 and model.eos_token_ids == (1,)
  assert model.tokenizer.decode(model.tokenizer.encode("a needle\n")) == "a needle\n"


@pytest.mark.parametrize("stage", [Stage(64, 31, 1), Stage(512, 15, 1)], ids=("short", "long"))  # for one device
@pytest.mark.parametrize("vocab_size", [1000, 4096])
def test_the_memory_of_a_step_is_what_the_compiler_says(tmp_path, optimized, stage, vocab_size):
  sizes = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=256, vocab_size=vocab_size)
  cfg = dataclasses.replace(MODEL, max_context=512, **sizes)
  of = trainer.Trainer(TrainConfig(cfg, (dataclasses.replace(stage, steps=300),), TOY.sources), tmp_path)
  shape = stage.sequences, stage.tokens
  batch = data.Batch(
    np.zeros((shape[0], shape[1] + 1), np.int32), np.ones(shape, np.float32), np.zeros(shape[0], np.int32)
  )
  said = of._step.lower(of.state, batch, AttentionLossWeights()).compile().memory_analysis()
  assert said and 0.75 < trainer.step_bytes(cfg, stage) / (said.temp_size_in_bytes + said.argument_size_in_bytes) < 1.25


def test_a_run_that_does_not_fit_the_host_is_refused_before_it_begins(tmp_path, monkeypatch):
  monkeypatch.setattr(budget, "host_bytes_free", lambda: 16 << 30)
  config = read_config(TrainConfig, find_config("training", "reference"))
  with pytest.raises(ValueError) as error:
    Run(config, tmp_path / "out")
  assert str(error.value).startswith(
    "a step of 8 sequences of 16384 tokens needs some 803.23 GiB, and 16.00 GiB of the host are free: give a --config"
  )
  assert not (tmp_path / "out").exists()  # a smaller one takes it
  last = shortened(Stage(64, 2**20, 3), Stage(16, 1, 3))
  with pytest.raises(ValueError, match="a step of 1048576 sequences of 64 tokens"):
    _check_memory(last, 2)
  _check_memory(last, 3)  # what is over needs none


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"stages": [{"tokens": 512, "sequences": 1, "steps": 1}]}, "a stage of 512 tokens exceeds model.max_context=320"),
    ({"stages": [{"tokens": 16, "sequences": 0, "steps": 1}]}, "at least 1, weights 0, got .'tokens'"),
    ({"optimizer": {"learning_rate": -1.0}}, "'learning_rate': -1.0"),
    ({"stages": [{"tokens": 16, "sequences": 1, "steps": 1, "attention_loss": {"digest": -1.0}}]}, "'digest': -1.0"),
    ({"sources": {"text": 0}}, "one is more, got .'text'"),
    ({"sources": {"tex": 1}}, "unknown key 'tex'"),
    ({"optimizer": {"warmup_steps": 3, "decay_steps": 3}}, "= 6 exceed the 5 steps"),
    ({"stage": []}, "unknown key 'stage'"),
    ({"stages": {}}, "stages: expected a list"),
    ({"stages": [{"tokens": 128, "sequences": 2, "steps": "3"}]}, r"stages\[0\].steps: expected int"),
    ({"context_weight": 1.0}, "context_weight=1.0 is not in"),
    ({"stages": []}, "one stage or more"),
  ],
)
def test_a_wrong_configuration_is_told(tmp_path, change, message):
  file = tmp_path / "run.json"
  file.write_text(json.dumps(RUN | change))
  with pytest.raises(ValueError, match=message) as error:
    read_config(TrainConfig, file)
  assert str(file) in str(error.value)
