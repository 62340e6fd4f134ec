"""What `prepare` refuses: what otherwise stops a run, or is ignored by it, after hours."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from srlm_fast.errors import UserError
from srlm_fast.job import prepare
from srlm_fast.recipes import load_config
from srlm_fast.sandbox.model import new_model
from srlm_fast.sandbox.tokenizer import make_tokenizer

PLAIN = {"spa.self_refinement": "false"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the sandbox's shape."""
    made, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    new_model(tokenizer, seed=0).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.mark.parametrize(
    ("recipe", "changes", "complaint"),
    [
        # Regression: found out when the first pairs were to be trained on.
        ("sandbox-srlm", {"preference.loss_type": "exo_pair"}, "exo_pair: label_smoothing must"),
        (
            "sandbox-spa",
            PLAIN | {"preference.loss_type": "hinge", "preference.label_smoothing": "0.1"},
            "preference.label_smoothing is nothing to loss_type hinge; leave it out",
        ),
        ("sandbox-srlm", {"preference.simpo_gamma": "1"}, "simpo_gamma is nothing to loss_type"),
        ("sandbox-spa", {"preference.rdpo_alpha": "0.1"}, "rdpo_alpha is nothing to loss_type"),
        (
            "sandbox-srlm", {"judge.prompt": "additive"},
            r"judge.prompt takes \d+ tokens and judge.max_new_tokens 60, which leaves no room",
        ),
        (
            "sandbox-spa", {"judge.kind": "expected", "judge.prompt": "additive"},
            r"judge.prompt takes \d+ tokens, which leaves no room for a response",
        ),
        (
            "sandbox-srlm", {"evaluate.head_to_head": "true", "pairwise.max_new_tokens": "200"},
            r"pairwise.prompt takes \d+ tokens and pairwise.max_new_tokens 200, which leaves no",
        ),
        # Regression: only a prompted judge of the rounds was looked at.
        (
            "sandbox-srlm", {"judge.kind": "expected", "judge.max_new_tokens": "10000"},
            "judge.max_new_tokens = 10000 leaves no room",
        ),
    ],
)  # fmt: skip
def test_refused_before_the_run(recipe: str, changes: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        prepare(load_config(recipe, changes))


def test_a_judge_that_is_its_own_reference(folder: Path) -> None:
    """Regression: its rewards are 0, or what sampling and scoring round apart, and made pairs."""
    (other := folder / "same").symlink_to(folder)
    names = {"model": str(folder), "judge.reference": str(other), "spa.no_seed": "true"}
    with pytest.raises(UserError, match="same is, without a seed, the first judge itself"):
        prepare(load_config("spa", names | {"sampling.max_new_tokens": "8"}))


def test_a_tokenizer_that_cannot_write_expected_scores(folder: Path, tmp_path: Path) -> None:
    """Regression: the first evaluation said so, after SFT."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Score:": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    model = new_model(make_tokenizer(), seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    changes = {"model": str(tmp_path), "template": "plain", "judge.kind": "expected"}
    changes |= {"sampling.max_new_tokens": "8", "judge.prompt": "sandbox"}
    with pytest.raises(UserError, match="does not write the digits 0 to 5 as one token each"):
        prepare(load_config("spa", changes))
