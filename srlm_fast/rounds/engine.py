"""The one resident model, and the things that run on it.

Sampling, judging and training all use `engine.model`, the same module with the same tensors; a
stage that trains changes it in place. Only references are other copies, or other adapters. Each of
several ranks has all of this, computes its share of every stage, and comes to the same results.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from srlm_fast.config import PreferenceConfig
from srlm_fast.data.records import Example, Pair, Preference, Prompt, Sample
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.judge.base import Judge
from srlm_fast.judge.controls import LongestJudge, RandomJudge
from srlm_fast.judge.expected import ExpectedJudge
from srlm_fast.judge.implicit import AdapterScorer, ImplicitJudge, Scorer
from srlm_fast.judge.prompted import PromptedJudge
from srlm_fast.judge.scorer import ScorerJudge, load_scorer
from srlm_fast.model.adapters import Adapters, FrozenAdapter
from srlm_fast.model.liger import use_liger_kernels
from srlm_fast.model.load import (
    context_length,
    eos_token_ids,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_folder,
)
from srlm_fast.model.weights import FullWeights, move_weights
from srlm_fast.rounds.manifest import Run
from srlm_fast.sampler import Sampler, SamplingParams
from srlm_fast.sampler.sharded import ShardedSampler
from srlm_fast.train.noise import Refinement
from srlm_fast.train.online import Draw, train_online
from srlm_fast.train.preference import train_preference
from srlm_fast.train.sft import train_sft

T = TypeVar("T")
Tokens = tuple[list[int], list[int]]  # prompt ids, response ids


class Engine:
    """The resident policy with its tokenizer, template and sampler.

    folder: HF folder of the model that the run starts from (SRLM's M0, SPA's pi_init).
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.config = run, run.config
        self.base = folder
        self.resident = folder
        """Where the weights are saved that the resident model has now."""
        self._trained_from: dict[Path, Path] = {}
        model = load_model(
            str(folder), device=resolve_device(self.config.device), dtype=self.config.dtype
        )
        if self.config.use_liger_kernel:
            use_liger_kernels(model)
        self.weights = self._adapters(model) if self.config.lora.r else FullWeights(model)
        self.model = self.weights.model
        self.tokenizer = load_tokenizer(str(folder))
        self.template = ChatTemplate(
            self.tokenizer, self.config.template, eos_token_ids(self.model, self.tokenizer)
        )
        self.sampler = self._sampler(self.model, eos_ids=self.template.eos_ids)
        self.context = context_length(self.model)

    def _adapters(self, model: Any) -> Adapters:
        name = "" if self.config.model == "sandbox" else self.config.model
        seed = self.run.seed("lora")
        return Adapters(model, self.config.lora, base=self.base, name=name, seed=seed)

    def folder(self, name: str) -> Path:
        """The HF folder of a model of this run; with `lora` its adapter's, in PEFT's format."""
        return self.run.folder / "models" / name

    def use(self, folder: Path) -> None:
        """Put the weights of `folder` into the resident model, in place."""
        self.weights.load(folder)
        self.resident = folder

    @property
    def lineage(self) -> list[Path]:
        """The models that led to the resident one, each trained from the one before; it is last."""
        line = [self.resident]
        while line[0] in self._trained_from:
            line.insert(0, self._trained_from[line[0]])
        return line

    def sft(self, name: str, examples: Sequence[Example | Sample]) -> None:
        """Fine-tune the resident model on `examples` into model `name`; samples keep their ids."""

        def train() -> dict[str, Any]:
            rows = [self._tokens(example) for example in examples]
            return train_sft(
                self.model,
                rows,
                self._fit(self.config.sft),
                seed=self.run.seed(name),
                pad_id=self.template.pad_id,
                log=self.run.logger(f"train/{name}"),
                checkpoint=self.state(name),
                ranks=self.run.ranks,
            )

        self._become(name, train)

    def dpo(
        self,
        name: str,
        pairs: Sequence[Pair],
        *,
        fixed: Path,
        refine: Refinement | None = None,
        eval_pairs: Sequence[Preference] = (),
        choose: Callable[[int], dict[str, Any]] | None = None,
        **changes: Any,
    ) -> None:
        """Train the resident model on `pairs` into model `name`, against its own start.

        fixed: the reference instead, where the configuration says `reference: fixed`, and where
        its average begins, with `reference: ema`.
        eval_pairs: held-out labels, for `preference.eval_steps`.
        choose: gives the resident model the weights to keep, when it is told the last step, and
        says which; before anything is saved.
        """
        config = self._fit(replace(self.config.preference, **changes))

        def train() -> dict[str, Any]:
            summary = train_preference(
                self.model,
                self._compared_with(config, fixed),
                pairs,
                config,
                refine=refine,
                reference_is_start=config.reference == "previous",
                seed=self.run.seed(name),
                pad_id=self.template.pad_id,
                log=self.run.logger(f"train/{name}"),
                eval_pairs=self.gold_pairs(eval_pairs) if config.eval_steps else (),
                cache=self.state(name),
                checkpoint=self.state(name),
                ranks=self.run.ranks,
            )
            return summary | choose(summary["steps"]) if choose else summary

        self._become(name, train)

    def train_online(
        self,
        name: str,
        draw: Draw,
        steps: int,
        *,
        num_pairs: int,
        fixed: Path,
        refine: Refinement | None = None,
    ) -> tuple[list[Pair], dict[str, Any]]:
        """Train the resident model on what `draw` makes of it, and save it as `name`, which it is
        once it is adopted. Returns the pairs and the summary."""
        config = self._fit(self.config.preference)
        self.sampler.sleep()
        pairs, summary = train_online(
            self.model,
            self._compared_with(config, fixed),
            draw,
            steps,
            config,
            refine=refine,
            num_pairs=num_pairs,
            reference_is_start=config.reference == "previous",
            seed=self.run.seed(name),
            pad_id=self.template.pad_id,
            log=self.run.logger(f"train/{name}"),
            ranks=self.run.ranks,
        )
        self._save(name)
        return pairs, summary

    def adopt(self, name: str, summary: dict[str, Any]) -> None:
        """Make the resident model `name`, which a stage has saved; `summary` is its training's."""

        def load() -> dict[str, Any]:
            self.use(self.folder(name))
            return summary

        self._become(name, load)

    def _compared_with(self, config: PreferenceConfig, fixed: Path) -> Any:
        if config.reference == "previous":
            if config.reference_cache == "none" or self.config.lora.r:
                return self.weights.frozen()
            return self.model  # before its training, where that is kept
        reference: Any = self.weights.frozen(fixed)
        if config.reference == "ema":  # not with lora
            line = self.lineage
            for folder in line[line.index(fixed) + 1 :] if fixed in line else line:
                move_weights(reference, folder, config.ref_model_mixup_alpha)
        return reference

    def candidates(
        self, prompts: Sequence[Prompt], *, stage: str, round: int, **changes: Any
    ) -> tuple[list[Sample], Counter[str]]:
        """Samples of each prompt, in order, as `sampling` says; `changes` are SamplingParams.

        Prompts that leave no room for `sampling.max_new_tokens` are dropped and counted.
        """
        cfg = self.config.sampling
        settings = {
            "n": cfg.num_candidates,
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "top_k": cfg.top_k,
            "max_tokens": cfg.max_new_tokens,
            "seed": self.run.seed(stage),
        }
        params = SamplingParams(**(settings | changes))
        fitting = self.with_room(prompts)
        outputs = self.sampler.generate([ids for _, ids in fitting], params, progress="sampling")
        samples = [
            Sample(
                prompt=prompt,
                prompt_ids=tuple(ids),
                response=c.text,
                response_ids=tuple(c.token_ids),
                logprobs=tuple(c.logprobs),
                finish_reason=c.finish_reason,
                index=c.index,
                seed=c.seed,
                round=round,
            )
            for (prompt, ids), output in zip(fitting, outputs, strict=True)
            for c in output.outputs
        ]
        return samples, Counter({"prompt too long": len(prompts) - len(fitting)})

    def with_room(self, prompts: Sequence[Prompt]) -> list[tuple[Prompt, list[int]]]:
        """Those that leave room for `sampling.max_new_tokens`, and an EOS where one is forced, with
        their token ids. Raises UserError when there is none."""
        sampling = self.config.sampling
        room = self.context - sampling.max_new_tokens - sampling.force_eos
        encoded = [(prompt, self.template.encode_prompt(prompt)) for prompt in prompts]
        fitting = [(prompt, ids) for prompt, ids in encoded if len(ids) <= room]
        if not prompts:
            raise UserError("there are no prompts to sample from; give some")
        if not fitting:
            raise UserError(
                f"no prompt leaves room for sampling.max_new_tokens ="
                f" {self.config.sampling.max_new_tokens} in the model's context of {self.context}"
                " tokens; lower it or give shorter prompts"
            )
        return fitting

    def judge(
        self, stage: str, initial: Path, before: Path | None = None, *, own_round: int | None = None
    ) -> Judge:
        """The judge of the configuration, on the resident model.

        initial: SPA's pi_init. before: the model that the resident one was trained from; None:
        pi_init too. own_round: the round whose samples are the resident model's own.
        """
        cfg, seed = self.config.judge, self.run.seed(stage)
        if cfg.kind == "random":
            return RandomJudge(seed)
        if cfg.kind == "longest":
            return LongestJudge()
        if cfg.kind == "implicit":
            # In 16 bits what sampling and scoring find differs by as much as candidates may.
            drew = own_round if self.model.dtype.itemsize >= 4 else None
            reference = self._reference(initial, before or initial)
            return ImplicitJudge(self.sampler, reference, own_round=drew)
        if cfg.kind == "scorer":
            return ScorerJudge(load_scorer(cfg.scorer), self.run.ranks)
        if cfg.kind == "expected":
            return ExpectedJudge(self.sampler, self.template, cfg, context=self.context)
        return PromptedJudge(self.sampler, self.template, cfg, seed=seed, context=self.context)

    def implicit(self, initial: Path) -> ImplicitJudge:
        """SPA's judge: the log-ratio of the resident model to pi_init (eq. 7)."""
        return ImplicitJudge(self.sampler, self.scorer(initial))

    def _reference(self, initial: Path, before: Path) -> Scorer | None:
        """What the implicit judge divides by, as `judge.reference` says (SPA's table 7)."""
        name = self.config.judge.reference
        if name == "none":
            return None
        models = {"sft": initial, "base": self.base, "previous": before}
        if name in models:
            return self.scorer(models[name])
        device = resolve_device(self.config.device)
        path = str(resolve_folder(name))
        return self._sampler(load_model(path, device=device, dtype=self.model.dtype))

    def scorer(self, folder: Path) -> Scorer:
        """The model of `folder` beside the resident one, for log-probabilities."""
        model = self.weights.frozen(folder)
        if isinstance(model, FrozenAdapter):
            return AdapterScorer(self.sampler, model)
        return self._sampler(model)

    def write_prompts(self, write: Callable[[Sampler, ChatTemplate], T]) -> T:
        """What `write` makes with the model that writes new prompts: the resident one, or the one
        that `prompts.model` names, which is in memory for no longer than that."""
        if not self.config.prompts.model:
            return write(self.sampler, self.template)
        self.sampler.sleep()  # its keys and values would be in the way
        made = write(*self._prompt_model())
        gc.collect()  # models hold themselves in cycles
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return made

    def _prompt_model(self) -> tuple[Sampler, ChatTemplate]:
        config, device = self.config, self.model.device
        folder = str(resolve_folder(config.prompts.model))
        model = load_model(folder, device=device, dtype=config.dtype)
        tokenizer = load_tokenizer(folder)
        template = ChatTemplate(
            tokenizer, config.prompts.chat_template, eos_token_ids(model, tokenizer)
        )
        return self._sampler(model, tokenizer, eos_ids=template.eos_ids), template

    def gold_pairs(self, rows: Sequence[Preference]) -> list[Pair]:
        """Labelled text as token ids (SPA's seed D)."""
        template = self.template
        return [
            Pair(
                prompt=r.prompt,
                prompt_ids=tuple(template.encode_prompt(r.prompt)),
                chosen=r.chosen,
                chosen_ids=tuple(template.encode_response(r.prompt, r.chosen)),
                rejected=r.rejected,
                rejected_ids=tuple(template.encode_response(r.prompt, r.rejected)),
                chosen_score=r.chosen_score,
                rejected_score=r.rejected_score,
                round=0,
            )
            for r in rows
        ]

    def _become(self, name: str, train: Callable[[], dict[str, Any]]) -> None:
        """Make the resident model `name`: by training it, or from disk where that is finished."""
        stage = f"train/{name}"
        self._trained_from[self.folder(name)] = self.resident
        if self.run.done(stage):
            self._forget(name)
            return self.use(self.folder(name))

        def train_and_save() -> dict[str, Any]:
            self.sampler.sleep()  # training wants the memory, and outdates what is cached
            summary = train()
            self._save(name)
            return summary

        self.run.result(stage, train_and_save, made=f"models/{name}")
        self.resident = self.folder(name)
        return self._forget(name)

    def _save(self, name: str) -> None:
        if self.run.ranks.main:
            self.weights.save(self.tokenizer, self.folder(name))

    def state(self, name: str) -> Path:
        """Where a training that is under way keeps what it needs to go on."""
        return self.run.folder / "state" / name

    def _forget(self, name: str) -> None:
        """A finished training, or one that was stopped just before it could do this, needs none."""
        self.run.ranks.barrier()  # no rank reads it any more
        if self.run.ranks.main:
            shutil.rmtree(self.state(name), ignore_errors=True)

    def _sampler(self, model: Any, tokenizer: Any = None, **options: Any) -> Sampler:
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if self.run.ranks.world > 1:
            return ShardedSampler(model, tokenizer, ranks=self.run.ranks, **options)
        return Sampler(model, tokenizer, **options)

    def _tokens(self, example: Example | Sample) -> Tokens:
        if isinstance(example, Sample):
            return list(example.prompt_ids), list(example.response_ids)
        prompt, response = example.prompt, example.response
        return self.template.encode_prompt(prompt), self.template.encode_response(prompt, response)

    def _fit(self, config: Any) -> Any:
        """The training configuration with rows limited to what the model can hold."""
        limit = min(config.max_length or self.context, self.context)
        return replace(config, max_length=limit)
