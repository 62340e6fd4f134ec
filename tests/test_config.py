"""Recipes, scale overlays, dotted overrides, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from srlm_fast.config import Config, load_config, recipe_names, to_yaml
from srlm_fast.errors import UserError


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


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("method: [", "not valid YAML"),
        ("- a\n- b", "must be a mapping"),
        ("preference: 3", "group of settings"),
        ("seed: true", "must be of type int"),
        ("sampling: {num_candidates: 1}", "at least 2"),
        ("preference: {beta: 0}", "above 0"),
        ("data: {split: [0.5, 0.5]}", "three shares"),
        ("spa: {lambdas: []}", "lambdas"),
        ("judge: {top_p: 0}", "top_p"),
        ("dtype: float16", "one of auto, float32, bfloat16"),
        ("sft: {per_device_batch_size: 3}", "did you mean per_device_train_batch_size?"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(text: str, complaint: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=complaint.replace("?", r"\?")):
        load_config(str(recipe))
