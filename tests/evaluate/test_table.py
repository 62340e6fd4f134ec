from copy import deepcopy

from srlm_fast.evaluate.reward_model import reward_model_metrics
from srlm_fast.evaluate.table import WIDTH, agreement_rows, dropped_rows, result_rows, summary_table


def row_of(text, label):
    """The cells of the one line that starts with `label`."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).split("  ")


def test_table_has_models_as_columns_and_the_asked_measures_as_rows(summary):
    text = summary_table(summary)
    assert text.splitlines()[0] == "srlm on sandbox W4, seed 0"
    assert text.splitlines()[2].split() == ["SFT", "M1", "M2", "M3"]
    cells = [cell.strip() for cell in row_of(text, "oracle score (0 to 5) ± se") if cell]
    assert cells == ["3.91 ± 0.04", "4.00 ± 0.04", "4.50 ± 0.04", "4.77 ± 0.04"]
    for label in (
        "relevant", "substantial", "answers", "well formed", "exactly right",
        "win/tie/lose against M1",
        "judge: pairs right", "exact match", "Spearman", "Kendall tau", "EFT", "mean length",
        "pairs kept", "dropped in the round: tie", "dropped in the round: duplicate",
        "dropped EFT groups: order disagrees",
    ):  # fmt: skip
        row_of(text, label)


def test_columns_are_aligned_and_fit_the_terminal(summary):
    lines = summary_table(summary).splitlines()[2:]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= WIDTH


def test_models_that_do_not_fit_continue_in_a_further_block(summary):
    models = summary["models"]
    summary["models"] = [{**deepcopy(models[1]), "name": f"M{i}"} for i in range(12)]
    lines = summary_table(summary).splitlines()
    assert max(map(len, lines)) <= WIDTH
    heads = [line.split() for line in lines if line.strip().startswith("M")]
    assert len(heads) > 1
    assert [name for head in heads for name in head] == [f"M{i}" for i in range(12)]


def test_a_value_one_model_lacks_is_a_dash_and_a_measure_all_lack_is_left_out(summary):
    rows = dict(result_rows(summary["models"]))
    assert rows["pairs kept"] == ["-", "-", "188", "188"]
    assert rows["  score gap, chosen less rejected"] == ["-", "-", "1.25", "0.83"]
    assert rows["  tokens, chosen/rejected"] == ["-", "-", "21.0/18.5", "21.0/18.5"]
    assert rows["  chosen less likely than before"] == ["0.25"] * 4
    assert rows["win/tie/lose against SFT"] == ["-", *["54%/29%/17%"] * 3]
    assert rows["win/tie/lose against M2"] == ["-", "-", "-", "54%/29%/17%"]
    assert rows["EFT: ranked groups kept/judged"] == ["-", "51/300", "-", "-"]
    assert "held-out preference accuracy" not in rows
    assert not any("own judge's" in label for label in rows)


def test_a_score_of_zero_is_not_missing(summary):
    summary["models"][0] |= {"oracle_score": 0.0, "oracle_se": None, "pairs_kept": 0}
    rows = dict(result_rows(summary["models"]))
    assert rows["oracle score (0 to 5) ± se"][0] == "0.00"
    assert rows["pairs kept"][0] == "0"


def test_run_without_oracle_shows_what_its_judge_says(summary):
    unknown = dict.fromkeys(("oracle_score", "oracle_se", "criteria", "greedy_oracle_score"))
    models = [m | unknown | {"judge_score": 3.25, "judge_se": 0.1} for m in summary["models"]]
    labels = dict(result_rows(models))
    assert labels["own judge's mean score ± se"] == ["3.25 ± 0.10"] * 4
    assert not any("oracle score" in label for label in labels)


def test_everything_dropped_is_listed_with_its_reason(summary):
    summary["models"][2] |= {
        "prompts_dropped": {"rouge": 40},
        "test_prompts_dropped": {"prompt too long": 2},
        "training": {"dropped": {"too long": 1}},
    }
    assert dropped_rows(summary["models"]) == [
        ("dropped prompts: rouge", ["-", "-", "40", "-"]),
        ("dropped in the round: tie", ["-", "-", "9", "9"]),
        ("dropped in the round: duplicate", ["-", "-", "311", "311"]),
        ("dropped in training: too long", ["-", "-", "1", "-"]),
        ("dropped EFT groups: order disagrees", ["-", "69", "-", "-"]),
        ("dropped test prompts: prompt too long", ["-", "-", "2", "-"]),
        ("dropped test judgements: no score line", ["3", "3", "3", "3"]),
    ]


def test_a_summary_of_bare_models_is_a_table_of_names(summary):
    summary["models"] = [{"name": "SFT", "round": 0}]
    assert "SFT" in summary_table(summary)


def test_agreement_is_given_by_every_convention():
    judge = reward_model_metrics([[3.0, 3.0, 1.0], [5.0, 4.0]], [[0, 1, 2], [1, 0]])
    rows = dict(agreement_rows([{"name": "M1", "judge": judge}]))
    assert rows["pairs right, all pairs, ties wrong"] == ["0.500"]
    assert rows["pairs right, mean of prompts, ties wrong"] == ["0.333"]
    assert rows["pairs right, all pairs, ties right"] == ["0.750"]
    assert rows["5-best, all responses"] == ["0.000"]
    assert len(rows) == 8 + 7
    assert agreement_rows([{"name": "SFT", "judge": None}]) == []
