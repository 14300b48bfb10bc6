"""Tokenizers and chat templates, the file-based ones against transformers' output."""

from __future__ import annotations

import json
import pathlib
import shutil
import threading
import time

import pytest

from sparse_serve_jax.models.tokenizer import ByteTokenizer, load_tokenizer

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "tokenizer"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CHAT = [{"role": "user", "content": "hat?"}]


@pytest.fixture
def directory(tmp_path):
  return shutil.copytree(GOLDEN, tmp_path / "model")


def with_settings(directory: pathlib.Path, **settings):
  (directory / "chat_template.jinja").unlink(missing_ok=True)
  (directory / "tokenizer_config.json").write_text(json.dumps(settings))
  return load_tokenizer(directory)


@pytest.mark.parametrize("text", ["", "plain", "Überraschung: 猫\x00\n", "\U0001f600"])
def test_bytes_round_trip(text):
  tokenizer = ByteTokenizer()
  assert tokenizer.encode(text)[0] == 256
  assert tokenizer.encode(text, add_special_tokens=False) == list(text.encode())
  assert tokenizer.decode([*tokenizer.encode(text), 257]) == text


def test_bytes_decode_whatever_a_model_emits():
  tokenizer = ByteTokenizer()
  assert tokenizer.decode([0xFF, 0xC3, *range(258, 300), -1, 10**9, ord("a")]) == "\ufffd\ufffda"
  assert tokenizer.decode([256, ord("a"), 257], skip_special_tokens=False) == "<bos>a<eos>"
  assert tokenizer.vocab_size % 8 == 0 and tokenizer.vocab_size > max(tokenizer.eos_token_ids)


def test_bytes_chat():
  assert ByteTokenizer().apply_chat_template(CHAT) == "<user>hat?\n<assistant>"
  assert ByteTokenizer().apply_chat_template(CHAT, add_generation_prompt=False) == "<user>hat?\n"


def test_ids_and_text_match_transformers():
  tokenizer = load_tokenizer(GOLDEN)
  for (text, ids, plain), decoded in zip(EXPECTED["ids"], EXPECTED["text"], strict=True):
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, add_special_tokens=False) == plain
    assert tokenizer.decode(ids) == decoded
  assert tokenizer.decode([0, 262], skip_special_tokens=False) == "<s>the"
  assert tokenizer.vocab_size == EXPECTED["vocab_size"]


def test_chats_match_transformers():
  tokenizer = load_tokenizer(GOLDEN)
  for chat, prompt, whole in EXPECTED["chats"]:
    assert tokenizer.apply_chat_template(chat) == prompt
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=False) == whole


def test_a_template_may_refuse():
  with pytest.raises(ValueError, match="refuses this conversation: no system prompt"):
    load_tokenizer(GOLDEN).apply_chat_template([{"role": "system", "content": "x"}])


def test_a_template_cannot_leave_its_sandbox(directory):
  tokenizer = with_settings(directory, chat_template="{{ ''.__class__.__mro__ }}")
  with pytest.raises(ValueError, match="does not render"):
    tokenizer.apply_chat_template(CHAT)


def test_broken_and_absent_templates(directory):
  with pytest.warns(UserWarning, match=r"the chat template 'default', of tokenizer_config.json, is broken in line 2: "):
    tokenizer = with_settings(directory, chat_template="{{ 1 }}\n{% for %}")
  with pytest.raises(ValueError, match="does not render"):
    tokenizer.apply_chat_template(CHAT)
  with pytest.raises(ValueError, match="no chat template; it continues texts: `sparse-serve generate`"):
    with_settings(directory).apply_chat_template(CHAT)


def test_forms_of_templates_and_special_tokens(directory):
  bos = {"content": "<s>", "lstrip": False}
  named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{{ messages|length }}"}]
  tokenizer = with_settings(directory, chat_template=named, bos_token=bos, pad_token=None)
  assert tokenizer.apply_chat_template(CHAT) == "<s>1"
  tokenizer = with_settings(directory, chat_template="{{ strftime_now('%Y')|length }}{{ 'é'|tojson }}")
  assert tokenizer.apply_chat_template(CHAT) == '4"é"'


def test_save_restores_the_tokenizer(tmp_path):
  for tokenizer, text in ((load_tokenizer(GOLDEN), "the cat é"), (ByteTokenizer(), "the cat é")):
    directory = tmp_path / type(tokenizer).__name__
    directory.mkdir()
    tokenizer.save(directory)
    again = load_tokenizer(directory)
    assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
    assert again.encode(text) == tokenizer.encode(text)
    assert again.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)


def test_without_files_only_text_is_an_error(tmp_path):
  tokenizer = load_tokenizer(tmp_path)
  refusal = r"has no tokenizer.json.*pass token ids"
  with pytest.raises(ValueError, match=refusal):
    tokenizer.encode("x")
  assert tokenizer.decode([1]) == ""
  with pytest.raises(ValueError, match=refusal):
    tokenizer.apply_chat_template(CHAT)


def test_other_threads_run_while_a_long_text_is_encoded():
  tokenizer = load_tokenizer(pathlib.Path(__file__).parent.parent / "models" / "reference")
  ran, ended = list[float](), threading.Event()

  def run():
    while not ended.wait(0.001):
      ran.append(time.monotonic())

  thread = threading.Thread(target=run)
  thread.start()
  began = time.monotonic()
  ids = tokenizer.encode("the quick brown fox " * 50_000)
  took = time.monotonic() - began
  ended.set()
  thread.join()
  assert len(ids) > 50_000
  assert sum(began + took / 4 < at < began + took * 3 / 4 for at in ran) > 5
