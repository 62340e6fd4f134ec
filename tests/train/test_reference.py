"""Cached references: the training is that with a live one, and what is kept can be trusted."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from transformers import MistralConfig, MistralForCausalLM

from srlm_fast.config import PreferenceConfig
from srlm_fast.errors import UserError
from srlm_fast.model.sizes import PeakBytes
from srlm_fast.model.weights import frozen_copy
from srlm_fast.train import batches, reference
from srlm_fast.train.noise import Refinement
from srlm_fast.train.preference import train_preference
from tests.pretended_gpu import on_gpu
from tests.train import tiny

CONFIG = PreferenceConfig(
    learning_rate=3e-3, num_train_epochs=3, per_device_train_batch_size=5, logging_steps=1
)
REFINE = Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6)


@pytest.fixture
def train(make_model, pairs, tmp_path):
    def run(cache, refine=None, *, dtype=torch.float64, data=pairs, **options):
        model, logs = make_model(dtype=dtype), []
        other = model if cache != "none" else frozen_copy(model)
        summary = train_preference(
            model, other, data, replace(CONFIG, reference_cache=cache, **options), refine=refine,
            seed=0, pad_id=0, log=logs.append, cache=tmp_path,
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()]), summary, logs

    return run


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize(
    ("cache", "refine"),
    [
        ("logps", None),
        ("states", None),
        ("states", REFINE),
        ("states", replace(REFINE, tau="dataset")),
    ],
)
def test_cached_is_live(train, cache, layout, refine):
    live, summary, logs = train("none", refine, layout=layout)
    kept, again, later = train(cache, refine, layout=layout, micro_batch_size=2)
    torch.testing.assert_close(kept, live, atol=1e-10, rtol=0)
    assert again.get("flags") == summary.get("flags")
    for row, expected in zip(later, logs, strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("cache", ["logps", "states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_within_the_noise_that_was_measured(train, cache, dtype):
    _, summary, _ = train(cache, dtype=dtype)
    assert summary["loss_first"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("cache", ["logps", "states"])
def test_short_pairs_first_do_not_hide_the_noise_of_long_ones(cache, make_model, pairs, tmp_path):
    """Padding beside a long row moves the roundings of a short one, and long sums have more."""
    long = [
        replace(p, chosen_ids=p.chosen_ids[:5] * 9, rejected_ids=p.rejected_ids[:5] * 8)
        for p in pairs
    ]
    for seed in range(4):
        model = make_model(seed=seed, dtype=torch.bfloat16)
        config = replace(CONFIG, reference_cache=cache, layout="padded")
        train_preference(
            model, model, [*pairs[:5], *long], config, seed=seed, pad_id=0, log=lambda row: None,
            cache=tmp_path,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_of_weights_does_not_depend_on_threads(dtype):
    model, found = torch.nn.Linear(1500, 1500, dtype=dtype), set()  # threads share sums so large
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(reference.fingerprint(model))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    with torch.no_grad():
        model.weight[3, 2] += 0.5
    assert reference.fingerprint(model) not in found


@pytest.mark.parametrize(
    "change",
    [
        {"final_logit_softcapping": 3.0},
        {"logit_scale": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 1e-3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_is_of_the_function_too(make_model, change):
    model = make_model()
    before = reference.fingerprint(model)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert reference.fingerprint(model) != before


def test_a_fingerprint_takes_no_second_model(monkeypatch):
    """As 64-bit numbers a bf16 embedding was four times its size, and its squares as much again."""
    weights = torch.randn(1000, 77 * 400, generator=torch.Generator().manual_seed(0))
    model = torch.nn.ParameterDict({"embedding": torch.nn.Parameter(weights.bfloat16())})
    whole = model["embedding"].nbytes
    with PeakBytes(model.parameters()) as held:
        found = reference.fingerprint(model)
    assert held.peak < 2 * whole
    monkeypatch.setattr(reference, "_STRETCH", weights.numel())
    with PeakBytes(model.parameters()) as held:
        assert reference.fingerprint(model) == found, "it is that of sums over the whole"
    assert held.peak >= 8 * whole


def test_saving_changes_no_fingerprint(tmp_path):
    config = MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    before = reference.fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = MistralForCausalLM.from_pretrained(tmp_path)
    model.config.use_cache = False
    assert reference.fingerprint(model) == reference.fingerprint(loaded) == before


def test_cached_sums_on_a_gpu_are_of_the_products_of_the_loss(gpu, pairs, monkeypatch):
    """Scoring by itself takes other kernels there, whose roundings no batch would show."""
    taken, logp = [], reference.linear_logp

    def watched(*args, **options):
        taken.append(options["impl"])
        return logp(*args, **options)

    monkeypatch.setattr(reference, "linear_logp", watched)
    model, config = on_gpu(tiny.new_model(dtype=torch.bfloat16)), CONFIG
    config = replace(config, reference_cache="logps", num_train_epochs=1)
    train_preference(model, model, pairs, config, seed=0, pad_id=0, log=lambda row: None)
    assert set(taken) == {"chunked"}


@pytest.mark.parametrize("cache", ["logps", "states"])
def test_another_start_is_found(train, cache, make_model, pairs, tmp_path):
    model, other = make_model(), frozen_copy(make_model(seed=1))
    with pytest.raises(RuntimeError, match="margin of the first step is"):
        train_preference(
            model, other, pairs, replace(CONFIG, reference_cache=cache), seed=0, pad_id=0,
            log=lambda row: None, cache=tmp_path,
        )  # fmt: skip


@pytest.mark.parametrize("cache", ["logps", "states"])
def test_a_pair_that_is_not_finite_does_not_hide_another_start(make_model, pairs, tmp_path, cache):
    """The noise that was measured was NaN then, and no margin is above that."""
    models = make_model(tied=False), make_model(seed=1, tied=False)
    for model in models:
        with torch.no_grad():
            model.model.embed_tokens.weight[60] = math.nan
    bad = [replace(pairs[0], chosen_ids=(60, 3)), *pairs[1:]]
    config = replace(CONFIG, reference_cache=cache, per_device_train_batch_size=12)
    with pytest.raises(RuntimeError, match="margin of the first step is"):
        train_preference(
            models[0], frozen_copy(models[1]), bad, config, seed=0, pad_id=0,
            log=lambda row: None, cache=tmp_path,
        )  # fmt: skip


def test_caching_goes_on_where_it_was_interrupted(train, monkeypatch, tmp_path):
    expected, _, _ = train("states", micro_batch_size=2)
    files = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(files) >= 6 and all(name.endswith(".safetensors") for name in files)
    removed = sorted(files)[:2]
    for name in removed:
        (tmp_path / name).unlink()
    saved, save = [], reference.save_file

    def watched(tensors, path):
        saved.append(path.name)
        save(tensors, path)

    monkeypatch.setattr(reference, "save_file", watched)
    again, _, _ = train("states", micro_batch_size=2)
    assert torch.equal(again, expected)
    assert sorted(name.replace(".partial", ".safetensors") for name in saved) == removed


def test_a_file_that_was_cut_short_is_made_again(train, tmp_path):
    """As after a loss of power; it was taken for whole, and ended the training."""
    expected, _, _ = train("states", micro_batch_size=2)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    broken, empty = sorted(whole)[:2]
    broken.write_bytes(whole[broken][:-9])
    empty.write_bytes(b"")
    again, _, _ = train("states", micro_batch_size=2)
    assert torch.equal(again, expected)
    assert all(path.read_bytes() == data for path, data in whole.items())


@pytest.mark.parametrize("cache", ["logps", "states"])
def test_a_full_disk_is_one_sentence(train, monkeypatch, cache):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: os error 28")

    monkeypatch.setattr(reference, "save_file", full)
    with pytest.raises(UserError, match=r"cannot keep the reference.*os error 28.*to none"):
        train(cache)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_noise_is_measured_within_the_limit_of_tokens(train, pairs, monkeypatch, layout):
    """Short pairs make micro-batches of many; as many long ones were measured at once."""
    sizes, states = [], batches.Batch.states

    def watched(self, model):
        sizes.append((self.input_ids.numel(), len(self.cu_seqlens) // 2))
        return states(self, model)

    monkeypatch.setattr(batches.Batch, "states", watched)
    short = [
        replace(p, prompt_ids=(5,), chosen_ids=(6, i), rejected_ids=(7,))
        for i, p in enumerate([*pairs, *pairs], 2)
    ]
    data = [*short, *pairs]
    config = {"micro_batch_tokens": 70, "per_device_train_batch_size": 36, "layout": layout}
    train("logps", data=data, **config)
    assert max(pairs for _, pairs in sizes) > 5
    assert max(tokens for tokens, _ in sizes) <= 70


def test_other_weights_have_other_files(train, tmp_path, make_model, pairs):
    train("states")
    before = {p.name for p in tmp_path.iterdir()}
    model = make_model(seed=1)
    train_preference(
        model, model, pairs, replace(CONFIG, reference_cache="states"), seed=0, pad_id=0,
        log=lambda row: None, cache=tmp_path,
    )  # fmt: skip
    after = {p.name for p in tmp_path.iterdir()}
    assert before < after and len(after) == 2 * len(before)


def test_what_cannot_be_cached_is_said(train, make_model, pairs):
    with pytest.raises(UserError, match="reference_cache to states or none"):
        train("logps", REFINE)
    model = make_model()
    with pytest.raises(ValueError, match="its own reference"):
        train_preference(model, model, pairs, CONFIG, seed=0, pad_id=0, log=lambda row: None)
    with pytest.raises(ValueError, match="needs a folder"):
        train_preference(
            model, model, pairs, replace(CONFIG, reference_cache="states"), seed=0, pad_id=0,
            log=lambda row: None,
        )  # fmt: skip
