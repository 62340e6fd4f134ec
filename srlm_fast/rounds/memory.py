"""What each phase of a run needs in memory, before anything is loaded, and whether it is there.

Rows count as long as they may be: how long they are is known with the data, or once they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from srlm_fast.config import Config, LoraConfig, PreferenceConfig, TrainConfig
from srlm_fast.config.pairwise import compares
from srlm_fast.errors import UserError
from srlm_fast.model.load import check_folder, context_of, text_config
from srlm_fast.model.sizes import count_parameters, without_data
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.prompts.self_instruct import MAX_BATCH
from srlm_fast.rounds.disk import cached_rows
from srlm_fast.rounds.machine import Machine, weights_dtype
from srlm_fast.sampler.memory import Call, SamplerMemory, sampler_memory
from srlm_fast.train.memory import train_memory

_NO_CONTEXT = 2048  # tokens of a row where a model has no limit, or none that is sensible
_LONGEST = 1 << 20


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


@dataclass(frozen=True)
class RunMemory:
    """Of one process of a run. Models are without data, the run's own with its adapters; None:
    there is none, or its family cannot be made so, and nothing is known of it."""

    config: Config
    model: Any
    machine: Machine
    ranks: Ranks = ALONE
    writer: Any = None
    """`prompts.model`."""
    judging_reference: Any = None
    """A `judge.reference` that is no model of the run."""

    @classmethod
    def of(
        cls, config: Config, model_config: Any, machine: Machine, ranks: Ranks = ALONE
    ) -> RunMemory:
        """Raises UserError where adapters are asked for that cannot be had, or another model that
        has no configuration."""
        dtype = weights_dtype(config, model_config, machine.device)
        model = _sized(model_config, dtype, config.lora)
        writer = reference = None
        if name := config.prompts.model:
            found = check_folder(name, weights=False)
            writer = _sized(found, weights_dtype(config, found, machine.device))
        if name := config.judge.reference_model:
            reference = _sized(check_folder(name, weights=False), dtype)
        return cls(config, model, machine, ranks, writer, reference)

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
            rows = cached_rows(self.config, self.prompts, self.context)
            size = rows * text_config(self.model).hidden_size * self.model.dtype.itemsize
            lines.append(f"states of the reference: at most {size / 1e9:.2f} GB on disk")
        if scorer := self.config.judge.scorer:
            lines.append(f"judge.scorer {scorer} is not counted: what it holds is its own")
        if (room := self.machine.room) is not None:
            lines.append(f"{room / 1e9:.2f} GB are free")
            lines += self._too_much(room)
        return lines

    def _too_much(self, room: int) -> list[str]:
        """What can begin, and still may not fit."""
        over = [phase for phase in self.phases if phase.least <= room < phase.peak]
        if not over:
            return []
        cures = "lower max_new_tokens"
        if any(phase.tokens for phase in over):
            cures += ", max_length or micro_batch_size, or set gradient_checkpointing to true"
        names = ", ".join(phase.name for phase in over)
        return [f"too little for {names} if rows are as long as they may be: {cures}"]

    @cached_property
    def phases(self) -> list[Phase]:
        """In the order of a round, after SFT."""
        if self.model is None:
            return []
        config = self.config
        found = [self.writing()] if config.prompts.model else []
        found.append(self.sampling())
        if config.judge.kind in ("prompted", "expected"):
            found.append(self.judging())
        if config.judge.kind == "implicit" or self.is_compared:
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
        """Whether an older model scores, whoever judges: in spa's evaluation, or CREAM's."""
        spa = self.config.method == "spa" and self.config.judge.kind != "implicit"
        return spa or self.config.pairs.consistency != "off"

    @property
    def judges_with(self) -> list[Any]:
        """The model that the judge has beside the resident one: none, or one, which may be unknown.
        An older one is the same again, or with adapters no other."""
        judge = self.config.judge
        if judge.kind != "implicit" or judge.reference == "none":
            return []
        return [self.judging_reference] if judge.reference_model else self._twin

    @property
    def _twin(self) -> list[Any]:
        return [] if self.config.lora.r else [self.model]

    @property
    def prompts(self) -> int:
        """That are sampled from in a call: those of the largest round, or of a step."""
        if self.config.online:
            return self.config.preference.per_device_train_batch_size
        rounds = range(1, max(self.config.rounds, 1) + 1)
        return max(self.config.prompts.of_round(t) for t in rounds)

    @property
    def drawn_at_once(self) -> int:
        """Candidates of these prompts."""
        return self.prompts * self.config.sampling.num_candidates

    @property
    def context(self) -> int:
        return _context(self.model)

    @property
    def weights(self) -> int:
        return _bytes(self.model)

    @property
    def reference(self) -> int:
        """Of a frozen copy of what trains."""
        size: int = self.model.dtype.itemsize
        return count_parameters(self.model, trained=True) * size

    def writing(self) -> Phase:
        """New prompts by a model of their own, while the resident one has no pages."""
        found = SamplerMemory(None, None)
        if self.writer is not None:
            taken = self.weights + _bytes(self.writer)
            found = self._sampler(self.writer, [self._lists(self.writer)], taken)
        held = {"weights": self.weights, "prompts.model": _bytes_of([self.writer])}
        return self._phase("writing", held, found, "take a smaller prompts.model")

    def sampling(self) -> Phase:
        """New prompts, candidates, and those of an evaluation."""
        found = self._sampler(self.model, self._drawn(), self.weights)
        return self._phase("sampling", {"weights": self.weights}, found)

    def judging(self) -> Phase:
        """By a judge prompt for each candidate, in the memory that has the candidates' prompts."""
        evaluate = self.config.evaluate
        evaluated = self._judged(evaluate.num_prompts * evaluate.num_samples)
        calls = [*self._drawn(), *self._judged(self.drawn_at_once), *evaluated]
        found = self._sampler(self.model, calls, self.weights)
        return self._phase("judging", {"weights": self.weights}, found)

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
        held = {"weights": self.weights} | ({"last step": self.reference} if on_host else {})
        return self._phase("comparing", held, self._sampler(self.model, calls, self.weights))

    def scoring(self) -> Phase:
        """By the implicit reward, of candidates and test pairs: a second model with a sampler of
        its own, or other adapters."""
        others = [*self.judges_with, *(self._twin if self.is_compared else [])]
        unknown = [other for other in others if other is None]
        largest = unknown[:1] or sorted(others, key=_bytes)[-1:]
        held = {"weights": self.weights, "reference": _bytes_of(largest)}
        cure = ["train adapters (lora.r), whose base is there once"] if self._twin else []
        pairs = self.config.data.num_test_pairs if self.config.method == "spa" else 0
        found = self._beside(self._drawn(), largest, max(self.prompts, pairs))
        return self._phase("scoring", held, found, *(cure if largest == self._twin else []))

    def _drawn(self) -> list[Call]:
        evaluate, prompts = self.config.evaluate, self.config.prompts
        calls = [self._candidates("generate", evaluate.num_prompts, evaluate.num_samples)]
        if prompts.source == "self_instruct" and not prompts.model:
            calls.append(self._lists(self.model))
        rows = self.config.sampling.num_candidates
        return [*calls, self._candidates("generate", self.prompts, rows)]

    def _lists(self, model: Any) -> Call:
        """Of new prompts, written by `model`."""
        prompts = self.config.prompts
        length, calls = prompts.max_new_tokens, prompts.max_calls or MAX_BATCH
        return Call("generate", min(calls, MAX_BATCH), max(1, _context(model) - length), 1, length)

    def _judged(self, count: int) -> list[Call]:
        """So many responses by a judge prompt, if the judge has one."""
        judge = self.config.judge
        prompt = max(1, self.context - judge.max_new_tokens)
        calls = {
            "expected": Call("next", count, self.context),
            "prompted": Call("generate", count, prompt, judge.num_samples, judge.max_new_tokens),
        }
        return [calls[judge.kind]] if judge.kind in calls else []

    def _candidates(self, kind: Any, prompts: int, rows: int) -> Call:
        length = self.config.sampling.max_new_tokens
        return Call(kind, prompts, max(1, self.context - length), rows, length)

    def _sampler(self, model: Any, calls: Sequence[Call], taken: int) -> SamplerMemory:
        """Of a sampler of `model` that is made where so many bytes are `taken`."""
        room = self.machine.room
        free = None if room is None else max(0, room - taken)
        return sampler_memory(model, calls, device=self.machine.device, free=free)

    def _beside(self, drawn: Sequence[Call], others: Sequence[Any], prompts: int) -> SamplerMemory:
        """Candidates are `drawn`, those of `prompts` scored, and then scored by the one of
        `others`, if any."""
        call = self._candidates("score", prompts, self.config.sampling.num_candidates)
        own = self._sampler(self.model, [*drawn, replace(call, again=True)], self.weights)
        for other in others:
            if other is None or own.pages is None or own.work is None:
                return SamplerMemory(None, None)
            found = self._sampler(other, [call], self.weights + _bytes(other) + own.pages)
            if found.pages is None or found.work is None:
                return found
            peak = own.pages + max(own.work, found.pages + found.work)
            pages = own.pages + found.pages
            own = SamplerMemory(pages, max(0, peak - pages))
        return own

    def _phase(
        self, name: str, held: Mapping[str, int | None], found: SamplerMemory, *cures: str
    ) -> Phase:
        """Of a sampler, beside what is `held` all the time."""
        if self.config.lora.r:
            held = {**held, "frozen adapters": self.reference}  # of the round's start
        parts = {**held, "pages": found.pages, "work": found.work}
        least = _sum(held.values())
        return Phase(name, parts, _sum(parts.values()), least, 0, self._cure(*cures))

    def training(self, name: str) -> Phase:
        train: TrainConfig = getattr(self.config, name)
        pairs = isinstance(train, PreferenceConfig)
        longest = min(train.max_length or self.context, self.context)
        response = min(self.config.sampling.max_new_tokens, longest)
        padded = train.layout == "padded"  # a pair's prompt twice; where "auto" pads is not known
        item = longest + (longest if padded else response) * pairs
        step = -(-train.per_device_train_batch_size // self.ranks.world)
        items = min(train.micro_batch_size or step, step)
        tokens = items * item
        if train.micro_batch_tokens:  # of one item, or of many short ones
            tokens = max(item, min(tokens, train.micro_batch_tokens))
        reference = isinstance(train, PreferenceConfig) and (
            train.reference_cache == "none" or train.reference != "previous"
        )
        found = train_memory(
            self.model,
            train,
            device=self.machine.device,
            tokens=tokens,
            rows=min(tokens, items * (2 * response if pairs else longest)),
            longest=longest if padded else item,
            forwards=-(-step * item // tokens),
            reference=reference,
            shares=self.ranks.world if train.parallel == "shard" else 1,
        )
        names = ("weights", "reference", "optimizer", "gradients", "activations", "head")
        parts: dict[str, int | None] = {part: getattr(found, part) for part in names}
        peak, least, cures = found.peak, found.least, []
        if pairs and self.config.online:
            online = self._online()
            judge = online["judge's reference"] or 0
            held = found.weights + found.reference + found.optimizer
            peak, least = max(peak + judge, held + _sum(online.values())), least + judge
            parts |= online
        if not self.config.lora.r:
            cures.append("train adapters (lora.r)")
            if self.ranks.world > 1 and train.parallel == "replicate":
                cures.append(f"set {name}.parallel to shard")
            if reference and self._may_be_cached:
                cures.append("set preference.reference_cache, which spares the reference's copy")
        return Phase(name, parts, peak, least, tokens, self._cure(*cures))

    @property
    def _may_be_cached(self) -> bool:
        loss = self.config.preference
        return loss.reference == "previous" and not (loss.sync_ref_model or self.config.online)

    def _online(self) -> dict[str, int | None]:
        """What a training whose steps draw and judge their own pairs holds for that: the reference
        of an implicit judge all the time, the rest between two steps."""
        drawn = [self._candidates("generate", self.prompts, self.config.sampling.num_candidates)]
        if self.config.judge.kind == "implicit":
            found = self._beside(drawn, self.judges_with, self.prompts)
        else:
            calls = [*drawn, *self._judged(self.drawn_at_once)]
            found = self._sampler(self.model, calls, self.weights)
        judge = _bytes_of(self.judges_with)
        return {"judge's reference": judge, "pages": found.pages, "work": found.work}

    def _cure(self, *more: str) -> str:
        halved = [] if self.model.dtype.itemsize < 4 else ["set dtype to bfloat16"]
        return ", or ".join(["take a smaller model or a larger device", *halved, *more])


def _sized(model_config: Any, dtype: torch.dtype, lora: LoraConfig | None = None) -> Any:
    """The model without data; None for a family that looks at numbers as they are made."""
    try:
        return without_data(model_config, dtype, lora)
    except UserError:
        raise
    except Exception:  # whatever it raises then
        return None


def _context(model: Any) -> int:
    context = context_of(model.config)
    return context if context < _LONGEST else _NO_CONTEXT


def _bytes(model: Any) -> int:
    size: int = model.dtype.itemsize
    return count_parameters(model) * size


def _bytes_of(models: Sequence[Any]) -> int | None:
    """Of all of them; None where one is unknown."""
    return None if None in models else sum(map(_bytes, models))


def _sum(sizes: Iterable[int | None]) -> int:
    """Of those that are known."""
    return sum(size or 0 for size in sizes)
