"""A run, from a checked configuration to its summary and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from srlm_fast.config import Config
from srlm_fast.config.pairwise import compares_in_words
from srlm_fast.data.exports import alpaca_eval_rows
from srlm_fast.data.files import task_from_files
from srlm_fast.data.jsonl import read_jsonl, write_json, write_text
from srlm_fast.data.records import Prompt, Sample
from srlm_fast.data.task import Task
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.evaluate.report import render_report
from srlm_fast.evaluate.table import summary_table
from srlm_fast.judge.expected import verdict_tokens
from srlm_fast.judge.judge_prompt import load_judge_prompt
from srlm_fast.judge.pairwise import load_pairwise_prompt
from srlm_fast.judge.scorer import load_scorer, scorer_file
from srlm_fast.model.load import (
    check_folder,
    context_of,
    has_tokenizer,
    has_weights,
    load_tokenizer,
    resolve_device,
    resolve_folder,
)
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.prompts.task_list import load_task_list
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.machine import Machine, machine_here, weights_dtype
from srlm_fast.rounds.manifest import Run, file_digest
from srlm_fast.rounds.memory import RunMemory
from srlm_fast.rounds.plan import check_training
from srlm_fast.rounds.selection import validation_prompts
from srlm_fast.rounds.spa import spread_preference_annotation
from srlm_fast.rounds.srlm import self_rewarding
from srlm_fast.rounds.summary import summarise
from srlm_fast.rounds.trackers import Trackers, check_trackers
from srlm_fast.sandbox.model import new_model
from srlm_fast.sandbox.pretrain import RECORD, make_base_model
from srlm_fast.sandbox.task import make_task
from srlm_fast.sandbox.tokenizer import make_tokenizer
from srlm_fast.train.loss import pair_loss

METHODS: dict[str, Callable[[Engine, Task], None]] = {
    "srlm": self_rewarding,
    "spa": spread_preference_annotation,
}


@dataclass(frozen=True)
class Job:
    """What passed its checks: the configuration, the data, and the model to start from.

    folder: of the start model; None where the sandbox makes it inside the run.
    missing: what the folder of a model that is only planned with does not have.
    """

    config: Config
    task: Task
    folder: Path | None
    memory: RunMemory
    missing: tuple[str, ...] = ()


def prepare(config: Config, ranks: Ranks = ALONE, planned: Machine | None = None) -> Job:
    """Check all that can be checked before the run starts. Raises UserError.

    planned: on what a run is planned that does not start here. Its model needs no weights then and
    no tokenizer, and whether it fits is not checked.
    """
    pair_loss(config.preference)  # there is such a loss, and it takes its settings
    if config.refines_labels and config.preference.loss_type != "sigmoid":
        raise UserError(
            "SPA refines the labels of the DPO loss; set preference.loss_type to sigmoid, or"
            " spa.self_refinement to false"
        )
    if config.refines_labels and config.preference.reference_cache == "logps":
        raise UserError("SPA needs logits of the reference; use reference_cache: states")
    if config.method == "spa" and config.judge.kind in ("prompted", "expected"):
        load_judge_prompt(config.judge.prompt)
    if config.method == "srlm":
        load_judge_prompt(config.judge.prompt)
        if config.prompts.source == "self_instruct":
            load_task_list(config.prompts.template)
    if config.judge.kind == "scorer":
        load_scorer(config.judge.scorer)
    if compares_in_words(config):
        load_pairwise_prompt(config.pairwise.prompt)
    check_trackers(config.report_to)
    if not planned:
        ranks.check_device(config.device)
    machine = planned or machine_here(resolve_device(config.device), ranks)
    folder: Path | None = None
    missing: tuple[str, ...] = ()
    template: ChatTemplate | None = None  # where a plan has no tokenizer
    if config.model == "sandbox":
        tokenizer = make_tokenizer()
        model_config = new_model(tokenizer, seed=0).config
        template = ChatTemplate(tokenizer, config.template)
    else:
        folder = resolve_folder(config.model, weights=not planned)
        missing = _missing(folder) if planned else ()
        model_config = check_folder(str(folder), weights="weights" not in missing)
        if "tokenizer files" not in missing:
            template = ChatTemplate(load_tokenizer(str(folder)), config.template)
            _check_reference(config, folder, model_config, weights=not planned)
    _check_room(config, context_of(model_config))
    if template:
        _check_judges(config, template, context_of(model_config))
    check_training(config, weights_dtype(config, model_config, machine.device), machine.device)
    memory = RunMemory.of(config, model_config, machine, ranks)
    if folder and not planned:
        memory.check()
    task = task_from_files(config) if folder else make_task(config)
    _check_prompt_model(config, weights=not planned)
    if config.sft.eval_steps or (config.preference.eval_steps and not task.test_pairs):
        raise UserError(
            "eval_steps needs held-out data, and only spa on data.preferences has some (the test "
            "pairs, for preference.eval_steps); set it to 0"
        )
    if config.rounds and config.prompts.source == "dataset" and not task.prompts:
        raise UserError("prompts.source is dataset, but there are none; give --data.prompts")
    if config.rounds and config.prompts.source == "self_instruct" and not task.ift:
        raise UserError(
            "prompts.source is self_instruct, which shows the model instructions of IFT data, and"
            f" {config.method} has none here; set --prompts.source dataset"
        )
    validation_prompts(config, task)  # there are enough
    return Job(config, task, folder, memory, missing)


def _missing(folder: Path) -> tuple[str, ...]:
    there = {"weights": has_weights(folder), "tokenizer files": has_tokenizer(folder)}
    return tuple(name for name, is_there in there.items() if not is_there)


def inputs(job: Job) -> dict[str, str]:
    """What a run reads from outside its folder, and a digest of each: data, prompts, the model.

    Of weights only the size counts: hashing many gigabytes would keep every start waiting.
    """
    found = {str(path): file_digest(path) for path in job.config.input_files()}
    models = [job.folder] if job.folder else []
    if reference := job.config.judge.reference_model:
        models.append(resolve_folder(reference))
    if name := job.config.prompts.model:
        models.append(resolve_folder(name))
    for folder in models:
        found[str(folder / "config.json")] = file_digest(folder / "config.json")
        found |= {str(p): f"{p.stat().st_size} bytes" for p in folder.glob("*.safetensors")}
    if source := scorer_file(job.config.judge.scorer):
        found[str(source)] = file_digest(source)
    return found


def _check_reference(config: Config, folder: Path, model_config: Any, *, weights: bool) -> None:
    """A judge's reference that is a model of its own must read what the run's model writes."""
    name = config.judge.reference_model
    if not name:
        return
    reference = resolve_folder(name, weights=weights)
    if config.spa.no_seed and reference.resolve() == folder.resolve():
        raise UserError(
            f"judge.reference {name} is, without a seed, the first judge itself: set it to the"
            " model that this one was trained from, or to none"
        )
    if weights or has_tokenizer(reference):  # a plan needs none
        _check_ids(name, folder, reference)
    found = check_folder(str(reference), weights=weights)
    if context_of(found) < context_of(model_config):
        raise UserError(
            f"judge.reference {name} has a shorter context than the model; give the model that it"
            " was trained from"
        )


def _check_ids(name: str, folder: Path, reference: Path) -> None:
    ours, theirs = (load_tokenizer(str(f)).get_vocab() for f in (folder, reference))
    if not ours.items() <= theirs.items():
        raise UserError(
            f"judge.reference {name} has other token ids than the model, so it cannot score what"
            " the model samples; give the model that it was trained from"
        )


def _check_prompt_model(config: Config, *, weights: bool) -> None:
    """The model that writes prompts must be there, read conversations and have room for them."""
    name, wanted = config.prompts.model, config.prompts.max_new_tokens
    if not name:
        return
    folder = resolve_folder(name, weights=weights)
    if weights or has_tokenizer(folder):  # a plan needs none
        try:
            ChatTemplate(load_tokenizer(str(folder)), config.prompts.chat_template)
        except UserError as error:
            said = str(error).replace("--template", "--prompts.chat_template")
            raise UserError(f"prompts.model {name}: {said}") from error
    context = context_of(check_folder(str(folder), weights=weights))
    if wanted >= context:
        raise UserError(
            f"prompts.max_new_tokens = {wanted} leaves no room for a list of tasks in the context "
            f"of prompts.model {name}, {context} tokens; lower it"
        )


def _check_room(config: Config, context: int) -> None:
    """Responses, and judgements where they are sampled, must leave room for their prompts."""
    wanted = {"sampling.max_new_tokens": config.sampling.max_new_tokens}
    if config.judge.kind == "prompted" or config.teaches_judging:
        wanted["judge.max_new_tokens"] = config.judge.max_new_tokens
    writes_prompts = config.prompts.source == "self_instruct" and not config.prompts.model
    if config.method == "srlm" and writes_prompts:
        wanted["prompts.max_new_tokens"] = config.prompts.max_new_tokens
    if compares_in_words(config):
        wanted["pairwise.max_new_tokens"] = config.pairwise.max_new_tokens
    for name, tokens in wanted.items():
        if tokens >= context:
            raise UserError(
                f"{name} = {tokens} leaves no room for a prompt in the model's context of "
                f"{context} tokens; lower it with --{name}"
            )


def _check_judges(config: Config, template: ChatTemplate, context: int) -> None:
    """A judge's prompt, here without question and response, must leave room for them; and what is
    `expected` must be tokens."""
    asked: list[tuple[str, Prompt, int]] = []
    if config.judge.kind in ("prompted", "expected") or config.teaches_judging:
        request = load_judge_prompt(config.judge.prompt).fill((), "")
        if config.judge.kind == "expected":
            verdict_tokens(template, request)
        writes = config.judge.kind == "prompted" or config.teaches_judging
        asked.append(("judge", request, config.judge.max_new_tokens if writes else 0))
    if compares_in_words(config):
        request = load_pairwise_prompt(config.pairwise.prompt).fill((), "", "")
        asked.append(("pairwise", request, config.pairwise.max_new_tokens))
    for group, request, written in asked:
        tokens = len(template.encode_prompt(request))
        if tokens + written >= context:
            beside = f" and {group}.max_new_tokens {written}" if written else ""
            raise UserError(
                f"{group}.prompt takes {tokens} tokens{beside}, which leaves no room for a response"
                f" in the model's context of {context}; give a shorter one with --{group}.prompt"
            )


def execute(job: Job, run: Run) -> str:
    """Run (or go on with) a job in its folder; returns the table of its models.

    All ranks of the run call it and get the same table.
    """
    config = job.config
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    folder = job.folder or _sandbox_model(config, run)
    engine = Engine(run, folder)
    trackers = config.report_to if run.ranks.main else ()
    with closing(Trackers(trackers, run.folder, asdict(config))) as run.trackers:
        METHODS[config.method](engine, job.task)
    summary = summarise(run, job.task)
    if run.ranks.main:
        write_json(run.folder / "summary.json", summary)
        for model in summary["models"]:
            _export(run, model["name"])
        write_text(run.folder / "report.html", render_report(run.folder))
    return "\n".join([summary_table(summary), "", *summary["notes"]])


def _export(run: Run, name: str) -> None:
    """The model's first sample of each test prompt, as AlpacaEval reads it."""
    samples = read_jsonl(run.folder / f"evaluation/{name}.jsonl", Sample)
    rows = alpaca_eval_rows(samples[:: run.config.evaluate.num_samples], name)
    write_json(run.folder / f"evaluation/{name}.alpaca_eval.json", rows)


def _sandbox_model(config: Config, run: Run) -> Path:
    """M0, copied into the run folder: a resumed run starts from the very same weights."""
    folder = run.folder / "models" / "M0"

    def make() -> dict[str, Any]:
        if not run.ranks.main:  # there is one folder to fill, and its training is not shared
            return {}
        cached = make_base_model(config.sandbox, seed=config.seed, num_threads=config.num_threads)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(cached, folder)
        record: dict[str, Any] = json.loads((cached / RECORD).read_text("utf-8"))
        return {"cached": cached.name, **record}

    run.result("pretrain", make, made="models/M0")
    return folder
