"""python peak_run.py JSON FOLDER: the peak of each phase of a run, predicted and measured, in
bytes, and how the sampler's ops run.

A process of its own: the kernel's high-water mark is reset before a stage, after a tiny run.
"""

import contextlib
import ctypes
import gc
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from srlm_fast.installed import sampler_backend
from srlm_fast.job import prepare
from srlm_fast.loop import main as loop
from srlm_fast.recipes import load_config
from srlm_fast.rounds.manifest import Run

STAGES = {
    "sampling": "round-1/samples", "judging": "round-1/judgements", "scoring": "round-1/judgements",
    "preference": "train/SPA1",
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


def main(case: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    data = folder / "pairs.jsonl"
    draw = random.Random(0)
    words = [f"w{i}" for i in range(1, case["model"]["vocab_size"])]
    texts = [" ".join(draw.choices(words, k=case["prompt_words"])) for _ in range(case["rows"])]
    rows = [{"prompt": text, "chosen": "w1", "rejected": "w2"} for text in texts]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {"data.preferences": str(data), **case["settings"]}
    run(folder / "tiny", case["model"] | TINY, settings)
    found = measured(lambda: run(folder / "large", case["model"], settings))
    config = load_config("spa", settings | {"model": str(folder / "large" / "model")})
    predicted = {phase.name: phase.peak for phase in prepare(config).memory.phases}
    both = {name: (predicted[name], found[STAGES[name]]) for name in case["phases"]}
    print(json.dumps([both, sampler_backend()]))


def run(folder: Path, shape: dict[str, Any], settings: dict[str, str]) -> None:
    # Of so many words one ends a response, so that hardly any ends before its limit.
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, shape["vocab_size"])}}
    backend = Tokenizer(WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    del model
    words = ["--recipe", "spa", "--model", str(folder / "model"), "--out", str(folder / "run")]
    for key, value in settings.items():
        words += [f"--{key}", value]
    with contextlib.redirect_stdout(sys.stderr):
        assert loop(words) == 0


def measured(act: Any) -> dict[str, int]:
    """The high-water mark of each stage that `act` runs, over what there was before."""
    peaks: dict[str, int] = {}
    before, plain = reset(), Run._timed

    @contextlib.contextmanager
    def timed(self: Run, name: str) -> Iterator[dict[str, Any]]:
        reset()
        with plain(self, name) as stage:
            yield stage
        peaks[name] = status("VmHWM") - before

    Run._timed = timed  # type: ignore[method-assign]
    act()
    return peaks


def reset() -> int:
    """The mark falls to what there is now, which it gives."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
