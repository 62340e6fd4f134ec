import pytest

from srlm_fast.data.records import Pair, user
from srlm_fast.evaluate.labels import flag_metrics, label_accuracy


def oracle(prompt, response):
    return {"long": int(len(response) > 3), "polite": int("please" in response)}


def pair(chosen, rejected):
    return Pair(user("q"), (1,), chosen, (2,), rejected, (3,), None, None, 1)


RIGHT, WRONG, EQUAL = pair("please", "no"), pair("no", "please"), pair("a", "b")


def test_label_accuracy_leaves_out_pairs_without_a_right_label():
    assert label_accuracy(oracle, [RIGHT, WRONG, EQUAL, RIGHT]) == {
        "accuracy": pytest.approx(2 / 3),
        "better": 0.5,
        "worse": 0.25,
        "equal": 0.25,
        "true_gap": (2 - 2 + 0 + 2) / 4,
    }


def test_flags_are_measured_where_the_detector_was_on_and_a_label_can_be_wrong():
    pairs = [WRONG, WRONG, WRONG, RIGHT, RIGHT, EQUAL]
    flags = [None, True, False, True, False, True]
    assert flag_metrics(oracle, pairs, flags) == {
        "flagged": 2.0,
        "precision": 0.5,
        "recall": 0.5,
        "base_rate": 0.5,
    }


def test_no_flag_has_no_precision():
    metrics = flag_metrics(oracle, [WRONG, RIGHT], [False, False])
    assert (metrics["precision"], metrics["recall"]) == (None, 0.0)
    assert flag_metrics(oracle, [], [])["base_rate"] is None


def test_flags_and_pairs_must_match():
    with pytest.raises(ValueError):
        flag_metrics(oracle, [WRONG], [])
