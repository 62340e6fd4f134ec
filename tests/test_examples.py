"""The examples run as they stand, in processes of their own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteDecoder
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama over bytes."""
    where = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    words = Tokenizer(models.BPE(vocab, [], unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = ByteDecoder()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(where)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [
        {"prompt": f"Name {i}.", "chosen": f"The name is {i}.", "rejected": "No." * (1 + i % 3)}
        for i in range(12)
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    rows = [{"prompt": "Say yes.", "response": text} for text in ("Yes.", "No.", "Perhaps.")]
    path = tmp_path_factory.mktemp("data") / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(name, *arguments):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "TQDM_DISABLE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_here():
    source = Path(__file__).read_text("utf-8")
    assert len(EXAMPLES) == 5 and all(f'run("{name}"' in source for name in EXAMPLES)


def test_the_kernels_alone():
    out = run("kernels_alone.py")
    assert "linear_preference_loss: " in out and "SPA " in out


def test_sampling_and_scoring(folder):
    out = run("sample_and_score.py", folder)
    assert "backend: paged" in out
    changes = [line for line in out.splitlines() if line.startswith("log-prob under")]
    assert len(changes) == 2
    for line in changes:  # the other model is the same
        assert all(abs(x) <= 0.01 for x in json.loads(line.partition(": ")[2]))


def test_judging_a_file(folder, responses):
    rows = [json.loads(line) for line in run("judge_responses.py", folder, responses).splitlines()]
    assert [row["response"] for row in rows] == ["Yes.", "No.", "Perhaps."]
    assert all(len(row["votes"]) == 3 for row in rows)


def test_spa_on_pairs(folder, pairs, tmp_path):
    out = run("spa_on_your_pairs.py", folder, pairs, tmp_path)
    assert "DPO {" in out and "SPA {" in out and "suspected: [" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0


@pytest.mark.skipif(
    not (find_spec("trl") and find_spec("datasets")), reason="trl is not installed (extra [trl])"
)
def test_dpo_by_trl(folder, pairs, tmp_path):
    run("trl_dpo.py", folder, pairs, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0
