"""python peak_sampling.py JSON: the peak of calls of a sampler, predicted and measured, in bytes.

A process of its own: the kernel's high-water mark is reset after first, tiny calls.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from srlm_fast.model.sizes import count_parameters, without_data
from srlm_fast.sampler import Sampler, SamplingParams
from srlm_fast.sampler.memory import Call, sampler_memory

TINY = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 300}


def main(case: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dtype, calls = getattr(torch, case["dtype"]), [Call(*call) for call in case["calls"]]
    model = without_data(AutoConfig.for_model(**case["model"]), dtype)
    found = sampler_memory(model, calls, device=torch.device("cpu"))
    assert found.pages is not None and found.work is not None
    predicted = count_parameters(model) * dtype.itemsize + found.pages + found.work
    for call in calls:
        run(case["model"] | TINY, dtype, [Call(call.kind, 2, 90, 2, 5)])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    backend = run(case["model"], dtype, calls)
    print(json.dumps([predicted, status("VmHWM") - before, backend]))


def run(shape: dict[str, Any], dtype: torch.dtype, calls: list[Call]) -> str:
    """Makes `calls`; responses are as long as they may be. The sampler's backend."""
    config = AutoConfig.for_model(**shape)
    sampler = Sampler(AutoModelForCausalLM.from_config(config, dtype=dtype))
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> list[Any]:
        ids: list[Any] = torch.randint(1, config.vocab_size, size, generator=generator).tolist()
        return ids

    for call in calls:
        prompts = draw(call.prompts, call.prompt_tokens)
        if call.kind == "generate":
            length = call.response_tokens
            sampler.generate(
                prompts, SamplingParams(n=call.rows, max_tokens=length, min_tokens=length)
            )
        elif call.kind == "score":
            sampler.score(prompts, draw(call.prompts, call.rows, call.response_tokens))
        else:
            sampler.next_logprobs(prompts, [1, 2, 3])
    return sampler.backend


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
