"""Recipes, scale overlays, dotted overrides, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from srlm_fast.config import Config
from srlm_fast.errors import UserError
from srlm_fast.recipes import load_config, recipe_names, to_yaml


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(config))
    assert load_config(str(stored)) == config


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("sandbox")])
def test_scales_differ_in_size_only(name: str) -> None:
    """Smaller scales share the base model, so that its cache serves them all."""
    full, smoke = load_config(name), load_config(name, {"sandbox.scale": "smoke"})
    assert smoke.prompts.num_prompts < full.prompts.num_prompts
    assert smoke.evaluate.num_prompts < full.evaluate.num_prompts
    assert smoke.sandbox.pretrain_steps == full.sandbox.pretrain_steps
    assert smoke.preference == full.preference and smoke.judge == full.judge


def test_overrides_win_over_recipe_and_scale() -> None:
    changed = {"sandbox.scale": "smoke", "prompts.num_prompts": "7", "spa.lambdas": "[1, 0.5]"}
    config = load_config("sandbox-spa", changed)
    assert config.prompts.num_prompts == 7
    assert config.spa.lambdas == (1.0, 0.5)


def test_yaml_scientific_notation_is_a_number() -> None:
    """YAML reads 1e-4 as a string."""
    assert load_config("spa", {"preference.learning_rate": "1e-4"}).preference.learning_rate == 1e-4


def test_text_settings_are_taken_as_they_are() -> None:
    """Not as YAML, where a # starts a comment, a date is a date and a bracket an error."""
    for name in ("a #1.jsonl", "2024-01-01", "[x", "yes"):
        assert load_config("srlm", {"data.trees": name}).data.trees == name


@pytest.mark.parametrize("value", ["inf", "nan", "[1", "1.5", "one"])
def test_numbers_must_be_numbers(value: str) -> None:
    with pytest.raises(UserError, match="rounds must be a whole number"):
        load_config("srlm", {"rounds": value})


def test_recipes_hold_the_papers_numbers() -> None:
    """arXiv 2401.10020 section 3.1; arXiv 2406.04412 section 5.1 and its released code."""
    srlm, spa = load_config("srlm"), load_config("spa")
    assert (srlm.sft.learning_rate, srlm.sft.min_lr_ratio) == (5.5e-6, 0.2)
    assert (srlm.preference.learning_rate, srlm.preference.min_lr_ratio) == (1e-6, 0.1)
    assert srlm.preference.beta == spa.preference.beta == 0.1
    assert (srlm.sampling.num_candidates, srlm.sampling.temperature, srlm.sampling.top_p) == (
        (4, 0.7, 0.9)
    )
    assert (srlm.judge.prompt, srlm.judge.num_samples) == ("additive", 3)
    assert (srlm.prompts.temperature, srlm.prompts.top_p, srlm.prompts.rouge_l) == (0.6, 0.9, 0.7)
    assert (srlm.prompts.num_seed_demos, srlm.prompts.num_generated_demos) == (6, 2)
    assert spa.preference.learning_rate == 5e-7 and spa.preference.warmup_ratio == 0.1
    assert spa.preference.per_device_train_batch_size == 32 and spa.rounds == 3
    assert spa.spa.lambdas == (0.5, 0.25, 0.125)
    assert (spa.spa.alpha, spa.spa.k_percent, spa.spa.warmup_fraction) == (0.1, 10.0, 0.2)
    assert (spa.sampling.num_candidates, spa.sampling.max_new_tokens) == (2, 300)


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("method: [", "not valid YAML: .* \\(line 1\\)$"),
        ("seed: 2024-13-45", "not valid YAML: month"),
        ("[" * 5000, "not valid YAML"),
        ("seed: 1\nseed: 2", "seed is there twice, remove one \\(line 2\\)$"),
        ("sft: {max_length: 8, max_length: 9}", "max_length is there twice"),
        ("sandbox: 3", "^sandbox must be a group of settings, not 3"),
        ("sandbox: {scale: [1]}", "sandbox.scale must be one of"),
        ("scales: x", "^scales must be a group of settings, not 'x'"),
        ("scales: {full: 1}", "scales.full must be a group of settings, not 1"),
        ("- a\n- b", "must be a mapping"),
        ("preference: 3", "group of settings"),
        ("seed: true", "must be a whole number"),
        ("sampling: {num_candidates: 1}", "at least 2"),
        ("preference: {beta: 0}", "above 0"),
        ("preference: {save_steps: -1}", "preference.save_steps must not be negative"),
        ("preference: {save_total_limit: -1}", "save_total_limit must not be negative"),
        ("sft: {eval_steps: -1}", "sft.eval_steps must not be negative"),
        ("data: {split: [0.5, 0.5]}", "three positive shares"),
        ("spa: {lambdas: []}", "lambdas"),
        ("judge: {top_p: 0}", "top_p"),
        ("dtype: float16", "one of auto, float32, bfloat16"),
        ("sft: {per_device_batch_size: 3}", "did you mean per_device_train_batch_size\\?"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(text: str, complaint: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_config(str(recipe))


def test_groups_with_nothing_in_them_are_empty(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("sandbox:\nscales:\nsft:\n")
    assert load_config(str(recipe)) == Config()
    assert load_config(str(recipe), {"sft.max_length": "9"}).sft.max_length == 9


def test_unreadable_recipe_files(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match=r"mine\.yaml does not exist; give a YAML file"):
        load_config(str(recipe))
    recipe.write_bytes(b"model: caf\xe9\n")
    with pytest.raises(UserError, match=r"cannot read the recipe .*mine\.yaml: .*in UTF-8"):
        load_config(str(recipe))
    with pytest.raises(UserError, match=r"cannot read the recipe .*: Is a directory; give a YAML"):
        load_config(str(tmp_path))


def test_a_date_that_is_none_is_no_number() -> None:
    with pytest.raises(UserError, match="rounds must be a whole number, not '2024-13-45'"):
        load_config("srlm", {"rounds": "2024-13-45"})
