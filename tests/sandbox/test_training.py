import dataclasses
import itertools
import math
from random import Random
from typing import Any

import pytest
import torch

from srlm_fast.config import SandboxConfig
from srlm_fast.sandbox import training
from srlm_fast.sandbox.documents import draw_document
from srlm_fast.sandbox.model import new_model
from srlm_fast.sandbox.tokenizer import make_tokenizer, vocabulary
from srlm_fast.sandbox.training import greedy_exact, pretrain, schedule, token_rows
from srlm_fast.sandbox.world import WORLDS, parse_prompt, perfect_response

W4 = WORLDS["W4"]


def test_rows_are_the_documents_in_the_chat_template() -> None:
    first, second = itertools.islice(token_rows(W4, seed=3, chats=0), 2)
    assert first[-1] == second[0], "the target of a batch's last token starts the next batch"
    tokenizer = make_tokenizer()
    rng = Random("documents 3")
    text = ""
    while len(text.split()) < 2 * training.ROWS * training.ROW_LENGTH:
        user, assistant = draw_document(W4, rng)
        chat = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        text += tokenizer.apply_chat_template(chat, tokenize=False) + " "
    expected = tokenizer(text)["input_ids"]
    assert [*first.tolist(), *second[1:].tolist()] == expected[: 2 * len(first) - 1]


def test_first_batches_are_chats_only() -> None:
    ids = vocabulary()
    rows = itertools.islice(token_rows(W4, seed=0, chats=3), 6)
    reviews = [(batch == ids["review"]).sum().item() for batch in rows]
    assert reviews[:3] == [0, 0, 0]
    assert min(reviews[3:]) > 0


def test_schedule_warms_up_and_decays_to_five_percent() -> None:
    shares = [schedule(step, 1000) for step in range(1, 1001)]
    assert shares[0] < 0.03
    assert 0.95 < max(shares) == shares[training.WARMUP_STEPS - 1]
    assert math.isclose(shares[-1], 0.05)
    assert all(a > b for a, b in itertools.pairwise(shares[training.WARMUP_STEPS - 1 :]))


def test_initialisation() -> None:
    model = new_model(make_tokenizer(), seed=0)
    weights = dict(model.named_parameters())
    assert 0.8e6 < sum(w.numel() for w in weights.values()) < 0.85e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, std in {
        "model.embed_tokens.weight": 0.15,
        "model.layers.1.self_attn.q_proj.weight": 0.08,
        "model.layers.3.mlp.gate_proj.weight": 0.08,
        "model.layers.0.self_attn.o_proj.weight": 0.08 / 8**0.5,
        "model.layers.2.mlp.down_proj.weight": 0.08 / 8**0.5,
    }.items():
        assert abs(weights[name].std().item() / std - 1.0) < 0.03, name
    again = dict(new_model(make_tokenizer(), seed=0).named_parameters())
    other = dict(new_model(make_tokenizer(), seed=1).named_parameters())
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(weights[name], again[name])
    assert not torch.equal(weights[name], other[name])


def test_training_learns_and_repeats_exactly(quick: SandboxConfig) -> None:
    longer = dataclasses.replace(quick, pretrain_steps=8)
    (model, record), (twin, _) = (pretrain(longer, make_tokenizer(), seed=0) for _ in range(2))
    other, short = pretrain(quick, make_tokenizer(), seed=1)
    assert (record.steps, record.capped) == (8, False)
    assert record.loss < short.loss < 7.0
    for a, b, c in zip(model.parameters(), twin.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not model.training


def test_gate_extends_the_training_at_most_to_twice_the_steps(
    quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "EXTENSION_STEPS", 2)
    config = dataclasses.replace(quick, min_exact=0.75)
    shares = iter([0.2, 0.8])
    monkeypatch.setattr(training, "greedy_exact", lambda *_, **__: {"all": next(shares)})
    assert pretrain(config, make_tokenizer(), seed=0)[1].steps == 5
    monkeypatch.setattr(training, "greedy_exact", lambda *_, **__: {"all": 0.0})
    record = pretrain(config, make_tokenizer(), seed=0)[1]
    assert (record.steps, record.capped) == (7, False)


def test_time_cap_shortens_the_schedule_and_is_recorded(
    quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    monkeypatch.setattr(training, "CHECK_STEPS", 2)
    monkeypatch.setattr(training.time, "monotonic", itertools.count(0.0, 3.0).__next__)
    monkeypatch.setattr(training, "schedule", lambda *a: rates.append(a) or schedule(*a))
    config = dataclasses.replace(quick, pretrain_steps=100, max_seconds=14.0, min_exact=1.0)
    record = pretrain(config, make_tokenizer(), seed=0)[1]
    assert record.capped
    assert record.steps < 12
    assert rates[-1] == (record.steps, record.steps), "the learning rate still decays to its end"


class Answering:
    """Stands for a model that answers every prompt with `answer(task)`."""

    def __init__(self, tokenizer: Any, answer: Any) -> None:
        self.tokenizer, self.answer = tokenizer, answer

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        texts = []
        for row in self.tokenizer.batch_decode(input_ids, skip_special_tokens=True):
            task = parse_prompt(row)
            assert task is not None
            texts.append(self.answer(task) + " <|end|>")
        ids = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, ids["input_ids"]], dim=1)


def test_copying_test_counts_exact_answers_per_operation() -> None:
    tokenizer = make_tokenizer()
    assert set(
        greedy_exact(Answering(tokenizer, perfect_response), tokenizer, seed=0).values()
    ) == {1.0}
    repeats = Answering(tokenizer, lambda task: f"so we get {' '.join(task.items)} .")
    exact = greedy_exact(repeats, tokenizer, seed=0)
    assert exact["repeat"] == 1.0
    assert exact["swap"] == exact["rotate"] == exact["reverse"] == 0.0
    assert 0.1 < exact["all"] < 0.3
