import random
import re
from functools import cache

import pytest

from srlm_fast.prompts.rouge import RougeIndex, lcs_length, rouge_l, words


def lcs_by_definition(a, b):
    @cache
    def length(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + length(i + 1, j + 1)
        return max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


def test_lcs_equals_its_definition():
    rng = random.Random(0)
    for _ in range(300):
        letters = "ab" if rng.random() < 0.5 else "abcdefgh"
        a, b = (rng.choices(letters, k=rng.randrange(12)) for _ in range(2))
        assert lcs_length(a, b) == lcs_by_definition(a, b)


def test_lcs_is_longer_than_a_machine_word():
    a = [str(i) for i in range(200)]
    assert lcs_length(a, a[::2]) == 100
    assert lcs_length(a, a[::-1]) == 1


def test_rouge_l_is_the_f_measure():
    a, b = words("The cat sat on the mat."), words("the CAT ate: the mat")
    assert (len(a), len(b), lcs_length(a, b)) == (6, 5, 4)
    precision, recall = 4 / 5, 4 / 6
    assert rouge_l(a, b) == pytest.approx(2 * precision * recall / (precision + recall))
    assert rouge_l([], []) == 0.0
    assert rouge_l(a, []) == 0.0


def test_words_are_those_of_googles_rouge_score():
    """Its tokenizer, without stemming: what is no ASCII letter or digit separates."""
    rng = random.Random(0)
    letters = "abcXYZ019 _-.,'\"()\n\t@"
    for _ in range(200):
        text = "".join(rng.choices(letters, k=rng.randrange(30)))
        assert words(text) == re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
    assert words("Straße 東京") == ["straße", "東京"]


def near_copies(rng, count, vocabulary):
    """Texts of which many are edits of earlier ones, so that every threshold has both answers."""
    texts = []
    for _ in range(count):
        if texts and rng.random() < 0.6:
            new = list(rng.choice(texts))
            for _ in range(rng.randrange(5)):
                new.insert(rng.randrange(len(new) + 1), rng.choice(vocabulary))
                del new[rng.randrange(len(new))]
            rng.random() < 0.2 and rng.shuffle(new)
        else:
            new = rng.choices(vocabulary, k=rng.randrange(1, 20))
        texts.append(new)
    return texts


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 0.85, 1.0])
@pytest.mark.parametrize("size", [8, 300], ids=["few words", "many words"])
def test_index_equals_brute_force(threshold, size):
    rng = random.Random(size)
    index, added, answers = RougeIndex(threshold), [], set()
    for new in near_copies(rng, 150, [f"w{i}" for i in range(size)]):
        expected = any(rouge_l(new, old) > threshold for old in added)
        assert index.has_similar(" ".join(new)) is expected
        answers.add(expected)
        index.add(" ".join(new))
        added.append(new)
    assert answers == ({True, False} if threshold < 1 else {False})


def test_threshold_is_exclusive():
    index = RougeIndex(0.7)
    index.add("a b c d e f g x y z")
    assert rouge_l(list("abcdefgxyz"), list("abcdefgqrs")) == 0.7
    assert not index.has_similar("a b c d e f g q r s")
    assert index.has_similar("a b c d e f g x r s")


def test_empty_texts():
    index = RougeIndex(0.7)
    assert not index.has_similar("a")
    index.add("?!")
    assert not index.has_similar("?!")
    assert not index.has_similar("")


def test_repeated_words_count_as_often_as_they_occur():
    index = RougeIndex(0.7)
    index.add("very very very good")
    assert not index.has_similar("very good")
    assert index.has_similar("very very good")
