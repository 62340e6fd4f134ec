"""Reading and writing of JSON and jsonl files: atomic, byte-deterministic, with clear errors."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from srlm_fast.data.records import Record
from srlm_fast.errors import UserError

R = TypeVar("R", bound=Record)
StrPath = str | os.PathLike[str]

# Half of a pair of UTF-16 can only come from such an escape: decoding UTF-8 refuses it.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD]")


def write_jsonl(path: StrPath, records: Iterable[Record | Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file appears whole or not at all.

    Raises UserError when it cannot be written (disk full, no permission); what was there stays.
    """
    with _replacing(Path(path)) as file:
        for record in records:
            row = record.to_json() if isinstance(record, Record) else record
            file.write(to_json(row) + "\n")


def write_json(path: StrPath, obj: Any) -> None:
    """Write one indented JSON document, as atomically as `write_jsonl`."""
    write_text(path, to_json(obj, indent=2) + "\n")


def to_json(obj: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: what is not finite becomes null."""
    try:
        return json.dumps(obj, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(obj), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    except (OSError, EOFError, ValueError, zlib.error) as error:
        cure = "give a file of UTF-8 text, gzipped if its name ends in .gz"
        raise UserError(f"cannot read {path}: {error}; {cure}") from error
    return text


def _numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = read_text(path)
    suspect = _SURROGATE_ESCAPE.search(text)
    for number, value in _values(path, text):
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise UserError(f"{path}, row {number}: expected a JSON object, found {kind}")
        if suspect and not _is_unicode(value):
            raise UserError(
                f"{path}, row {number}: text that is not valid Unicode (half of a surrogate pair);"
                " mend or remove the row"
            )
        yield number, value


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    if path.name.removesuffix(".gz").endswith(".json") and text.lstrip().startswith("["):
        yield from enumerate(_parse(path, 1, text), start=1)
        return
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(path, number, line)


def _parse(path: Path, first: int, text: str) -> Any:
    """The value of JSON that begins on line `first` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise UserError(f"{path}, line {line}: broken JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path}, line {first}: JSON that is nested too deep to read") from error
    except ValueError as error:  # Python converts no whole number of thousands of digits
        raise UserError(f"{path}, line {first}: a number with too many digits") from error


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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
