"""What people type at an LLM: parameters, conversations, streams, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from sparse_serve_jax import LLM, Detokenizer, SamplingParams
from sparse_serve_jax.llm import ChatOptions
from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.models.tokenizer import load_tokenizer
from sparse_serve_jax.sampling_params import SamplingOptions
from tests.tiny import SMALL_SERVING

N = 12
TEXT = "A heron stands in the shallow water."
ASKED = [{"role": "user", "content": "Who counts the steps?"}]
RENDERED = list(b"<user>Who counts the steps?\n<assistant>")


@pytest.fixture(scope="module")
def llm() -> LLM:
  return LLM("random:tiny", config="sparse_serve", overrides=SMALL_SERVING)


@pytest.fixture(scope="module")
def plain(llm: LLM) -> Any:
  """What comes of TEXT, greedily and to the end."""
  return llm.generate(TEXT, max_tokens=N, ignore_eos=True)[0]


# ---------------------------------------------------------------------------------------------------------- parameters


def test_none_is_the_default_and_every_field_can_be_a_keyword():
  fields = {field.name for field in dataclasses.fields(SamplingParams)}
  assert SamplingOptions.__annotations__.keys() == fields | {"max_new_tokens"}
  assert SamplingParams(**dict.fromkeys(SamplingOptions.__annotations__)) == SamplingParams()
  assert SamplingParams(max_new_tokens=7) == SamplingParams(max_tokens=7) != SamplingParams()


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"cache_salt": 5}, "cache_salt must be a text, got 5"),
    ({"temperature": "0.7"}, "temperature must be finite and at least 0, got '0.7'"),
    ({"temperature": float("inf")}, "got inf"),
    ({"temperature": True}, "got True"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
    ({"top_k": 1.5}, "top_k must be an integer of at least 0 and below 2\\*\\*31, got 1.5"),
    ({"min_p": 2}, "min_p must be at least 0 and at most 1, got 2"),
    ({"seed": 2**31}, "seed must be an integer of at least 0 and below 2\\*\\*31, got 2147483648"),
    ({"max_tokens": 2**31}, "max_tokens must be an integer of at least 1 and below 2\\*\\*31, got 2147483648"),
    ({"max_tokens": True}, "max_tokens must be an integer of at least 1 and below 2\\*\\*31, got True"),
    ({"max_new_tokens": True}, "max_new_tokens must be an integer of at least 1 and below 2\\*\\*31, got True"),
    ({"max_tokens": 3, "max_new_tokens": 4}, "max_new_tokens=4 is another name of max_tokens=3: give one of them"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
    ({"stop_token_ids": ["5"]}, "got \\['5'\\]"),
    ({"stop": [""]}, "stop must be a text or a list of texts, none empty, got \\[''\\]"),
    ({"stop": 5}, "stop must be a text"),
    ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
    ({"n": 0}, "n must be an integer of at least 1 and below 2\\*\\*31, got 0"),
    ({"logprobs": 21}, "logprobs must be an integer from 0 to 20, got 21"),
    ({"min_tokens": 4, "max_tokens": 3}, "min_tokens must be at most max_tokens=3, got 4"),
    ({"max_token": 3}, "there is no sampling parameter 'max_token'; the nearest is 'max_tokens'"),
    ({"max_length": 3}, "the nearest is 'max_tokens'"),
    ({"num_return_sequences": 3}, "the nearest is 'n'"),
    ({"beams": 3}, "there is no sampling parameter 'beams'"),
  ],
)
def test_a_wrong_parameter_is_named_with_its_value(llm: LLM, given, message):
  for ask in (SamplingParams, lambda **options: llm.generate(TEXT, **options), lambda **o: llm.chat(ASKED, **o)):
    with pytest.raises(ValueError, match=message):
      ask(**given)


def test_numbers_of_numpy_are_numbers():
  params = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), stop_token_ids=np.arange(2))  # pyright: ignore
  assert params == SamplingParams(max_tokens=3, temperature=0.5, stop_token_ids=(0, 1))
  assert type(params.max_tokens) is int and type(params.temperature) is float


def test_params_for_all_or_for_each(llm: LLM, plain):
  one = SamplingParams(max_tokens=3, ignore_eos=True)
  two = SamplingParams(max_tokens=5, ignore_eos=True)
  assert [of.token_ids for of in llm.generate([TEXT, TEXT], one)] == [plain.token_ids[:3]] * 2
  assert [of.token_ids for of in llm.generate([TEXT, TEXT], [one, two])] == [plain.token_ids[:3], plain.token_ids[:5]]
  assert llm.generate([], one) == llm.generate([], []) == []


@pytest.mark.parametrize(
  ("params", "options", "message"),
  [
    (50, {}, r"such as SamplingParams\(max_tokens=50\), or a list of 2, one for each prompt; got 50"),
    ({"max_tokens": 3}, {}, "got {'max_tokens': 3}"),
    ([SamplingParams()], {}, "one for each prompt; got 1"),
    ([SamplingParams(), 3], {}, "got 3"),
    (SamplingParams(), {"top_p": 0.5}, "give params or single options, got both: .* and top_p"),
  ],
)
def test_params_of_another_form(llm: LLM, params, options, message):
  with pytest.raises(ValueError, match=message):
    llm.generate([TEXT, TEXT], params, **options)


@pytest.mark.parametrize("prompts", [5, b"text", {"prompt": "x"}, None])
def test_prompts_of_another_form(llm: LLM, prompts):
  with pytest.raises(ValueError, match="prompts are a text or a list of token ids, or a list of these, got "):
    llm.generate(prompts)
  with pytest.raises(ValueError, match="prompt 0 is a message, which chat takes"):
    llm.generate(ASKED)  # pyright: ignore


def test_samples_of_a_prompt(llm: LLM):
  """Each with a seed of its own, the same as of a request that asks for one."""
  options: Any = {"max_tokens": N, "ignore_eos": True, "temperature": 1.0}
  outputs = llm.generate([TEXT, TEXT], n=3, seed=5, **options)
  drawn = [sample.token_ids for output in outputs for sample in output.samples]
  assert len(drawn) == 6 and len({tuple(tokens) for tokens in drawn}) == 6
  assert drawn[4] == llm.generate(TEXT, seed=9, **options)[0].token_ids
  assert outputs[1].token_ids == drawn[3] and outputs[1].usage.output_tokens == 3 * N
  assert outputs[1].usage.total_tokens == 3 * N + len(outputs[1].prompt_token_ids)
  cached = [sample.cached_tokens for sample in llm.generate(TEXT, n=3, cache_salt="mine", **options)[0].samples]
  n_prompt, size = len(outputs[0].prompt_token_ids), llm.config.cache.block_tokens
  assert cached == [0, *[(n_prompt - 1) // size * size] * 2] and cached[1] > n_prompt - size
  assert llm.generate(TEXT, cache_salt="mine", **options)[0].usage.cached_tokens == cached[1]
  each = llm.generate([TEXT, TEXT], [SamplingParams(n=2, seed=5, **options), SamplingParams(seed=5, **options)])
  assert [[sample.token_ids for sample in of.samples] for of in each] == [drawn[:2], drawn[:1]]


def test_log_probabilities(llm: LLM, plain):
  (output,) = llm.generate(TEXT, max_tokens=N, ignore_eos=True, logprobs=2)
  assert output.token_ids == plain.token_ids and plain.logprobs is None
  assert output.logprobs is not None and len(output.logprobs) == N
  for token, of in zip(output.token_ids, output.logprobs, strict=True):
    assert list(of.top)[0] == token and of.top[token] == of.logprob < 0 and len(of.top) == 2  # noqa: RUF015


# -------------------------------------------------------------------------------------------------------- stop strings


def test_a_stop_string_ends_the_text_before_it(llm: LLM, plain):
  assert plain.text == bytes(t for t in plain.token_ids if t < 256).decode(errors="replace")
  at = next(i for i in range(3, len(plain.text) - 1) if plain.text.index(plain.text[i : i + 2]) == i)
  stop = plain.text[at : at + 2]
  engine = llm.engine
  (output,) = llm.generate(TEXT, max_tokens=N, ignore_eos=True, stop=["never", stop], logprobs=0)
  assert (output.text, output.finish_reason) == (plain.text[:at], "stop")
  assert output.token_ids == plain.token_ids[: len(output.token_ids)] != plain.token_ids
  assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
  assert stop in llm.model.tokenizer.decode(output.token_ids) or stop[1] == "\ufffd"
  assert not engine.has_work and engine._scheduler.pool_blocks_in_use == 0
  assert "".join(stream := llm.stream(TEXT, max_tokens=N, ignore_eos=True, stop=stop)) == plain.text[:at]
  assert (stream.output.text, stream.output.finish_reason) == (plain.text[:at], "stop")
  (late,) = llm.generate(TEXT, max_tokens=N, ignore_eos=True, stop=stop, min_tokens=N)
  assert (late.text, late.finish_reason) == (plain.text, "length")


# -------------------------------------------------------------------------------------------------------- conversations


def test_one_conversation_or_several(llm: LLM):
  params = SamplingParams(max_tokens=N, ignore_eos=True)
  (expected,) = llm.generate([RENDERED], params)
  one, several = llm.chat(ASKED, params), llm.chat([ASKED, ASKED], params)
  assert [one.token_ids, *(of.token_ids for of in several)] == [expected.token_ids] * 3
  assert one.prompt_token_ids == RENDERED == llm.encode_chat(ASKED)
  assert "".join(llm.stream(ASKED, params)) == one.text


def test_parts_of_type_text_are_joined(llm: LLM):
  parts = [{"type": "text", "text": "Who counts "}, {"type": "text", "text": "the steps?"}]
  assert llm.encode_chat([{"role": "user", "content": parts}]) == RENDERED


@pytest.mark.parametrize(
  ("messages", "message"),
  [
    ("hi", r'chat takes messages such as \[{"role": "user", "content": "..."}\], got \'hi\'; generate takes texts'),
    (["hi", "ho"], "chat takes messages such as"),
    ([], "a conversation has at least one message, such as .*, got an empty list"),
    ([[]], "a conversation has at least one message"),
    ([ASKED, []], "a conversation has at least one message"),
    ([{"content": "x"}], "message 0 needs a role, one of system, .*, got None"),
    ([{"role": "usr", "content": "x"}], "message 0 has the role 'usr'; the nearest is 'user'"),
    ([{"role": "User", "content": "x"}], "the nearest is 'user'"),
    ([*ASKED, {"role": "assistant"}], "message 1, of 'assistant', needs a content, .* got None"),
    ([*ASKED, "more"], "message 1 of a conversation such as .* is 'more'"),
    ([{"role": "user", "content": {"text": "x"}}], "needs a content"),
    (
      [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
      "has as part 0 one of type 'image_url'; only",
    ),
    ([{"role": "user", "content": ["x"]}], "has as part 0 one 'x'; only"),
    ([{"role": "user", "content": [{"type": "text"}]}], "has as part 0 one {'type': 'text'}; only"),
    (ASKED[0], "chat takes messages such as .*, got {'role'"),
    (5, "chat takes messages such as .*, got 5"),
  ],
)
def test_what_is_no_conversation(llm: LLM, messages, message):
  with pytest.raises(ValueError, match=message):
    llm.chat(messages, max_tokens=2)


@pytest.mark.parametrize("prompt", [None, 5, b"text", {"role": "user", "content": "x"}])
def test_what_cannot_be_streamed(llm: LLM, prompt: Any):
  with pytest.raises(ValueError, match=r"a stream takes a text, token ids or messages such as .*, got "):
    llm.stream(prompt)


class Recording(ByteTokenizer):
  def encode_chat(self, messages, add_generation_prompt=True, **options):
    self.seen = (messages, add_generation_prompt, options)
    return [1, 2, 3]


def test_what_a_template_takes_is_passed_on(llm: LLM, monkeypatch):
  tokenizer = Recording()
  monkeypatch.setattr(llm, "model", dataclasses.replace(llm.model, tokenizer=tokenizer))
  call = {"role": "assistant", "tool_calls": [{"function": {"name": "count"}}]}
  messages: Any = [*ASKED, call, {"role": "tool", "content": "3"}]
  tools, documents = [{"type": "function"}], [{"title": "a", "text": "b"}]
  llm.chat(messages, max_tokens=2, tools=tools, documents=documents, chat_template_kwargs={"enable_thinking": False})
  options = {"special_tokens_in_text": "text", "tools": tools, "documents": documents, "enable_thinking": False}
  assert tokenizer.seen == (messages, True, options)
  llm.chat([*ASKED, {"role": "assistant", "content": "The"}], continue_final_message=True, max_tokens=2)
  assert tokenizer.seen[1:] == (False, {"special_tokens_in_text": "text", "continue_final_message": True})
  assert len(ChatOptions.__annotations__) == len(SamplingOptions.__annotations__) + 5


def test_a_templated_text_gets_no_second_bos(llm: LLM, monkeypatch):
  tokenizer = load_tokenizer(pathlib.Path(__file__).parent / "goldens" / "tokenizer")
  monkeypatch.setattr(llm, "model", dataclasses.replace(llm.model, tokenizer=tokenizer))
  ids = tokenizer.encode("the cat")
  plain = tokenizer.encode("the cat", add_special_tokens=False)
  assert ids[1:] == plain and ids[0] == 0
  monkeypatch.setattr(llm, "_run", lambda prompts, *_: prompts)
  for text in ("the cat", "<s>the cat"):
    assert llm.generate([text]) == [ids]
  assert llm.generate("the cat", add_special_tokens=False) == [plain]
  assert llm.generate("<s><s>the cat") == [[0, 0, *plain]]  # somebody meant two
  assert llm.generate(tokenizer.apply_chat_template(ASKED)) == [llm.encode_chat(ASKED)]


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_half_a_character_is_named(llm: LLM, monkeypatch, kind):
  if kind == "file":
    tokenizer = load_tokenizer(pathlib.Path(__file__).parent / "goldens" / "tokenizer")
    monkeypatch.setattr(llm, "model", dataclasses.replace(llm.model, tokenizer=tokenizer))
  with pytest.raises(ValueError, match=r"^'prompt' has the lone surrogate '\\ud83d' at character 5"):
    llm.generate("half \ud83d")
  with pytest.raises(ValueError, match=r"^message 0, 'content': .* lone surrogate '\\ud83d' at character 5"):
    llm.chat([{"role": "user", "content": "half \ud83d"}])


# -------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_is_the_text_of_the_output(llm: LLM, plain):
  stream = llm.stream(TEXT, max_tokens=N, ignore_eos=True)
  with pytest.raises(RuntimeError, match="the stream has not ended"):
    _ = stream.output
  pieces = list(stream)
  assert "".join(pieces) == plain.text == stream.output.text and len(pieces) > 2 and "" not in pieces
  assert stream.output.token_ids == plain.token_ids and stream.output.finish_reason == "length"
  assert list(stream) == []


def test_other_calls_while_a_stream_is_read(llm: LLM, plain):
  stream = llm.stream(TEXT, max_tokens=N, ignore_eos=True)
  first = next(stream)
  other = llm.stream([1, 2, 3], max_tokens=2, ignore_eos=True)
  assert llm.generate(TEXT, max_tokens=N, ignore_eos=True)[0].token_ids == plain.token_ids
  assert first + "".join(stream) == plain.text and len(list(other)) <= 3


def test_a_stream_that_is_left_is_cancelled(llm: LLM, plain):
  with llm.stream(TEXT, max_tokens=N, ignore_eos=True) as stream:
    next(stream)
  assert stream.output.finish_reason == "cancelled" and plain.text.startswith(stream.output.text)
  for _ in llm.stream(TEXT, max_tokens=N, ignore_eos=True):
    break
  assert llm.engine.has_work
  assert llm.generate([1], max_tokens=1)[0].usage.output_tokens <= 1 and not llm.engine.has_work


def test_a_stream_tells_what_went_wrong(llm: LLM, monkeypatch):
  with pytest.raises(ValueError, match="a stream is one output, got n=2"):
    llm.stream(TEXT, n=2)
  stream = llm.stream(TEXT, max_tokens=N)
  executor = llm.engine._executor

  def fail(plan):
    raise RuntimeError("device gone")

  with monkeypatch.context() as patched:
    patched.setattr(executor, "submit", fail)
    with pytest.raises(RuntimeError, match="the device failed with RuntimeError: device gone"):
      list(stream)
  assert stream.output.finish_reason == "error"
  assert llm.generate(TEXT, max_tokens=2, ignore_eos=True)[0].finish_reason == "length"


def test_a_callback_can_make_text_of_its_tokens_and_cancel(llm: LLM, plain):
  detokenizer = Detokenizer(llm.model.tokenizer)

  def on_token(request, token):
    detokenizer.push(token)
    if len(request.output_tokens) == 4:
      llm.engine.cancel(request.id)

  (output,) = llm.generate(TEXT, max_tokens=N, ignore_eos=True, on_token=on_token)
  detokenizer.finish()
  assert output.finish_reason == "cancelled" and output.token_ids[:4] == plain.token_ids[:4]
  assert detokenizer.text == llm.model.tokenizer.decode(plain.token_ids[:4])


class Terminal:
  def __init__(self):
    self.written: list[str] = []

  def isatty(self) -> bool:
    return True

  def write(self, text: str) -> int:
    self.written.append(text)
    return len(text)

  def flush(self) -> None:
    pass


@pytest.mark.parametrize("delay", [0.0, 1e9])
def test_a_progress_bar_on_a_terminal(llm: LLM, monkeypatch, delay):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  monkeypatch.setattr("sparse_serve_jax.llm.BAR_DELAY", delay)
  llm.generate([TEXT] * 2, max_tokens=N, ignore_eos=True)
  assert (f"/{2 * N} " in "".join(terminal.written)) == (not delay)


# ---------------------------------------------------------------------------------------------------------------- dtype


def test_a_cpu_computes_in_float32_and_says_so(caplog):
  model = str(pathlib.Path(__file__).parents[1] / "models" / "reference")
  from sparse_serve_jax.models.here import load_model_here

  assert load_model_here(model).config.dtype == "float32"
  assert [record.getMessage() for record in caplog.records] == [
    "reference, in bfloat16, would be slow on a CPU: it runs in float32; --dtype=bfloat16 (dtype= in Python) keeps it"
  ]
  caplog.clear()
  memory = {"cache.hbm_bytes": "16MiB", "cache.dram_bytes": "64MiB", "scheduler.max_context": 1024}
  assert LLM(model, overrides=memory).model.config.dtype == "float32" and len(caplog.records) == 1
  caplog.clear()
  assert load_model_here(model, dtype="bfloat16").config.dtype == "bfloat16"
  assert load_model_here("random:tiny").config.dtype == "float32" and not caplog.records
