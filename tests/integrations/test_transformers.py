"""`attn_implementation="srlm_fast"` against transformers' own implementations."""

import copy
from functools import partial

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_compatibility_function,
    padding_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from srlm_fast.errors import UserError
from srlm_fast.integrations import transformers as integration
from srlm_fast.integrations.transformers import (
    Sequences,
    check_packing,
    register_attention,
    sequences,
)
from srlm_kernels.prefix_attention import sees
from tests.sampler.families import FAMILIES, UNSUPPORTED, VOCAB

LENGTHS = (25, 3, 1, 31)  # the windows of the families are 20 tokens
# The masks of these are made without positions: to them a packed row is one sequence, whatever the
# attention.
WITHOUT_POSITIONS = {"opt", "gpt_oss"}
SERVED = sorted(FAMILIES.keys() - WITHOUT_POSITIONS)
CHUNKS = ("phimoe", "llama4_text")

register_attention()


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator) for n in lengths]


def packed(sequences):
    ids = torch.cat(sequences)[None]
    positions = torch.cat([torch.arange(len(row)) for row in sequences])[None]
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def gradients(model, logits, weights):
    """Of a sum of logits that no token's softmax makes vanish."""
    model.zero_grad()
    (logits * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_packed(model, tolerance, lengths=LENGTHS):
    """Logits and gradients of a packed row are those of its sequences, each on its own."""
    alone, model = copy.deepcopy(model), model
    model.set_attn_implementation("srlm_fast")
    given = rows(lengths)
    weights = torch.randn(sum(lengths), VOCAB, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([alone(row[None], use_cache=False).logits[0] for row in given])
    found = model(**packed(given)).logits[0]
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    theirs, ours = gradients(alone, expected, weights), gradients(model, found, weights)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm()
        assert error <= 10 * tolerance * gradient.norm() + 1e-9, name


@pytest.fixture
def no_dense_masks(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a mask of all pairs of tokens was made")

    monkeypatch.setattr(integration, "sdpa_mask", refuse)


def in_float64(model):
    """`model` in the widest dtype that it runs in, and a bound of its rounding errors."""
    if any(hasattr(module, "experts") for module in model.modules()):
        return model, 2e-5  # torch has no grouped products in float64
    return model.double(), 2e-6  # an eager softmax, and rotations, are fp32 all the same


@pytest.mark.parametrize("family", SERVED)
def test_packed_sequences_are_alone(family, no_dense_masks):
    check_packed(*in_float64(FAMILIES[family]()))


@pytest.mark.parametrize("family", CHUNKS)
def test_a_window_or_chunks_in_the_mask_alone_are_kept(family, no_dense_masks):
    check_packed(*in_float64(UNSUPPORTED[family]()), (130, 7, 150, 55))


def test_in_float64_nothing_but_rounding_differs():
    check_packed(FAMILIES["llama"]().double(), 1e-13)
    check_packed(FAMILIES["mistral"]().double(), 1e-13)


def test_bf16_rounds_as_sdpa_does():
    exact = FAMILIES["llama"]()
    given = packed(rows(LENGTHS))
    truth = exact(**given).logits
    errors = {}
    for name in ("sdpa", "srlm_fast"):
        model = copy.deepcopy(exact).bfloat16()
        model.set_attn_implementation(name)
        errors[name] = (model(**given).logits.float() - truth).norm()
    assert errors["srlm_fast"] <= 1.2 * errors["sdpa"]


@pytest.mark.parametrize("family", [*FAMILIES, *UNSUPPORTED])
def test_what_mixes_up_sequences_is_found(family):
    model = (FAMILIES | UNSUPPORTED)[family]()
    before = model.config._attn_implementation
    try:
        check_packed(*in_float64(copy.deepcopy(model)))
    except (AssertionError, AttributeError, TypeError, UserError):
        with pytest.raises(UserError, match=r"pad them instead|for packed rows only"):
            check_packing(model)
    else:
        check_packing(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padded_rows_are_sdpas_to_the_last_bit(family, side):
    model = FAMILIES[family]()
    given = rows((25, 31, 7))
    ids = torch.zeros(3, 31, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(given):
        place = slice(31 - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    results = []
    for name in ("sdpa", "srlm_fast"):
        model.set_attn_implementation(name)
        logits = model(ids, attention_mask=mask).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        results.append([logits, *gradients(model, logits, weights * mask[..., None]).values()])
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_generation_is_sdpas():
    model = FAMILIES["llama"]()
    given = {"input_ids": rows((9,))[0][None], "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**given)
    model.set_attn_implementation("srlm_fast")
    assert torch.equal(model.generate(**given), expected)


def packing(rule, lengths):
    """`rule` inside each sequence, as transformers builds it."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    marks = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row))
                         for row in lengths])  # fmt: skip
    return packed_sequence_compatibility_function(rule, positions, marks)


ONE, MANY = [[5, 1, 9, 3]], [[5, 1, 9, 3], [2, 2, 13, 1], [18]]
NO_PADDING = torch.zeros(3, dtype=torch.int64)
READ = {
    "causal": packing(causal_mask_function, ONE),
    "rows": packing(causal_mask_function, MANY),
    "window": packing(sliding_window_causal_mask_function(4), MANY),
    "window of two": packing(sliding_window_causal_mask_function(2), MANY),
    "window of one": packing(sliding_window_causal_mask_function(1), MANY),
    "window too wide to matter": packing(sliding_window_causal_mask_function(13), ONE),
    "chunks": packing(chunked_causal_mask_function(4, NO_PADDING), MANY),
}
NOT_READ = {
    "one sequence": causal_mask_function,
    "a window of one sequence": sliding_window_causal_mask_function(4),
    "both ways": packing(lambda b, h, q, k: q >= 0, MANY),
    "blocks": blockwise_overlay(torch.tensor([[0, 0, 1, 1, 1] + [-1] * 13])),
    "keys left out": and_masks(
        packing(causal_mask_function, ONE),
        padding_mask_function(torch.tensor([[True] * 8 + [False] + [True] * 9])),
    ),
    "every other key": packing(lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0), ONE),
}


def dense(rule, count):
    return sdpa_mask(count, 18, 18, mask_function=rule, allow_is_causal_skip=False)[:, 0]


@pytest.mark.parametrize("name", READ)
def test_a_mask_is_read_as_what_it_shows(name):
    count = len(ONE) if name in ("causal", "window too wide to matter") else len(MANY)
    found = sequences(READ[name], count, 18, "cpu")
    assert isinstance(found, Sequences)
    places = found.plan.places(torch.device("cpu"))
    shown = sees(places.at((slice(None), None)), places, found.window)
    blocks = [shown[18 * i : 18 * i + 18, 18 * i : 18 * i + 18] for i in range(count)]
    assert torch.equal(torch.stack(blocks), dense(READ[name], count))
    assert shown.sum() == sum(block.sum() for block in blocks)  # nothing across rows
    assert found.window == {"window": 4, "window of two": 2}.get(name)


@pytest.mark.parametrize("name", NOT_READ)
def test_other_masks_are_left_to_sdpa(name):
    assert sequences(NOT_READ[name], 1, 18, "cpu") is None


def test_fsdp_hands_the_sequences_on_as_they_are():
    utils = pytest.importorskip("torch.distributed.utils")
    found = sequences(READ["window"], 3, 18, "cpu")
    assert utils._apply_to_tensors(lambda t: t.half(), {"mask": [found]}) == {"mask": [found]}


def test_one_wait_for_the_device():
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.waits += function._schema.name == "aten::_local_scalar_dense"
            return function(*args, **(kwargs or {}))

    with Counting() as counting:
        assert sequences(READ["window"], 3, 18, "cpu") is not None
    assert counting.waits == 0  # `.item()` and `bool()`; the one `.tolist()` copies instead


def test_dropout_and_options_of_padded_rows_are_refused():
    model = FAMILIES["llama"]().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.set_attn_implementation("srlm_fast")
    with pytest.raises(UserError, match="attention dropout to 0"):
        model(**packed(rows(LENGTHS)))
    for family, what in (("gemma2", "a softcap"), ("gpt_oss", "sinks")):
        model = FAMILIES[family]()
        model.set_attn_implementation("srlm_fast")
        with pytest.raises(UserError, match=f"has {what} for packed rows only"):
            model(rows((9,))[0][None])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_without_padding_is_one_with(tmp_path, checkpointing):
    data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows((9, 4, 17, 2) * 3)]
    results = []
    for name in ("eager", "srlm_fast"):
        model = FAMILIES["qwen3"]()
        model.set_attn_implementation(name)
        collate = padded if name == "eager" else DataCollatorWithFlattening()
        trainer = Trainer(
            model,
            TrainingArguments(
                tmp_path, per_device_train_batch_size=4, max_steps=6, learning_rate=0.01,
                optim="sgd", logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
                disable_tqdm=True, gradient_checkpointing=checkpointing,
            ),
            train_dataset=data,
            data_collator=collate,
        )  # fmt: skip
        trainer.train()
        results.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(results[0]) == 6
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def padded(features):
    """Right-padded rows; what predicts nothing has no label."""
    width = max(len(row["input_ids"]) for row in features)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in features:
        rest = width - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * rest)
        batch["labels"].append(row["labels"] + [-100] * rest)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * rest)
    return {name: torch.tensor(value) for name, value in batch.items()}


def test_trl_without_padding_is_trl_with(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed (extra [trl])")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (with trl)")
    from tests.integrations.tokens import tokenizer

    data = datasets.Dataset.from_list([{"input_ids": r.tolist()} for r in rows((9, 4, 17, 2) * 3)])
    make = partial(
        trl.SFTConfig, output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=6,
        learning_rate=0.01, optim="sgd", logging_steps=1, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    results = []
    for name, without in (("sdpa", False), ("srlm_fast", True)):
        model = FAMILIES["llama"]()
        model.set_attn_implementation(name)
        trainer = trl.SFTTrainer(
            model=model, args=make(padding_free=without), train_dataset=data,
            processing_class=tokenizer(),
        )  # fmt: skip
        trainer.train()
        results.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert results[1] == pytest.approx(results[0], rel=1e-5)
