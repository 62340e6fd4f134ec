"""What each phase of a run needs in memory, before anything is loaded, and whether it is there.

Rows count as long as they may be: how long they are is known with the data, or once they are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from srlm_fast.config import Config, PreferenceConfig, TrainConfig
from srlm_fast.config.pairwise import compares
from srlm_fast.errors import UserError
from srlm_fast.model.load import context_of, resolve_device, text_config
from srlm_fast.model.sizes import count_parameters, without_data
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.prompts.self_instruct import MAX_BATCH
from srlm_fast.sampler.memory import Call, sampler_memory
from srlm_fast.train.memory import train_memory

_NO_CONTEXT = 2048  # tokens of a row where a model has no limit, or none that is sensible
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Machine:
    """What a run has: its device, and the bytes there for one process (None: unknown)."""

    device: torch.device
    room: int | None


@dataclass(frozen=True)
class Phase:
    """Bytes of a phase by what they are for (None: unknown), `peak` at once at most. Without
    `least` it cannot begin, whatever its rows are."""

    name: str
    parts: Mapping[str, int | None]
    peak: int
    least: int
    tokens: int
    """Of the largest forward; 0: that is not set by the configuration."""
    cure: str

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} unknown" if size is None else f"{name} {size / 1e9:.2f}"
            for name, size in self.parts.items()
        )
        bound = "at least" if None in self.parts.values() else "at most"
        forwards = f" in forwards of {self.tokens:,} tokens" if self.tokens else ""
        return f"{self.name}: {bound} {self.peak / 1e9:.2f} GB{forwards} ({parts})"


def machine_here(device: torch.device, ranks: Ranks = ALONE) -> Machine:
    """`device` as it is now. The processes of a machine share its memory, but not their GPUs."""
    if device.type == "cuda":
        return Machine(device, int(torch.cuda.mem_get_info(device)[0]))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return Machine(device, None)
    free = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return Machine(device, free[0] * 1024 // ranks.local_world if free else None)


def planned_machine(name: str, gigabytes: float | None, ranks: Ranks = ALONE) -> Machine:
    """The device called `name` with so many `gigabytes`, or here, with what it has.

    Raises UserError for one that is not here where nobody says what it has.
    """
    if gigabytes is None:
        try:
            return machine_here(resolve_device(name), ranks)
        except UserError as error:
            raise UserError(f"{error}, or give its --memory in GB to plan for it") from error
    kind = "cuda" if name.startswith("cuda") else resolve_device(name).type
    return Machine(torch.device(kind), int(gigabytes * 1e9))


def weights_dtype(config: Config, model_config: Any, device: torch.device) -> torch.dtype:
    """What `load_model` makes of `config.dtype` there."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    stored = getattr(model_config, "dtype", None)
    return stored if device.type == "cuda" and stored is not None else torch.float32


@dataclass(frozen=True)
class RunMemory:
    """Of one process of a run. `model` is without data, adapters included; None: this family cannot
    be made so, and nothing is known."""

    config: Config
    model: Any
    machine: Machine
    ranks: Ranks = ALONE

    @classmethod
    def of(
        cls, config: Config, model_config: Any, machine: Machine, ranks: Ranks = ALONE
    ) -> RunMemory:
        """Raises UserError where adapters are asked for that cannot be had."""
        dtype = weights_dtype(config, model_config, machine.device)
        model = None
        try:
            model = without_data(model_config, dtype, config.lora)
        except UserError:
            raise
        except Exception:  # a family that looks at numbers as they are made, whatever it raises
            pass
        return cls(config, model, machine, ranks)

    def check(self) -> None:
        """Raises UserError where a phase cannot even begin."""
        if (room := self.machine.room) is None:
            return
        for phase in self.phases:
            if phase.least > room:
                raise UserError(
                    f"{phase.name} takes {phase.least / 1e9:.1f} GB at the least, and"
                    f" {room / 1e9:.1f} GB are free: {phase.cure}"
                )

    def lines(self) -> list[str]:
        """For people."""
        if self.model is None:
            return ["unknown: this model cannot be sized without its weights"]
        trained = count_parameters(self.model, trained=True)
        count = count_parameters(self.model) - (trained if self.config.lora.r else 0)
        dtype = str(self.model.dtype).removeprefix("torch.")
        lines = [f"{count / 1e6:,.1f}M parameters in {dtype}"]
        if self.config.lora.r:
            lines.append(f"adapters of {trained / 1e6:,.1f}M parameters, which alone train")
        lines += map(str, self.phases)
        if self.config.preference.reference_cache == "states":
            rows = 2 * self.prompts * self.config.sampling.max_new_tokens
            width = text_config(self.model).hidden_size
            size = rows * width * self.model.dtype.itemsize
            lines.append(f"states of the reference: at most {size / 1e9:.2f} GB on disk")
        if self.machine.room is not None:
            lines.append(f"{self.machine.room / 1e9:.2f} GB are free")
        return lines

    @cached_property
    def phases(self) -> list[Phase]:
        """In the order of a round, after SFT."""
        if self.model is None:
            return []
        config = self.config
        found = [self.sampling()]
        if config.judge.kind in ("prompted", "expected"):
            found.append(self.judging())
        if self.is_compared or config.judge.kind == "implicit":
            found.append(self.scoring())
        if config.method == "srlm" or config.model == "sandbox":
            found.append(self.training("sft"))
        if config.srlm.training != "positives":
            found.append(self.training("preference"))
        if compares(config):
            found.append(self.comparing())
        return found

    @property
    def is_compared(self) -> bool:
        """Whether another model scores beside the resident one: a judge's reference, that of spa's
        evaluation, or CREAM's."""
        config = self.config
        judged = config.judge.kind == "implicit" and config.judge.reference != "none"
        return judged or config.method == "spa" or config.pairs.consistency != "off"

    @property
    def prompts(self) -> int:
        """Of the largest round."""
        rounds = range(1, max(self.config.rounds, 1) + 1)
        return max(self.config.prompts.of_round(t) for t in rounds)

    @property
    def context(self) -> int:
        context = context_of(self.model.config)
        return context if context < _LONGEST else _NO_CONTEXT

    @property
    def weights(self) -> int:
        size: int = self.model.dtype.itemsize
        return count_parameters(self.model) * size

    @property
    def reference(self) -> int:
        """Of a frozen copy of what trains."""
        size: int = self.model.dtype.itemsize
        return count_parameters(self.model, trained=True) * size

    def sampling(self) -> Phase:
        """New prompts, candidates, and those of an evaluation."""
        return self._sampler("sampling", self._drawn())

    def judging(self) -> Phase:
        """By a judge prompt for each candidate, in the memory that has the candidates' prompts."""
        count = self.prompts * self.config.sampling.num_candidates
        return self._sampler("judging", [*self._drawn(), *self._judged(count)])

    def comparing(self) -> Phase:
        """Of two answers to a prompt, those of checkpoints too. Then what the last step trained is
        beside the model in the host's memory."""
        config, pairwise = self.config, self.config.pairwise
        chooses = config.preference.load_best_model_at_end
        calls, prompts = self._drawn(), config.evaluate.num_prompts * config.evaluate.head_to_head
        if chooses:
            calls.append(self._candidates("generate", pairwise.num_prompts, 1))
            prompts = max(prompts, pairwise.num_prompts)
        if pairwise.kind == "prompted":
            length = pairwise.max_new_tokens
            room = max(1, self.context - length)
            calls.append(Call("generate", 2 * prompts, room, 1, length))
        else:
            calls += self._judged(2 * prompts)
        on_host = chooses and self.machine.device.type == "cpu"
        return self._sampler("comparing", calls, last_step=self.reference if on_host else 0)

    def _judged(self, count: int) -> list[Call]:
        """By a prompt for each of so many responses, where the judge has one."""
        judge = self.config.judge
        if judge.kind == "expected":
            return [Call("next", count, self.context)]
        if judge.kind != "prompted":
            return []
        prompt = max(1, self.context - judge.max_new_tokens)
        return [Call("generate", count, prompt, judge.num_samples, judge.max_new_tokens)]

    def scoring(self) -> Phase:
        """By the implicit reward, of candidates and test pairs: a second model with a sampler of
        its own, or other adapters."""
        call = self._candidates("score", self.prompts, self.config.sampling.num_candidates)
        again = replace(call, again=True)
        return self._sampler("scoring", [*self._drawn(), again], scored=call)

    def _drawn(self) -> list[Call]:
        evaluate, prompts = self.config.evaluate, self.config.prompts
        calls = [self._candidates("generate", evaluate.num_prompts, evaluate.num_samples)]
        if prompts.source == "self_instruct":
            length = prompts.max_new_tokens
            calls.append(Call("generate", MAX_BATCH, max(1, self.context - length), 1, length))
        rows = self.config.sampling.num_candidates
        return [*calls, self._candidates("generate", self.prompts, rows)]

    def _candidates(self, kind: Any, prompts: int, rows: int) -> Call:
        length = self.config.sampling.max_new_tokens
        return Call(kind, prompts, max(1, self.context - length), rows, length)

    def _sampler(
        self, name: str, calls: Sequence[Call], scored: Call | None = None, last_step: int = 0
    ) -> Phase:
        """`scored`: what the reference's sampler is asked for, too. `last_step`: bytes that are
        there besides."""
        device, room = self.machine.device, self.machine.room
        adapters = self.reference if self.config.lora.r else 0  # of the round's start
        # A reference that is no model of the run is taken to be as large as they are.
        apart = not self.config.lora.r or self.config.judge.reference_model
        twin = self.weights if scored and self.is_compared and apart else 0

        def memory(calls: Sequence[Call], taken: int) -> tuple[int | None, int | None]:
            free = None if room is None else max(0, room - taken)
            found = sampler_memory(self.model, calls, device=device, free=free)
            return found.pages, found.work

        pages, work = memory(calls, self.weights)
        if scored and twin and pages is not None:
            pages += memory([scored], self.weights + twin + pages)[0] or 0
        parts = {"weights": self.weights, "pages": pages, "work": work}
        if scored:
            parts["reference"] = twin
        if adapters:
            parts["frozen adapters"] = adapters
        if last_step:
            parts["last step"] = last_step
        cure = self._cure(*(["train adapters (lora.r), whose base is there once"] if twin else []))
        least = self.weights + twin + adapters + last_step
        return Phase(name, parts, sum(size or 0 for size in parts.values()), least, 0, cure)

    def training(self, name: str) -> Phase:
        train: TrainConfig = getattr(self.config, name)
        pairs = isinstance(train, PreferenceConfig)
        longest = min(train.max_length or self.context, self.context)
        response = min(self.config.sampling.max_new_tokens, longest)
        item = longest + response if pairs else longest
        step = -(-train.per_device_train_batch_size // self.ranks.world)
        items = min(train.micro_batch_size or step, step)
        if train.micro_batch_tokens:
            items = max(1, min(items, train.micro_batch_tokens // item))
        reference = isinstance(train, PreferenceConfig) and (
            train.reference_cache == "none" or train.reference != "previous"
        )
        found = train_memory(
            self.model,
            train,
            device=self.machine.device,
            tokens=items * item,
            rows=items * (2 * response if pairs else longest),
            longest=item,
            forwards=-(-step // items),
            reference=reference,
            shares=self.ranks.world if train.parallel == "shard" else 1,
        )
        names = ("weights", "reference", "optimizer", "gradients", "activations", "head")
        parts = {part: getattr(found, part) for part in names}
        cures = []
        if not self.config.lora.r:
            cures.append("train adapters (lora.r)")
            if self.ranks.world > 1 and train.parallel == "replicate":
                cures.append(f"set {name}.parallel to shard")
            if reference and self.config.preference.reference == "previous":
                cures.append("set preference.reference_cache, which spares the reference's copy")
        return Phase(name, parts, found.peak, found.least, items * item, self._cure(*cures))

    def _cure(self, *more: str) -> str:
        halved = [] if self.model.dtype.itemsize < 4 else ["set dtype to bfloat16"]
        return ", or ".join(["take a smaller model or a larger device", *halved, *more])
