"""Reading and writing of JSON and jsonl files: atomic, byte-deterministic, with clear errors."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from srlm_fast.data.records import Record
from srlm_fast.errors import UserError

R = TypeVar("R", bound=Record)
StrPath = str | os.PathLike[str]


def write_jsonl(path: StrPath, records: Iterable[Record | Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file appears whole or not at all.

    Raises UserError when it cannot be written (disk full, no permission); what was there stays.
    """
    with _replacing(Path(path)) as file:
        for record in records:
            row = record.to_json() if isinstance(record, Record) else record
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_json(path: StrPath, obj: Any) -> None:
    """Write one indented JSON document, as atomically as `write_jsonl`."""
    write_text(path, json.dumps(obj, ensure_ascii=False, indent=2) + "\n")


def write_text(path: StrPath, text: str) -> None:
    """Write a text file (UTF-8, newlines unchanged), as atomically as `write_jsonl`."""
    with _replacing(Path(path)) as file:
        file.write(text)


def read_jsonl(path: StrPath, cls: type[R]) -> list[R]:
    """The records of a file that `write_jsonl` wrote.

    Raises UserError naming file and line where a line is not such a record.
    """
    records = []
    for number, row in _numbered_rows(Path(path)):
        try:
            records.append(cls.from_json(row))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a {cls.__name__}: {error}") from error
    return records


def read_rows(path: StrPath) -> list[dict[str, Any]]:
    """The objects of a .jsonl file or of a .json list; either may be gzipped (.gz).

    Raises UserError naming the file, and the line where one is broken.
    """
    return [row for _, row in _numbered_rows(Path(path))]


def read_text(path: StrPath) -> str:
    """A UTF-8 text file, gzipped or not; raises UserError when it is missing or unreadable."""
    path = Path(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return text


def _numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = read_text(path)
    for number, value in _values(path, text):
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise UserError(f"{path}, row {number}: expected a JSON object, found {kind}")
        yield number, value


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    if path.name.removesuffix(".gz").endswith(".json") and text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from error
        return
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: broken JSON: {error.msg}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A file to write that takes `path`'s place once it is complete and on the disk."""
    # One fixed name: what a killed run left behind is overwritten by the next one, not piled up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        cure = "free some space" if error.errno == errno.ENOSPC else "check the folder"
        raise UserError(f"cannot write {path}: {error.strerror}; {cure} and try again") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
