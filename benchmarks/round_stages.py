"""One SPA round in two ways: ours, and as the official pipeline is made, of transformers and TRL.

python -m benchmarks.round_stages WAY STAGE FOLDER    # one process of a round, see bench_round

The model is a Llama of random weights; every response has the same number of tokens, so that both
ways do the same work. TRL has no label refinement and trains DPO, which is less work than SPA.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.sampler_engines import Request, Task, hf_generate
from benchmarks.train_engines import trl_trainer
from srlm_fast.config import PreferenceConfig
from srlm_fast.data.records import Pair, Sample, user
from srlm_fast.judge.implicit import ImplicitJudge
from srlm_fast.judge.pairs import select_pairs
from srlm_fast.sampler import Sampler, SamplingParams
from srlm_fast.train.noise import Refinement
from srlm_fast.train.preference import train_preference

RATE, BETA, BATCH = 1e-6, 0.1, 8
ROWS = 64  # of one forward of the official way
STAGES = {"ours": ("round",), "HF + TRL": ("generate", "judge", "train")}


@dataclass(frozen=True)
class Round:
    """`prompts` of `length` random tokens, two responses of `new_tokens` to each."""

    shape: dict[str, Any]
    prompts: int
    length: int
    new_tokens: int

    def ids(self) -> list[list[int]]:
        g = torch.Generator().manual_seed(0)
        size = (self.prompts, self.length)
        return torch.randint(3, self.shape["vocab_size"], size, generator=g).tolist()  # type: ignore[no-any-return]

    def models(self) -> tuple[Any, Any]:
        """The policy that the round starts from, and pi_init."""
        torch.manual_seed(0)
        config = LlamaConfig(**self.shape, bos_token_id=None, eos_token_id=None)
        policy = LlamaForCausalLM(config).eval()
        initial = copy.deepcopy(policy)
        with torch.no_grad():
            for weight in initial.parameters():
                weight.mul_(1.01)
        return policy, initial


def our_round(work: Round, policy: Any, initial: Any) -> dict[str, float]:
    """Samples, judges and trains `policy` in place."""
    ids, sampler = work.ids(), Sampler(policy)
    params = SamplingParams(n=2, max_tokens=work.new_tokens, ignore_eos=True)
    groups = [
        [
            Sample(
                prompt=user(""), prompt_ids=tuple(prompt), response="",
                response_ids=tuple(c.token_ids), logprobs=tuple(c.logprobs),
                finish_reason=c.finish_reason, index=c.index, seed=c.seed, round=1,
            )
            for c in output.outputs
        ]
        for prompt, output in zip(ids, sampler.generate(ids, params), strict=True)
    ]  # fmt: skip
    judge = ImplicitJudge(sampler, Sampler(initial), own_round=1)
    verdicts = judge.score([group[0].prompt for group in groups], groups)
    pairs, _ = select_pairs(groups, verdicts, round=1)
    sampler.sleep()
    summary = train_preference(
        policy, copy.deepcopy(policy), pairs, _config(), refine=Refinement(), seed=0, pad_id=0,
        log=lambda row: None,
    )  # fmt: skip
    return _result(pairs, summary["loss_last"])


def official_round(work: Round, policy: Any, initial: Any) -> dict[str, float]:
    """The same by `generate`, two forwards with all logits, and DPOTrainer, in this process."""
    samples = _generate(work, policy)
    scores = [_scores(work, model, samples) for model in (policy, initial)]
    pairs = _pairs(work, samples, (scores[0] - scores[1]).tolist())
    return _result(pairs, _train(policy, copy.deepcopy(policy), pairs))


def _config() -> PreferenceConfig:
    return PreferenceConfig(
        learning_rate=RATE, beta=BETA, num_train_epochs=1, per_device_train_batch_size=BATCH
    )


def _result(pairs: list[Pair], loss: float) -> dict[str, float]:
    tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    return {"pairs": len(pairs), "tokens": tokens, "finite": float(loss == loss)}


def _generate(work: Round, policy: Any) -> list[list[list[int]]]:
    generate = hf_generate(Task(policy, ROWS, work.length + work.new_tokens))
    ids, request = work.ids(), Request(n=2, new_tokens=work.new_tokens)
    return [group for part in _parts(ids, ROWS // 2) for group in generate(part, request)]


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def _scores(work: Round, model: Any, samples: list[list[list[int]]]) -> Tensor:
    """[prompts, 2] log-probabilities of the responses."""
    rows = [p + r for p, group in zip(work.ids(), samples, strict=True) for r in group]
    found = []
    for part in _parts(rows, ROWS // 4):  # as many as their logits leave memory for
        ids = torch.tensor(part)
        logp = model(ids).logits[:, work.length - 1 : -1].log_softmax(-1)
        found.append(logp.gather(2, ids[:, work.length :, None]).sum((1, 2)))
    return torch.cat(found).view(-1, 2)


def _pairs(work: Round, samples: list[list[list[int]]], rewards: list[list[float]]) -> list[Pair]:
    pairs = []
    for prompt, group, (first, second) in zip(work.ids(), samples, rewards, strict=True):
        best = int(second > first)
        pairs.append(
            Pair(
                prompt=user(""), prompt_ids=tuple(prompt), chosen="", rejected="", round=1,
                chosen_ids=tuple(group[best]), rejected_ids=tuple(group[1 - best]),
                chosen_score=None, rejected_score=None,
            )
        )  # fmt: skip
    return pairs


def _train(policy: Any, reference: Any, pairs: list[Pair]) -> float:
    trainer, _ = trl_trainer(
        policy, reference, pairs, beta=BETA, learning_rate=RATE, num_train_epochs=1,
        per_device_train_batch_size=BATCH, max_grad_norm=1.0, logging_steps=10,
    )  # fmt: skip
    return float(trainer.train().training_loss)


def run_stage(way: str, stage: str, folder: Path) -> None:
    """One process: reads what the stage before it wrote, models included, and writes its own."""
    work = Round(**json.loads((folder / "round.json").read_text()))
    policy, initial = (
        LlamaForCausalLM.from_pretrained(folder / name).eval() for name in ("policy", "initial")
    )
    files = {name: folder / f"{name}.json" for name in ("generate", "judge", "result")}
    if stage == "round":
        files["result"].write_text(json.dumps(our_round(work, policy, initial)))
        policy.save_pretrained(folder / "trained")
    elif stage == "generate":
        files["generate"].write_text(json.dumps(_generate(work, policy)))
    elif stage == "judge":
        samples = json.loads(files["generate"].read_text())
        scores = [_scores(work, model, samples) for model in (policy, initial)]
        files["judge"].write_text(json.dumps((scores[0] - scores[1]).tolist()))
    else:
        samples, rewards = (json.loads(files[name].read_text()) for name in ("generate", "judge"))
        pairs = _pairs(work, samples, rewards)
        loss = _train(policy, copy.deepcopy(policy), pairs)
        files["result"].write_text(json.dumps(_result(pairs, loss)))
        policy.save_pretrained(folder / "trained")


if __name__ == "__main__":
    run_stage(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
