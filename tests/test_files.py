"""Files that people bring: what is read, and which file and line an error names."""

from __future__ import annotations

import json

import pytest

from sparse_serve_jax import files


def test_lines_end_at_newlines_only_and_blank_ones_count(tmp_path):
  file = tmp_path / "rows.jsonl"
  file.write_bytes('{"a": "x\u2028y"}\r\n\n  \n{"a": "\\r"}'.encode())
  assert list(files.read_lines(file)) == [(1, {"a": "x\u2028y"}), (4, {"a": "\r"})]


def test_a_broken_line_is_told_and_the_others_are_read(tmp_path):
  file = tmp_path / "rows.jsonl"
  file.write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n\n[]\n{"a": 2}\n')
  rows = list(files.read_rows(file))
  assert [rows[0], rows[3]] == [(1, {"a": 1}), (5, {"a": 2})]
  assert [(line, str(error)) for line, error in rows[1:3]] == [
    (2, "not UTF-8: byte 0xe9 at byte 11 of the line"),
    (4, "wanted is a JSON object, got list"),
  ]


def test_a_byte_order_mark_is_no_text(tmp_path):
  for name, read in (("a.json", files.read_json), ("a.jsonl", lambda file: dict(files.read_lines(file))[1])):
    (tmp_path / name).write_text('{"é": 1}\n', encoding="utf-8-sig")
    assert read(tmp_path / name) == {"é": 1}
  assert files.read_text(tmp_path / "a.json") == '{"é": 1}\n'


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"a": 1}\n{"a": "caf\xe9"}\n', r":2: not UTF-8: byte 0xe9 at byte 11 of the line$"),
    ('{"a": 1}\n'.encode("utf-16"), r":1: not UTF-8: its byte order mark is that of UTF-16$"),
    (b'{"a": 1}\n\n{"a" 1}\n', r":3: not JSON: Expecting ':' delimiter, column 6$"),
    (b"[1]\n", r":1: wanted is a JSON object, got list$"),
    (b'{"a": ' + b"1" * 5000 + b"}", r":1: not JSON that can be read: Exceeds the limit"),
    (b"[" * 100_000, r":1: not JSON that can be read: "),
  ],
)
def test_what_is_no_row_is_named_with_its_line(tmp_path, content, message):
  file = tmp_path / "rows.jsonl"
  file.write_bytes(content)
  with pytest.raises(ValueError, match=r"rows\.jsonl" + message):
    list(files.read_lines(file))


def test_errors_in_a_json_file_have_the_line_in_it(tmp_path):
  file = tmp_path / "a.json"
  for content, message in (
    (b'{\n"a": }', r"a\.json:2: not JSON: Expecting value, column 6"),
    (b'{\n\n"a": "\xe9"}', r"a\.json:3: not UTF-8: byte 0xe9 at byte 7 of the line"),
    (b"[]", r"a\.json:1: .*got list"),
  ):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      files.read_json(file)


def test_what_is_no_file(tmp_path):
  for read in (files.read_text, files.read_json, lambda file: list(files.read_lines(file))):
    with pytest.raises(ValueError, match=r"none\.jsonl is missing"):
      read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r" is a directory, a file is wanted"):
      read(tmp_path)


def test_half_of_a_character_is_found_wherever_it_stands():
  fine = json.loads('{"a": "\\ud83d\\ude00", "b": [{"c": "\\u2028"}], "d": 1, "e": null}')
  assert files.lone_surrogate(fine) is None
  for key, value in (("x", "ab\ud83d"), ("x", ["ab", "\udc00"]), ("x", {"y": {"z": "\ud83d"}})):
    assert "'x' has the lone surrogate '\\ud" in (files.lone_surrogate(fine | {key: value}) or "")
  assert (files.lone_surrogate({"x": "ab\ud83d"}) or "").endswith("at character 2")
