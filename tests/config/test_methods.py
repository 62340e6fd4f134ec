"""Combinations that make no sense are refused where the configuration is made."""

import pytest

from srlm_fast.config import Config
from srlm_fast.errors import UserError
from srlm_fast.recipes import load_config


@pytest.mark.parametrize(
    ("recipe", "changes", "complaint"),
    [
        ("srlm", {"rounds": "0"}, "rounds must be at least 1"),
        ("sandbox-spa", {"rounds": "0", **{"spa.no_seed": "true"}}, "rounds must be at least 1"),
        ("spa", {"rounds": "-1"}, "rounds must be at least 1"),
        ("srlm", {"spa.no_seed": "true"}, "spa.no_seed needs method spa"),
        ("spa", {"spa.refine_srlm": "true"}, "spa.refine_srlm is for method srlm"),
        (
            "srlm", {"spa.refine_srlm": "true", "spa.self_refinement": "false"},
            "asks for what spa.self_refinement false turns off",
        ),
        (
            "srlm", {"spa.refine_srlm": "true", "srlm.training": "positives"},
            "srlm.training positives makes none",
        ),
        ("spa", {"preference.label_smoothing": "0.1"}, "label_smoothing must be 0 where SPA"),
        ("spa", {"spa.no_seed": "true"}, "judge.reference sft is, without a seed, the first judge"),
        (
            "spa", {"spa.no_seed": "true", "judge.reference": "base"},
            "base is, without a seed, the first judge itself: set it to the model that this one"
            " was trained from, or to none",
        ),
        (
            "sandbox-spa", {"spa.no_seed": "true", "judge.reference": "previous"},
            r"previous is, .* trained from \(base\), or to none",
        ),
        (
            "srlm", {"judge.kind": "implicit", "eft.enabled": "false"},
            "judge.reference sft is, without eft, M1 itself",
        ),
        ("sandbox-spa", {"judge.reference": "some/model"}, "is no model of the sandbox"),
        (
            "srlm", {"judge.reference": "none"},
            "judge.reference is what the implicit judge compares with",
        ),
        ("srlm", {"data.slices": "rows"}, "data.slices says how spa cuts preference rows"),
        ("srlm", {"judge.scorer": "a:b"}, "judge.scorer needs kind: scorer"),
        ("spa", {"judge.kind": "scorer"}, "judge.scorer must name a function"),
        ("spa", {"judge.kind": "scorer", "judge.scorer": "pairrm"}, "must name a function"),
        ("spa", {"spa.tau_window": "9", "spa.tau": "dataset"}, "spa.tau_window needs tau: window"),
        ("spa", {"spa.tau_interval": "9"}, "spa.tau_interval needs tau: dataset"),
        ("spa", {"spa.warmup_fraction": "1"}, "spa.warmup_fraction must be at least 0 and below 1"),
        ("srlm", {"spa.alpha": "0.2"}, "spa.alpha is for method spa, or for srlm with spa.refine"),
        ("srlm", {"spa.decoupled": "false"}, "spa.decoupled is for method spa, or for srlm"),
        (
            "srlm", {"spa.refine_srlm": "true", "spa.num_seed_pairs": "9"},
            "spa.num_seed_pairs is for method spa; leave it out",
        ),
        ("spa", {"eft.max_tries": "3"}, "eft makes srlm's seed data, and spa has none of it"),
        ("spa", {"data.trees": "x"}, "data.trees is what srlm learns from"),
        ("srlm", {"data.preferences": "x"}, "data.preferences is what spa learns from"),
        ("sandbox-spa", {"data.prompts": "x"}, "the sandbox makes its own data"),
        ("srlm", {"data.num_test_prompts": "0"}, "data.num_test_prompts must be at least 1"),
        (
            "spa", {"pairs.length_control": "0.3"},
            "of two there are none; raise sampling.num_candidates",
        ),
        (
            "spa", {"pairs.anchored_rejection": "true", "rounds": "1"},
            "from the second round on; set rounds to 2 or more",
        ),
    ],
)  # fmt: skip
def test_senseless_combinations(recipe: str, changes: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config(recipe, changes)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("spa", {"rounds": "0"}),
        ("spa", {"spa.no_seed": "true", "judge.reference": "some/model"}),
        ("spa", {"spa.no_seed": "true", "judge.kind": "prompted"}),
        ("sandbox-spa", {"spa.no_seed": "true", "judge.reference": "base"}),
        ("srlm", {"judge.kind": "implicit"}),
        ("srlm", {"judge.kind": "implicit", "judge.reference": "base", "eft.enabled": "false"}),
        ("srlm", {"spa.refine_srlm": "true", "spa.alpha": "0.2", "spa.tau": "dataset"}),
        ("spa", {"pairs.length_control": "0.3", "sampling.num_candidates": "3"}),
        ("srlm", {"pairs.anchored_rejection": "true"}),
        ("spa", {"preference.label_smoothing": "0.1", "spa.self_refinement": "false"}),
    ],
)
def test_combinations_that_make_sense(recipe: str, changes: dict[str, str]) -> None:
    load_config(recipe, changes)


def test_labels_are_refined_by_spa_and_where_srlm_asks_for_it() -> None:
    assert not Config().refines_labels and Config(method="spa").refines_labels
    assert load_config("srlm", {"spa.refine_srlm": "true"}).refines_labels
    assert not load_config("spa", {"spa.self_refinement": "false"}).refines_labels
