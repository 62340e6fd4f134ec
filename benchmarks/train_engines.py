"""One preference step on token ids by TRL, and the pairs and models that steps are compared on."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.case import optional
from srlm_fast.data.records import Pair, user

PAD = 0


def policy_and_reference(shape: dict[str, Any], dtype: torch.dtype) -> list[PreTrainedModel]:
    """A Llama of random weights, and one near it: margins that are all zero would prove nothing."""
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None))
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * weight.std().nan_to_num() * torch.randn_like(weight)
    reference.requires_grad_(False)
    return [model.to(dtype).eval() for model in (policy, reference)]


def random_pairs(count: int, prompt: int, response: int, vocab: int, seed: int = 0) -> list[Pair]:
    """Pairs of so many tokens."""
    g = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab, (length,), generator=g).tolist())

    return [
        Pair(
            prompt=user(""), prompt_ids=ids(prompt), chosen="", chosen_ids=ids(response),
            rejected="", rejected_ids=ids(response), chosen_score=None, rejected_score=None,
            round=1,
        )
        for _ in range(count)
    ]  # fmt: skip


def trl_trainer(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    pairs: Sequence[Pair],
    *,
    way: str = "plain",
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """TRL's DPOTrainer on the CPU, and its collated batch of all `pairs`, which it would tokenise
    itself; ours are token ids. A PEFT policy is its own `reference` (None), as it is now. `options`
    of its DPOConfig. Raises Unavailable without TRL.

    way: "plain", "accelerated" by our head, or "packed": `SrlmDPOTrainer`.
    """
    trl, datasets = optional("trl"), optional("datasets")
    tokenizers, transformers = optional("tokenizers"), optional("transformers")
    from srlm_fast.integrations.trl import SrlmDPOTrainer, accelerate

    class OnTokenIds(trl.DPOTrainer):  # type: ignore[misc,name-defined]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [
        {"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids}
        for p in pairs
    ]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": PAD}, unk_token="<pad>"))
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="trl-"), "per_device_train_batch_size": len(pairs),
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": None,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
    }  # fmt: skip
    kind = SrlmDPOTrainer if way == "packed" else OnTokenIds
    trainer = kind(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(**(settings | options)),
        train_dataset=datasets.Dataset.from_list(
            [{k: list(v) for k, v in r.items()} for r in rows]
        ),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
        ),
    )
    if way == "accelerated":
        accelerate(trainer)
    return trainer, trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
