"""The run folder: which stages are finished, and what they wrote.

A stage writes to a temporary name and renames, and only then enters `manifest.json`; so a run that
was killed anywhere resumes at its first unfinished stage, and every stage reads its inputs from
disk exactly as a resumed run would.

Of several ranks only the main one writes. The others make the same rows, wait until it has written
them, and go on from its files, so the folder must be one that all of them see.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from srlm_fast.config import Config
from srlm_fast.data.jsonl import read_jsonl, to_json, write_json, write_jsonl, write_text
from srlm_fast.data.records import Record
from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.recipes import to_yaml
from srlm_fast.rounds.trackers import Trackers

R = TypeVar("R", bound=Record)
Info = Mapping[str, Any]


def stage_seed(seed: int, name: str) -> int:
    """An independent 31-bit seed for a stage of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


class Run:
    """One run folder, locked while it is open.

    versions: of this process; the manifest keeps every set that a stage was made with.
    inputs: what else the run reads, file to digest; it must not change while a run is unfinished.
    ranks: those of the run. With several, opening it, `done`, `records` and `result` are
    collective, and what is found out about files is the main rank's word.
    Raises UserError when the folder is in use, cannot be written or is not this run's.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        versions: Mapping[str, str],
        inputs: Mapping[str, str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self._path = folder / "manifest.json"
        self._versions = dict(versions)
        self._lock: IO[str] | None = None
        self.trackers: Trackers | None = None
        self.manifest: dict[str, Any] = {}
        if ranks.main:
            self._open(inputs or {})
        self.manifest = ranks.from_main(self.manifest)
        if not self._path.is_file():
            raise UserError(f"{folder} is not the same folder for all processes; choose --out")

    def _open(self, inputs: Mapping[str, str]) -> None:
        folder, config = self.folder, self.config
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; choose --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is in use by another run; wait, or choose --out") from error
        identity = {
            "config": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
            "inputs": dict(inputs),
        }
        if self._path.is_file():
            self.manifest = self._read()
            self._check(identity)
        else:
            strange = {p.name for p in folder.iterdir()} - {".lock", "config.yaml"}
            if strange:
                raise UserError(f"{folder} has files but no manifest.json; choose another --out")
            self.manifest = {**identity, "versions": [], "stages": {}}
            write_text(folder / "config.yaml", to_yaml(config))
            self._save()
        self._cut_metrics()

    def close(self) -> None:
        """Release the folder."""
        if self._lock:
            self._lock.close()

    def seed(self, name: str) -> int:
        """The seed of a stage."""
        return stage_seed(self.config.seed, name)

    def done(self, name: str) -> bool:
        """Whether a stage is finished; its files must be as it left them."""
        return self.ranks.from_main(self.ranks.main and self._is_there(name))

    def _is_there(self, name: str) -> bool:
        stage = self.manifest["stages"].get(name)
        if stage is None:
            return False
        for file, digest in stage["files"].items():
            if file_digest(self.folder / file) != digest:
                raise UserError(
                    f"{self.folder / file} is missing or was changed after stage {name!r} "
                    "wrote it; restore it, or start a new run with another --out"
                )
        return True

    def info(self, name: str) -> dict[str, Any]:
        """What a finished stage reported: counts of what it dropped, training summaries."""
        found: dict[str, Any] = self.manifest["stages"].get(name, {}).get("info", {})
        return found

    def records(
        self, name: str, cls: type[R], make: Callable[[], tuple[Sequence[R], Info]]
    ) -> list[R]:
        """The rows of stage `name` (file `<name>.jsonl`), made now unless they are there."""
        path = self.folder / f"{name}.jsonl"
        if not self.done(name):
            with self._timed(name) as stage:
                rows, info = make()
                stage |= {"rows": len(rows), "info": dict(info)}
                if self.ranks.main:
                    write_jsonl(path, rows)
                    stage["files"] = {f"{name}.jsonl": file_digest(path)}
        return read_jsonl(path, cls)

    def result(self, name: str, make: Callable[[], Info], made: str = "") -> dict[str, Any]:
        """A stage that makes a small JSON object, kept in the manifest, and maybe a folder."""
        if not self.done(name):
            with self._timed(name) as stage:
                stage["info"] = dict(make())
                if made and self.ranks.main:
                    files = sorted((self.folder / made).iterdir())
                    stage["files"] = {f"{made}/{p.name}": file_digest(p) for p in files}
        return self.info(name)

    def logger(self, name: str) -> Callable[[dict[str, float]], None]:
        """Appends the metrics of a stage to `metrics.jsonl`, and sends them to `trackers`."""
        path = self.folder / "metrics.jsonl"

        def log(row: dict[str, float]) -> None:
            if not self.ranks.main:
                return
            with path.open("a", encoding="utf-8") as file:
                file.write(to_json({"stage": name, **row}) + "\n")
            if self.trackers:
                self.trackers.log(name, row)

        return log

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[dict[str, Any]]:
        stage: dict[str, Any] = {"files": {}, "info": {}}
        start = time.perf_counter()
        yield stage
        if self.ranks.main:
            self._enter(name, stage, time.perf_counter() - start)
        self.manifest = self.ranks.from_main(self.manifest)  # the others wait here for the files

    def _enter(self, name: str, stage: dict[str, Any], seconds: float) -> None:
        """Makes `stage`, whose files are written, a finished one."""
        stage["seconds"] = round(seconds, 3)
        metrics = self.folder / "metrics.jsonl"
        stage["metrics_bytes"] = metrics.stat().st_size if metrics.exists() else 0
        self.manifest["stages"][name] = stage
        if self._versions not in self.manifest["versions"]:
            self.manifest["versions"].append(self._versions)
        self._save()

    def _read(self) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            if not {"config", "inputs", "versions", "stages"} <= manifest.keys():
                raise ValueError("keys are missing")
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error}); restore it, or start a new run"
            ) from error
        return manifest

    def _check(self, identity: Mapping[str, Any]) -> None:
        if self.manifest["config"] != identity["config"]:
            raise UserError(
                f"{self.folder / 'config.yaml'} was changed after the run began; restore it, or "
                "start a new run with --recipe and another --out"
            )
        for path, digest in identity["inputs"].items():
            if self.manifest["inputs"].get(path) != digest:
                raise UserError(
                    f"{path} was changed after the run began; restore it, or start a new run"
                )

    def _save(self) -> None:
        write_json(self._path, self.manifest)

    def _cut_metrics(self) -> None:
        """Drop the metrics that an unfinished stage wrote before the run was killed."""
        path = self.folder / "metrics.jsonl"
        end = max((s["metrics_bytes"] for s in self.manifest["stages"].values()), default=0)
        if path.exists() and path.stat().st_size > end:
            os.truncate(path, end)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, or "missing"."""
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
