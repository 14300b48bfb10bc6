"""Text in, text out, and what a caller can do to an LLM without breaking it."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from sparse_serve_jax import LLM
from sparse_serve_jax.models import ByteTokenizer, forward, place_params
from sparse_serve_jax.models.tokenizer import NoTokenizer
from sparse_serve_jax.serving import executor as executors
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from tests.forks import ROOT
from tests.tiny import SMALL_SERVING

N = 10
TEXT = "A heron stands in the shallow water."
TEXTS = [
  "The lighthouse keeper climbs one hundred and twelve steps every evening, and counts them again on his way down.",
  TEXT,
  "Ships pass. " * 15,
]


@pytest.fixture(scope="module")
def llm() -> LLM:
  return LLM("random:tiny", config="sparse_serve", overrides=SMALL_SERVING)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
  return tokens_of(llm, *(llm.model.tokenizer.encode(text) for text in TEXTS))


def tokens_of(llm: LLM, *prompts: list[int], **options) -> list[list[int]]:
  """What an engine of its own makes of each prompt, alone."""
  engine, outputs = Engine(JaxExecutor(llm.config, llm.model)), []
  for prompt in prompts:
    request = engine.add_request(prompt, **{"max_new_tokens": N, "ignore_eos": True, **options})
    engine.run()
    outputs.append(request.output_tokens)
  return outputs


def generated(llm: LLM, texts: Any = TEXTS, **options) -> list[list[int]]:
  return [output.token_ids for output in llm.generate(texts, max_new_tokens=N, ignore_eos=True, **options)]


def test_text_in_and_out(llm: LLM, expected):
  outputs = llm.generate(TEXTS, max_new_tokens=N, ignore_eos=True)
  assert [output.token_ids for output in outputs] == expected
  assert len({tuple(tokens) for tokens in expected}) == 3
  for output in outputs:
    assert output.text == bytes(t for t in output.token_ids if t < 256).decode(errors="replace")
    assert output.finish_reason == "length"
    times = output.times
    assert times.scheduled is not None and times.first_token is not None and times.between_tokens is not None
    assert 0 <= times.scheduled <= times.first_token < times.total and times.between_tokens > 0
    assert output.logprobs is None and output.error is None and len(output.samples) == 1
    assert (output.usage.prompt_tokens, output.usage.output_tokens) == (len(output.prompt_token_ids), N)


def test_tokens_are_those_of_the_model(llm: LLM):
  """The budget holds all of this text, so a forward pass over the whole sequence gives the same tokens."""
  ids = ByteTokenizer().encode(TEXT)
  n_prompt = len(ids)
  assert n_prompt + N <= llm.config.sparse.token_budget
  params = place_params(llm.model)
  step = jax.jit(lambda tokens: forward(llm.model.config, params, tokens))
  for _ in range(N):
    ids.append(int(step(np.array(ids + [0] * (64 - len(ids)), np.int32))[len(ids) - 1].argmax()))
  assert generated(llm, TEXT) == [ids[n_prompt:]]


def test_one_text_or_several(llm: LLM, expected):
  assert generated(llm, TEXT) == generated(llm, [TEXT]) == expected[1:2]
  assert generated(llm, []) == []


def test_token_ids_are_taken_as_they_are(llm: LLM, expected):
  ids = llm.model.tokenizer.encode(TEXTS[0])
  outputs = llm.generate([ids, TEXTS[1]], max_new_tokens=N, ignore_eos=True)
  assert [output.token_ids for output in outputs] == expected[:2]
  for one in (ids, tuple(ids), np.asarray(ids)):
    assert generated(llm, one) == expected[:1]
  with pytest.raises(ValueError, match=r"a prompt is a list of token ids, got \['a'\]"):
    llm.generate([[1, 2, 3], ["a"]])  # pyright: ignore
  with pytest.raises(ValueError, match=r"a prompt is a list of token ids, got \[\[1\], \[2, 3\]\]"):
    llm.generate([[[1], [2, 3]]])  # pyright: ignore


def test_an_empty_text_is_begin_of_text_alone(llm: LLM):
  assert generated(llm, "") == tokens_of(llm, [ByteTokenizer.bos_token_id])
  for nothing, options in (([], {}), ("", {"add_special_tokens": False})):
    with pytest.raises(ValueError, match="the prompt is empty, at least one token is needed"):
      llm.generate([nothing], **options)


def test_without_a_tokenizer_token_ids_come_out(llm: LLM, expected, monkeypatch, tmp_path):
  prompt = llm.model.tokenizer.encode(TEXT)
  monkeypatch.setattr(llm, "model", dataclasses.replace(llm.model, tokenizer=NoTokenizer(tmp_path)))
  (output,) = llm.generate([prompt], max_new_tokens=N, ignore_eos=True)
  assert output.token_ids == expected[1] and output.text == ""
  assert not list(llm.stream(prompt, max_new_tokens=2))
  with pytest.raises(ValueError, match="has no tokenizer.json, so text cannot be read: pass token ids"):
    llm.generate(TEXT)
  with pytest.raises(ValueError, match=r"stop strings \['x'\] need text, and the model has no tokenizer"):
    llm.generate([prompt], stop=["x"])


def test_a_stop_token_ends_the_text(llm: LLM, expected):
  stop = next(t for i, t in enumerate(expected[1]) if i and t not in expected[1][:i])
  (output,) = llm.generate(TEXT, max_new_tokens=N, ignore_eos=True, stop_token_ids=[stop])
  assert (output.finish_reason, output.token_ids) == ("stop", expected[1][: expected[1].index(stop)])


def test_the_models_own_end_of_text(llm: LLM, expected, monkeypatch):
  stop = next(t for i, t in enumerate(expected[1]) if i and t not in expected[1][:i])
  # The engine asks its model when a request is added.
  monkeypatch.setattr(llm.engine, "_model", dataclasses.replace(llm.model, eos_token_ids=(stop,)))
  assert generated(llm, TEXT) == expected[1:2]
  (output,) = llm.generate(TEXT, max_new_tokens=N)
  assert (output.finish_reason, output.token_ids) == ("stop", expected[1][: expected[1].index(stop)])


def test_chat_uses_the_template_and_adds_no_special_tokens(llm: LLM):
  messages = [{"role": "user", "content": "Who counts the steps?"}]
  prompt = list(b"<user>Who counts the steps?\n<assistant>")
  output = llm.chat(messages, max_new_tokens=N, ignore_eos=True)
  assert [output.token_ids] == tokens_of(llm, prompt) != tokens_of(llm, [ByteTokenizer.bos_token_id, *prompt])


class Shouting(ByteTokenizer):
  _TEMPLATE = "{% for message in messages %}{{ message.content | upper }}!{% endfor %}"


def test_chat_of_another_template(llm: LLM, monkeypatch):
  monkeypatch.setattr(llm, "model", dataclasses.replace(llm.model, tokenizer=Shouting()))
  output = llm.chat([{"role": "user", "content": "hello"}], max_new_tokens=N, ignore_eos=True)
  assert [output.token_ids] == tokens_of(llm, list(b"HELLO!"))


def test_every_text_draws_with_a_seed_of_its_own(llm: LLM):
  drawn = generated(llm, [TEXT, TEXT, TEXT], temperature=1.0, seed=5)
  assert len({tuple(tokens) for tokens in drawn}) == 3
  assert drawn[2:] == generated(llm, TEXT, temperature=1.0, seed=7)
  assert drawn == generated(llm, [TEXT, TEXT, TEXT], temperature=1.0, seed=5)


def test_tokens_are_streamed_as_they_come(llm: LLM, expected):
  seen: list[tuple[str, int]] = []
  generated(llm, on_token=lambda request, token: seen.append((request.id, token)))
  for i, tokens in enumerate(expected):
    assert [token for name, token in seen if name == f"text-{i}"] == tokens
  assert [name for name, _ in seen] == ["text-0", "text-1", "text-2"] * N  # all began in one iteration


def test_a_process_ends_when_its_last_programs_have(monkeypatch):
  """Also those of an engine that nobody has any more. It aborts otherwise."""
  monkeypatch.setattr(executors, "_LAST", {})
  left = LLM("random:tiny", overrides=SMALL_SERVING)
  executor: Any = left.engine._executor
  assert next(left.stream(TEXT, max_tokens=N))
  last = Mock(is_ready=lambda: last.block_until_ready.called)
  executor._call(lambda: last)
  with monkeypatch.context() as patch:
    waited: list[JaxExecutor] = []
    patch.setattr(JaxExecutor, "wait", lambda self: waited.append(self))
    executors._end()
  assert waited == [executor] and not last.block_until_ready.called
  waited.clear()
  del left, executor
  gc.collect()
  executors._end()
  last.block_until_ready.assert_called_once_with()
  LLM("random:tiny", overrides=SMALL_SERVING)
  assert not executors._LAST


DROPPED = """
import concurrent.futures.thread, gc, weakref
from sparse_serve_jax import LLM
from tests.tiny import SMALL_SERVING

gc.disable()
llm = LLM("random:tiny", overrides=[*SMALL_SERVING, "cache.save=staged", "cache.hbm_bytes=2MiB"])
assert next(llm.stream("The", max_tokens=8, ignore_eos=True))
llm.itself, engine = llm, weakref.ref(llm.engine)
del llm
with concurrent.futures.thread._global_shutdown_lock:  # as within ThreadPoolExecutor.submit
  gc.collect()
assert engine() is None
"""


def test_garbage_collection_waits_for_nothing():
  """It comes anywhere, also where its thread has a lock that waiting for a device needs."""
  done = subprocess.run([sys.executable, "-c", DROPPED], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_what_a_callback_raises_is_raised(llm: LLM, expected, error):
  def broken(request, token):
    if request.id == "text-1" and len(request.output_tokens) == 3:
      raise error

  engine = llm.engine
  with pytest.raises(type(error)) as caught:
    generated(llm, on_token=broken)
  assert caught.value is error
  assert generated(llm) == expected and llm.engine is engine


def test_a_prompt_that_is_too_long_is_refused(llm: LLM, expected):
  called = []
  limit = llm.engine.max_request_tokens
  text = "x" * limit
  with pytest.raises(ValueError, match=rf"{limit + 1} prompt \+ {N} output tokens = {limit + 1 + N}, but only {limit}"):
    generated(llm, [TEXT, text], on_token=lambda request, token: called.append(token))
  assert not called  # nor was the other text run
  assert generated(llm) == expected
  with pytest.raises(ValueError, match="temperature must be finite"):
    generated(llm, temperature=-1)
  assert generated(llm) == expected


class Interrupted:
  """Raises instead of the n-th submit of an executor, or of the n-th result, and never again."""

  def __init__(self, executor, what: str, n: int, error: BaseException):
    self._submit, self._what, self._left, self._error = executor.submit, what, n, error
    executor.submit = self.submit

  def check(self, what: str) -> None:
    if what == self._what:
      self._left -= 1
      if not self._left:
        raise self._error

  def submit(self, plan):
    self.check("submit")
    pending = self._submit(plan)
    result = pending.result

    def read():
      self.check("result")
      return result()

    pending.result = read
    return pending


@pytest.mark.parametrize("n", [1, 7])
def test_an_interrupted_read_leaves_the_engine_working(llm: LLM, expected, monkeypatch, n):
  engine = llm.engine
  monkeypatch.setattr(engine._executor, "submit", engine._executor.submit)  # puts back what comes now
  Interrupted(engine._executor, "result", n, KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt):
    generated(llm)
  assert generated(llm) == expected and generated(llm, TEXT) == expected[1:2]
  assert llm.engine is engine and not engine.has_work
  assert engine._scheduler.pool_blocks_in_use == 0


@pytest.mark.parametrize("n", [1, 7])
def test_an_interrupted_dispatch_makes_a_new_engine(llm: LLM, expected, n):
  engine, weights = llm.engine, llm.engine._executor.params["embed"]
  Interrupted(engine._executor, "submit", n, KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt):
    generated(llm)
  with pytest.raises(RuntimeError, match="this engine has failed: .*make a new one"):
    engine.add_request([1], 1)
  assert generated(llm) == expected
  assert llm.engine is not engine and not llm.engine.has_work
  assert llm.engine._executor.params["embed"] is weights  # not read again


@pytest.mark.parametrize("what", ["submit", "result"])
def test_a_device_that_fails_ends_what_it_held(llm: LLM, expected, monkeypatch, what):
  engine = llm.engine
  monkeypatch.setattr(engine._executor, "submit", engine._executor.submit)
  Interrupted(engine._executor, what, 5, RuntimeError("device gone"))
  outputs = llm.generate(TEXTS, max_new_tokens=N, ignore_eos=True)
  for output, tokens in zip(outputs, expected, strict=True):
    assert (output.finish_reason, output.error) == ("error", "the device failed with RuntimeError: device gone")
    assert output.token_ids == tokens[: len(output.token_ids)]
  assert generated(llm) == expected and llm.engine is engine


def test_a_device_that_cannot_go_on_makes_a_new_engine(llm: LLM, expected, monkeypatch):
  engine = llm.engine

  def no_device() -> None:
    raise RuntimeError("no device")

  monkeypatch.setattr(engine._executor, "reset", no_device)
  Interrupted(engine._executor, "result", 3, RuntimeError("device gone"))
  outputs = llm.generate(TEXTS, max_new_tokens=N, ignore_eos=True)
  assert [output.finish_reason for output in outputs] == ["error"] * 3 and engine.failed
  assert generated(llm) == expected and llm.engine is not engine


def test_configuration_and_overrides_may_be_dicts(llm: LLM):
  changes = dict(assignment.split("=") for assignment in SMALL_SERVING)
  values = {key: int(text) if text.isdigit() else text for key, text in changes.items()}
  assert LLM("random:tiny", {"extends": "sparse_serve"}, values).config == llm.config


def test_what_does_not_fit_is_refused_when_it_is_loaded():
  with pytest.raises(ValueError, match="cache.hbm_bytes=1000 is below the minimum of [0-9]+ bytes"):
    LLM("random:tiny", overrides=[*SMALL_SERVING, "cache.hbm_bytes=1000"])
  with pytest.raises(ValueError, match="the nearest is 'sparse.token_budget'"):
    LLM("random:tiny", overrides=["sparse.token_budgte=4"])
