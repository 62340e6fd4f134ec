from __future__ import annotations

import errno
import gzip
import os

import pytest

from srlm_fast.data.jsonl import read_jsonl, read_rows, write_json, write_jsonl, write_text
from srlm_fast.data.records import Example, user
from srlm_fast.errors import UserError

EXAMPLES = [Example(user('日本\u2028 \n "quoted"'), "ü"), Example(user("b"), "")]


def test_records_come_back_and_bytes_are_stable(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    write_jsonl(path, EXAMPLES)
    first = path.read_bytes()
    assert read_jsonl(path, Example) == EXAMPLES
    write_jsonl(path, (e.to_json() for e in EXAMPLES))
    assert path.read_bytes() == first
    assert "日本".encode() in first and first.count(b"\n") == 2
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_write_that_fails_midway_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, EXAMPLES)
    before = path.read_bytes()

    def broken():
        yield EXAMPLES[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_jsonl(path, broken())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_file_appears_by_one_rename_of_a_complete_neighbour(tmp_path, monkeypatch):
    path, sizes, rename = tmp_path / "a.txt", [], os.replace

    def spy(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        sizes.append(os.path.getsize(source))
        rename(source, target)

    monkeypatch.setattr(os, "replace", spy)
    write_text(path, "x" * 100_000)
    assert sizes == [100_000] and path.stat().st_size == 100_000


def test_disk_full_is_one_clear_sentence(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"summary.json: No space left .*; free some space"):
        write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "inside.txt", "y")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_rows_of_every_kind_of_file(tmp_path, name):
    text = (
        '{"a": 1}\r\n\n{"a": "ü\u2028"}\n'
        if "jsonl" in name
        else '\ufeff[{"a": 1},\n{"a": "ü\u2028"}]'
    )
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_rows(tmp_path / name) == [{"a": 1}, {"a": "ü\u2028"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl, line 3: broken JSON"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "a.json, line 2: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, row 2: expected a JSON object, found list"),
        ("a.jsonl", b"\xff\xfe", "cannot read .*a.jsonl"),
        ("a.jsonl.gz", b"not gzip", "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}')[:-9], "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(b"x")[:10] + b"\xff" * 20, "cannot read .*a.jsonl.gz"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 200_000, "a.jsonl, line 2: .* nested too deep"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"7" * 5000 + b"}", "line 2: .* too many digits"),
        ("a.jsonl", b'{"a": 1}\n{"a": ["\\ud83d"]}', "a.jsonl, row 2: .* not valid Unicode"),
        ("a.json", b'[{"a": 1}, {"\\uDe00": 1}]', "a.json, row 2: .* not valid Unicode"),
    ],
    ids=[
        "line",
        "list",
        "not-a-row",
        "not-utf8",
        "not-gzip",
        "cut-gzip",
        "damaged-gzip",
        "deep",
        "digits",
        "surrogate",
        "surrogate-key",
    ],
)
def test_broken_file_names_file_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_escaped_pairs_and_escapes_that_are_text_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"a": "\ud83d\ude00 \\ud83d"}')
    assert read_rows(path) == [{"a": "\U0001f600 \\ud83d"}]


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "a"}',
        '{"prompt": "a", "response": "b", "c": 1}',
        '{"prompt": [{}], "response": ""}',
    ],
)
def test_row_of_another_record_names_file_and_line(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + row + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: not a Example"):
        read_jsonl(path, Example)
