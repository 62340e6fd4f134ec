"""python peak_training.py JSON: the peak of two training steps, predicted and measured, in bytes.

A process of its own: the kernel's high-water mark is reset after a first, tiny training.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.train_engines import random_pairs
from srlm_fast.config import LoraConfig, PreferenceConfig
from srlm_fast.model.adapters import Adapters
from srlm_fast.model.sizes import without_data
from srlm_fast.model.weights import frozen_copy
from srlm_fast.train.memory import train_memory
from srlm_fast.train.preference import train_preference


def main(case: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    pairs, prompt, response = case["pairs"]
    train = PreferenceConfig(
        per_device_train_batch_size=pairs, num_train_epochs=2, logging_steps=1, **case["train"]
    )
    lora = LoraConfig(**case["lora"])
    items, longest = train.micro_batch_size or pairs, prompt + 2 * response
    item = longest
    if train.layout == "padded":
        longest, item = prompt + response, 2 * (prompt + response)
    dtype = getattr(torch, case["dtype"])
    predicted = train_memory(
        without_data(AutoConfig.for_model(**case["model"]), dtype, lora),
        train,
        device=torch.device("cpu"),
        tokens=items * item,
        rows=2 * items * response,
        longest=longest,
        forwards=pairs // items,
        reference=True,
    )

    def run(shape: dict[str, Any], *size: int) -> None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)
        reference = None if lora.r else frozen_copy(model)
        if lora.r:
            adapters = Adapters(model, lora, base=Path("base"))
            model, reference = adapters.model, adapters.frozen()
        train_preference(
            model, reference, random_pairs(*size, shape["vocab_size"]), train, seed=0,
            pad_id=0, log=lambda row: None,
        )  # fmt: skip

    run(case["model"] | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 300}, 2, 9, 7)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run(case["model"], pairs, prompt, response)
    print(json.dumps([predicted.peak, status("VmHWM") - before]))


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
