from __future__ import annotations

import gzip
import importlib.machinery
import json
import sys
import types
from collections import Counter

import pytest

from srlm_fast.data.jsonl import write_jsonl
from srlm_fast.data.readers import read_preferences, read_prompts, read_trees
from srlm_fast.data.records import Message, Preference, RankedGroup, user
from srlm_fast.errors import UserError

ASK = {"role": "user", "content": "q"}


def say(text):
    return {"role": "assistant", "content": text}


def reply(text, rank, **changes):
    return {"text": text, "role": "assistant", "lang": "en", "rank": rank, "replies": []} | changes


def tree(text, *replies, **changes):
    root = {"text": text, "role": "prompter", "lang": "en", "deleted": False, "replies": replies}
    return {"message_tree_id": "t", "prompt": root | changes}


@pytest.fixture
def file(tmp_path):
    def write(rows, name="rows.jsonl"):
        write_jsonl(tmp_path / name, rows)
        return str(tmp_path / name)

    return write


def test_trees_give_ranked_first_turns_and_count_the_rest(file):
    deeper = reply("worse", 1, replies=[reply("second turn", 0)])
    source = file(
        [
            tree("one", deeper, reply("best", 0), reply("gone", 2, deleted=True)),
            tree("two", reply("beste", 0, lang="de"), reply("second", 1), reply(" ", 2)),
            tree("unranked", reply("a", None)),
            tree("zwei", reply("b", 0, lang="de"), lang="de"),
            tree("gone", reply("c", 0), deleted=True),
        ]
    )
    dropped = Counter()
    assert read_trees(source, "en", dropped) == [
        RankedGroup(user("one"), ("best", "worse"), (0.0, 1.0)),
        RankedGroup(user("two"), ("second",), (1.0,)),
    ]
    assert dropped == {
        "reply: deleted": 1,
        "reply: other language": 1,
        "reply: empty": 1,
        "reply: no rank": 1,
        "tree: no ranked reply": 1,
        "tree: other language": 1,
        "tree: deleted": 1,
    }
    assert [g.prompt for g in read_trees(source, "de")] == [user("zwei")]


def test_trees_may_be_gzipped(tmp_path):
    path = tmp_path / "trees.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(tree("one", reply("a", 0))).encode()))
    assert read_trees(str(path)) == [RankedGroup(user("one"), ("a",), (0.0,))]


def test_flat_messages_make_the_same_trees(file):
    def flat(identity, parent, message):
        return {k: v for k, v in message.items() if k != "replies"} | {
            "message_id": identity,
            "parent_id": parent,
        }

    rows = [
        flat("a", None, tree("one")["prompt"]),
        flat("b", "a", reply("worse", 1)),
        flat("c", "b", tree("a second turn")["prompt"]),
        flat("d", "a", reply("best", 0)),
        flat("e", "c", reply("not a first turn", 0)),
    ]
    expected = [RankedGroup(user("one"), ("best", "worse"), (0.0, 1.0))]
    assert read_trees(file(rows)) == expected


def test_real_trees(shared):
    dropped = Counter()
    groups = read_trees(str(shared / "data" / "oasst_sample.trees.jsonl"), "en", dropped)
    assert len(groups) == 99
    assert dropped == {"reply: no rank": 3, "tree: no ranked reply": 1}
    assert all(list(g.ranks) == sorted(g.ranks) and g.ranks[0] == 0 for g in groups)
    assert sum(len(g.responses) for g in groups) == 330


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [ASK], "chosen": [say("good")], "rejected": [say("bad")]},
        {"chosen": [ASK, say("good")], "rejected": [ASK, say("bad")]},
        {"prompt": "q", "chosen": [ASK, say("good")], "rejected": [ASK, say("bad")]},
        {"prompt": [ASK], "chosen": "good", "rejected": [say("bad")]},
        {"prompt": None, "chosen": [ASK, say("good")], "rejected": [ASK, say("bad")]},
    ],
    ids=["strings", "messages", "implicit", "ultrafeedback", "mixed", "null-prompt"],
)
@pytest.mark.parametrize(
    ("columns", "scores"),
    [
        ({}, (None, None)),
        ({"chosen_score": 7, "rejected_score": 0.5}, (7.0, 0.5)),
        ({"score_chosen": 7, "score_rejected": None}, (7.0, None)),
        ({"chosen-rating": 7, "rejected-rating": 0.5}, (7.0, 0.5)),
    ],
    ids=["no-scores", "ours", "ultrafeedback", "argilla"],
)
def test_preference_rows_of_every_shape(file, row, columns, scores):
    assert read_preferences(file([row | columns])) == [
        Preference(user("q"), "good", "bad", *scores)
    ]


def test_implicit_prompt_keeps_every_shared_turn(file):
    start = [{"role": "system", "content": "s"}, ASK, say("a"), ASK]
    row = {"chosen": [*start, say("good")], "rejected": [*start, say("bad")]}
    (pair,) = read_preferences(file([row]))
    assert pair.prompt == tuple(Message(m["role"], m["content"]) for m in start)
    assert (pair.chosen, pair.rejected) == ("good", "bad")


def test_conversations_know_more_of_the_prompt_than_its_column(file):
    start = [{"role": "system", "content": "s"}, ASK]
    row = {"prompt": "q", "chosen": [*start, say("good")], "rejected": [*start, say("bad")]}
    (pair,) = read_preferences(file([row]))
    assert pair.prompt == (Message("system", "s"), Message("user", "q"))


def test_unusable_pairs_are_counted(file):
    good = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    same = {"chosen": [ASK, say("x")], "rejected": [ASK, say("x")]}
    longer = {"prompt": "q", "chosen": [say("a"), ASK, say("b")], "rejected": [say("c")]}
    dropped = Counter()
    pairs = read_preferences(file([good, same, longer, good | {"rejected": " \n"}]), dropped)
    assert len(pairs) == 1
    assert dropped == {
        "pair: equal replies": 1,
        "pair: not one reply after the prompt": 1,
        "pair: empty reply": 1,
    }
    with pytest.raises(UserError, match=r"no usable row: pair: equal replies \(1\)"):
        read_preferences(file([same]))


def test_real_preferences(shared):
    pairs = read_preferences(str(shared / "data" / "preferences.jsonl"))
    assert len(pairs) == 2246
    assert all(p.chosen_score > p.rejected_score for p in pairs)


def test_prompts_of_every_shape(file):
    rows = [
        {"prompt": "a"},
        {"prompt": [ASK, say("x"), {"role": "user", "content": "b"}]},
        {"instruction": "c", "input": "", "output": "x"},
        {"instruction": "d", "input": "text"},
        {"messages": [{"role": "system", "content": "s"}, ASK, say("x")]},
        {"messages": [say("nobody asked")]},
        {"prompt": "  "},
    ]
    dropped = Counter()
    assert read_prompts(file(rows), dropped) == [
        user("a"),
        (Message("user", "q"), Message("assistant", "x"), Message("user", "b")),
        user("c"),
        user("d\n\ntext"),
        (Message("system", "s"), Message("user", "q")),
    ]
    assert dropped == {"prompt: empty": 2}


def test_prompts_one_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(" a b \r\n\nc\u2028d\n".encode())
    assert read_prompts(str(path)) == [user("a b"), user("c\u2028d")]


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_trees, {"text": "a"}, "row 1: expected a message tree.* found the columns text"),
        (read_trees, tree("a", reply("b", "first")), "row 1: broken message tree"),
        (read_trees, tree("a", "b"), "row 1: broken message tree"),
        (read_trees, tree("a", reply("b", 10**400)), "row 1: broken message tree"),
        (read_trees, {"parent_id": ["x"], "text": "a"}, r"row 1: parent_id is \['x'\], not text"),
        (read_trees, {"parent_id": None, "message_id": {}}, "row 1: message_id is {}, not text"),
        (read_prompts, {"instruction": [], "input": "x"}, r"no usable row: prompt: empty \(1\)"),
        (read_preferences, {"prompt": "a", "win": "b"}, "chosen and rejected; .* prompt, win"),
        (read_preferences, {"chosen": "a", "rejected": "b"}, "expected prompt, or else chosen"),
        (
            read_preferences,
            {"prompt": "q", "chosen": 5, "rejected": "b"},
            "row 1: expected text or",
        ),
        (
            read_preferences,
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": "high"},
            "row 1: the score of chosen is 'high'",
        ),
        (read_prompts, {"question": "a"}, "prompt, instruction or messages; .* question"),
        (read_prompts, {"prompt": [{"role": "human", "content": "a"}]}, "a role of system, user"),
        (read_prompts, {"prompt": [{"from": "human"}]}, "row 1: expected text or a list of role"),
    ],
)
def test_wrong_rows_name_what_was_expected_and_found(file, read, row, message):
    with pytest.raises(UserError, match=message):
        read(file([row]))


@pytest.mark.parametrize("read", [read_trees, read_preferences, read_prompts])
def test_missing_and_empty_sources(file, read, tmp_path):
    with pytest.raises(UserError, match="has no usable row: it is empty"):
        read(file([]))
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        read(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="has no usable row: it is empty"):
        read_prompts(str(tmp_path / "empty.txt"))


def test_an_empty_source_is_not_blamed_on_another_one(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n")
    dropped = Counter({"tree: deleted": 3})
    with pytest.raises(UserError, match=r"prompts\.txt has no usable row: it is empty"):
        read_prompts(str(tmp_path / "prompts.txt"), dropped)
    assert dropped == {"tree: deleted": 3}


def test_dataset_name_without_datasets_installed_names_the_cure(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"owner/name is no file; .* pip install datasets"):
        read_preferences("owner/name")


def test_dataset_name_with_a_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name != "owner/name":
            raise ValueError("unknown dataset")
        return [{"prompt": "q", "chosen": "good", "rejected": "bad"}]

    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    expected = [Preference(user("q"), "good", "bad")]
    assert read_preferences("owner/name") == read_preferences("owner/name:test") == expected
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    with pytest.raises(UserError, match="cannot load the HF dataset other/name: unknown dataset"):
        read_preferences("other/name")
