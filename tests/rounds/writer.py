"""A model folder that writes prompts, of random words, and message trees to start srlm from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srlm_fast.sandbox.world import ITEMS

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = [*ITEMS[:16], "task", ":", ";"]
ASKED = [f"sort these words : {i}" for i in range(20)]
# Of a run that takes its prompts from it.
WRITES = {
    "--prompts.source": "self_instruct",
    "--prompts.template": "sandbox",
    "--prompts.num_prompts": "8",
    "--prompts.max_new_tokens": "60",
    "--prompts.temperature": "1",
    "--prompts.top_p": "1",
    "--prompts.min_words": "1",
    "--prompts.rouge_l": "1",
}
SMALL = {
    "--recipe": "srlm",
    "--rounds": "1",
    "--sampling.max_new_tokens": "8",
    "--sampling.keep_truncated": "true",
    "--evaluate.num_prompts": "4",
    "--evaluate.num_judge_groups": "3",
    "--eft.target": "rank",
    "--judge.prompt": "sandbox",
    "--judge.kind": "random",
    "--sft.learning_rate": "1e-4",
    "--preference.learning_rate": "1e-4",
}


def save_writer(folder: Path, chat: str | None = CHAT, **shape: Any) -> str:
    """A Llama whose vocabulary is `WORDS`, with random weights; tiny, but for `shape`."""
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.chat_template = chat
    tiny: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocab), eos_token_id=vocab["<|end|>"], bos_token_id=None, **(tiny | shape)
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return str(folder)


def save_trees(path: Path, prompts: Sequence[str] = ASKED) -> str:
    """Message trees with three ranked replies each."""

    def tree(i: int) -> dict[str, Any]:
        reply = {"role": "assistant", "lang": "en", "replies": []}
        texts = [f"fig {i % 5} tea", "tea", "fig"]
        replies = [{**reply, "text": t, "rank": r} for r, t in enumerate(texts)]
        prompt = {"role": "prompter", "lang": "en", "text": prompts[i]}
        return {"message_tree_id": str(i), "prompt": {**prompt, "replies": replies}}

    path.write_text("".join(json.dumps(tree(i)) + "\n" for i in range(len(prompts))))
    return str(path)
