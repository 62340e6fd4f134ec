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
from tests.rounds.writer import WORDS, save_trees, save_writer

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


def main(case: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    settings = case["settings"] | {"recipe": case["recipe"]}
    if case["recipe"] == "spa":
        settings["data.preferences"] = save_pairs(folder / "pairs.jsonl", case)
    else:
        # Words that the model knows which reads them, or to it all prompts are one.
        texts = draw_texts(WORDS[:16] if "writer" in case else words(case["model"]), case)
        settings["data.trees"] = save_trees(folder / "trees.jsonl", texts)
    if "judge_prompt" in case:
        settings["judge.prompt"] = str(folder / "judge.txt")
        (folder / "judge.txt").write_text(case["judge_prompt"])
        settings["data.prompts"] = str(folder / "prompts.jsonl")
        rows = [{"prompt": text} for text in draw_texts(words(case["model"]), case, seed=1)]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(folder / "tiny", case, TINY, settings)
    found = measured(lambda: settings.update(run(folder / "large", case, {}, settings)))
    config = load_config(settings.pop("recipe"), settings)
    predicted = {phase.name: phase.peak for phase in prepare(config).memory.phases}
    both = {name: (predicted[name], found[stage]) for name, stage in case["phases"].items()}
    print(json.dumps([both, sampler_backend()]))


def save_pairs(path: Path, case: dict[str, Any]) -> str:
    texts = draw_texts(words(case["model"]), case)
    rows = [{"prompt": text, "chosen": "w1", "rejected": "w2"} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def draw_texts(known: list[str], case: dict[str, Any], seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(known, k=case["prompt_words"])) for _ in range(case["rows"])]


def words(shape: dict[str, Any]) -> list[str]:
    """All but the one that ends a response; a judge may say the last six."""
    scores = [f"Score:{i}" for i in range(6)]
    return [*(f"w{i}" for i in range(1, shape["vocab_size"] - 6)), *scores]


def run(
    folder: Path, case: dict[str, Any], change: dict[str, Any], settings: dict[str, str]
) -> dict[str, str]:
    """Models are as `case` has them, but for `change`; returns the settings with their folders."""
    models = {"model": save_model(folder / "model", case["model"] | change)}
    if "reference" in case:
        models["judge.reference"] = save_model(folder / "reference", case["reference"] | change)
    if "writer" in case:
        models["prompts.model"] = save_writer(folder / "writer", **(case["writer"] | change))
    line = ["--out", str(folder / "run")]
    for key, value in (settings | models).items():
        line += [f"--{key}", value]
    with contextlib.redirect_stdout(sys.stderr):
        assert loop(line) == 0
    return models


def save_model(folder: Path, shape: dict[str, Any]) -> str:
    # Of so many words one ends a response, so that hardly any ends before its limit.
    known = {word: i for i, word in enumerate(["<end>", *words(shape)])}
    backend = Tokenizer(WordLevel(known, unk_token="<end>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


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
