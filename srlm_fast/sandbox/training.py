"""Pre-training of M0: packed rows of documents, next-token loss, and the copying test."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from srlm_fast.config import SandboxConfig
from srlm_fast.sandbox.documents import draw_chat, draw_document
from srlm_fast.sandbox.model import new_model
from srlm_fast.sandbox.oracle import judge_response
from srlm_fast.sandbox.tokenizer import ASSISTANT, END, USER, vocabulary
from srlm_fast.sandbox.world import OPERATIONS, World, draw_prompt, get_world

ROWS, ROW_LENGTH = 16, 128
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 40
FINAL_RATIO = 0.05
EXTENSION_STEPS = 200
EXTENSION_LEARNING_RATE = 1e-3
# Chats alone at first: copying emerges in half the tokens that the full mix needs for it.
CHAT_FRACTION = 0.25
GATE_PROMPTS = 100
CHECK_STEPS = 50


@dataclass(frozen=True)
class Pretraining:
    """How it went; written beside the weights as `pretraining.json`."""

    world: str
    seed: int
    steps: int
    seconds: float
    loss: float  # nats per token, mean over the last 50 steps
    exact: dict[str, float]  # greedy exact answers, per operation and `all`
    capped: bool  # the time cap cut it short: the result depends on the machine's speed


def pretrain(config: SandboxConfig, tokenizer: Any, *, seed: int) -> tuple[Any, Pretraining]:
    """A freshly trained M0 (fp32, CPU, eval mode) and the record of its training.

    `pretrain_steps` steps, then extensions while the copying test is below `min_exact`, at most as
    many steps again. When the steps do not fit into `max_seconds`, the schedule is shortened to
    what fits, so that the learning rate still decays to its end.
    """
    start = time.monotonic()
    deadline = start + config.max_seconds
    chats = int(CHAT_FRACTION * config.pretrain_steps)
    batches = token_rows(get_world(config.world), seed, chats)
    trainer = _Trainer(new_model(tokenizer, seed=seed), batches)
    complete = trainer.run(config.pretrain_steps, PEAK_LEARNING_RATE, deadline)
    exact = greedy_exact(trainer.model, tokenizer, seed=seed)
    while (
        complete and exact["all"] < config.min_exact and trainer.steps < 2 * config.pretrain_steps
    ):
        complete = trainer.run(EXTENSION_STEPS, EXTENSION_LEARNING_RATE, deadline)
        exact = greedy_exact(trainer.model, tokenizer, seed=seed)
    return trainer.model, Pretraining(
        world=config.world,
        seed=seed,
        steps=trainer.steps,
        seconds=round(time.monotonic() - start, 1),
        loss=trainer.mean_loss(),
        exact=exact,
        capped=not complete,
    )


class _Trainer:
    """The model with its optimiser and its place in the stream of batches."""

    def __init__(self, model: Any, batches: Iterator[torch.Tensor]) -> None:
        self.model = model
        self.batches = batches
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True
        )
        self.losses: deque[torch.Tensor] = deque(maxlen=CHECK_STEPS)
        self.steps = 0

    def run(self, steps: int, peak: float, deadline: float) -> bool:
        """One cycle of the learning rate; False if the deadline (monotonic time) shortened it."""
        planned, start, step = steps, time.monotonic(), 0
        self.model.train()
        with tqdm(total=steps, desc="pre-training M0", unit="step", disable=None) as progress:
            while step < steps:
                step += 1
                self.losses.append(self._step(peak * schedule(step, steps)))
                progress.update()
                if step % CHECK_STEPS == 0:
                    steps = min(steps, _fitting_steps(step, steps, start, deadline))
                    progress.total = steps
                    progress.set_postfix(loss=f"{self.mean_loss():.3f}")
        self.steps += steps
        self.model.eval()
        return steps == planned

    def mean_loss(self) -> float:
        """Nats per token over the last steps."""
        return torch.stack(list(self.losses)).mean().item()

    def _step(self, rate: float) -> torch.Tensor:
        batch = next(self.batches)
        logits = self.model(input_ids=batch[:-1].view(ROWS, ROW_LENGTH), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[1:])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _fitting_steps(step: int, steps: int, start: float, deadline: float) -> int:
    """How many of `steps` fit, judged by the pace so far once half of the time is spent."""
    now = time.monotonic()
    if now < (start + deadline) / 2:
        return steps
    return step + max(0, int((deadline - now) * step / (now - start)))


def schedule(step: int, steps: int) -> float:
    """The learning rate of step 1..steps as a share of the peak: warm-up, cosine down to 5 %."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return min(1.0, step / WARMUP_STEPS) * (FINAL_RATIO + (1.0 - FINAL_RATIO) * cosine)


def token_rows(world: World, seed: int, chats: int) -> Iterator[torch.Tensor]:
    """Endless batches of packed documents, the first `chats` of them of chats only.

    A batch is int64 [ROWS * ROW_LENGTH + 1]; its last token is only a target, and the first input
    of the next batch. Documents run on from row to row.
    """
    ids = vocabulary()
    rng = Random(f"documents {seed}")
    buffer: list[int] = []
    size = ROWS * ROW_LENGTH
    for batch in itertools.count():
        draw = draw_chat if batch < chats else draw_document
        while len(buffer) <= size:
            user, assistant = draw(world, rng)
            words = [USER, *user.split(), END, ASSISTANT, *assistant.split(), END]
            buffer.extend(ids[word] for word in words)
        yield torch.tensor(buffer[: size + 1])
        del buffer[:size]


@torch.inference_mode()
def greedy_exact(model: Any, tokenizer: Any, *, seed: int) -> dict[str, float]:
    """The share of exactly right greedy answers on 100 prompts: per operation, and `all`."""
    rng = Random(f"gate {seed}")
    tasks = [draw_prompt(rng) for _ in range(GATE_PROMPTS)]
    chats = [[{"role": "user", "content": str(task)}] for task in tasks]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    prompt_length = inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=48,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    asked, exact = Counter[str](), Counter[str]()
    for task, text in zip(tasks, texts, strict=True):
        asked.update(["all", task.operation])
        if judge_response(task, text).exact:
            exact.update(["all", task.operation])
    return {name: exact[name] / asked[name] for name in ("all", *OPERATIONS) if asked[name]}
