"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from srlm_fast.config import Config
from srlm_fast.loop import main
from srlm_fast.recipes import load_config
from srlm_fast.sandbox.model import new_model
from srlm_fast.sandbox.tokenizer import make_tokenizer


def complaint(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Runs `argv`, which must fail with one line on stderr and the exit code."""
    assert main(list(argv)) == code
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and message.startswith("srlm_fast: ")
    return message


def test_print_config_gives_the_recipe_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--recipe", "spa", "--preference.beta", "0.3", "--print-config"]) == 0
    printed = tmp_path / "mine.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(str(printed)) == load_config("spa", {"preference.beta": "0.3"})


def test_default_recipe_is_sandbox_srlm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["method"] == "srlm"
    assert Config().method == "srlm"


def test_dry_run_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["--dry-run", "--out", str(out)]) == 0
    plan = capsys.readouterr().out
    assert "round 2: judging" in plan and "linear_preference_loss" in plan
    assert not out.exists()


def test_dry_run_of_a_model_of_which_only_the_configuration_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(new_model(make_tokenizer(), seed=0).config.to_json_string())
    pairs = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(8)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)))
    argv = ["--recipe", "spa", "--model", str(folder), "--data.preferences", str(data)]
    argv += ["--data.num_gold", "2", "--data.num_test_pairs", "1", "--rounds", "1"]
    argv += ["--prompts.num_prompts", "3", "--sampling.max_new_tokens", "50"]
    out = ["--out", str(tmp_path / "run")]
    assert main([*argv, *out, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "0.8M parameters in float32" in said and "scoring: at most" in said
    assert "no weights in" in said and "no tokenizer files in" in said
    assert main([*argv, *out, "--dry-run", "--device", "cuda", "--memory", "24"]) == 0
    assert "24.00 GB are free" in capsys.readouterr().out
    assert "GB at the least" in complaint(capsys, *argv, *out, "--dry-run", "--memory", "0.001")
    assert "--memory is for --dry-run" in complaint(capsys, *argv, *out, "--memory", "24")
    assert "no weights" in complaint(capsys, *argv, *out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "cure"),
    [
        (["--recipe", "sandbox-spaa"], "did you mean sandbox-spa?"),
        (["--recipe", "nowhere.yaml"], "does not exist"),
        (["--preference.bta", "0.1"], "did you mean beta?"),
        (["--samplng.top_p", "0.1"], "did you mean sampling?"),
        (["--learning_rate", "1"], "did you mean sft.learning_rate or preference.learning_rate?"),
        (["--output_dir", "x"], "the folder of a run is --out"),
        (["--rounds", "many"], "rounds must be a whole number"),
        (["--rounds", "0"], "rounds"),
        (["--rounds"], "--rounds needs a value"),
        (["many"], "'many' is not an option"),
        (["--preference.loss_type", "sigmoidd"], "sigmoid"),
        (["--judge.prompt", "additiv"], "additive"),
        (["--recipe", "spa"], "needs --model"),
        (["--recipe", "spa", "--model", "no/such/folder"], "no/such/folder"),
        (["--resume", "--out", "no/such/run"], "holds no run to resume"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "cuda:99", "--dry-run"], "--memory"),
        (["--dry-run", "--memory", "0"], "--memory"),
        (["--sandbox.world", "W9"], "W9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_refused_before_the_run(
    argv: list[str], cure: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = [] if "--out" in argv else ["--out", str(tmp_path / "run")]
    assert cure in complaint(capsys, *argv, *out)
    assert not (tmp_path / "run").exists()


def test_existing_folder_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert "--resume" in complaint(capsys, "--out", str(tmp_path))
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "many", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_data_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (model / "pytorch_model.bin").touch()
    spa = ["--recipe", "spa", "--model", str(model), "--out", str(tmp_path / "run")]
    assert "no tokenizer" in complaint(capsys, *spa, "--data.preferences", "x.jsonl")


def test_responses_that_fill_the_context(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tokenizer = make_tokenizer()
    new_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    argv = ["--recipe", "srlm", "--model", str(folder), "--out", str(tmp_path / "run")]
    argv += ["--data.trees", "x.jsonl", "--sampling.max_new_tokens", "10000"]
    capsys.readouterr()  # the progress of save_pretrained
    assert "--sampling.max_new_tokens" in complaint(capsys, *argv)


def test_help_is_quick_and_complete() -> None:
    """Nothing heavy is imported for --help."""
    code = "import sys; from srlm_fast.loop import main; main(['--print-config']); "
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
