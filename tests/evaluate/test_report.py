import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from srlm_fast.errors import UserError
from srlm_fast.evaluate.report import render_report
from srlm_fast.evaluate.transcripts import answers_by_model, round_transcripts

ATTACK = '</pre><script>alert("x")</script><img src=http://evil onerror=alert(1)>&amp;'
VOID = {"meta"}


class Page(HTMLParser):
    """The elements of a page; fails where a tag is not closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = set(), [], "", []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def poisoned(value):
    """The same JSON with every string and key an attack."""
    if isinstance(value, dict):
        return {key: poisoned(v) for key, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return value + ATTACK if isinstance(value, str) else value


def rewrite(path, change):
    rows = [json.dumps(change(json.loads(line))) for line in path.read_text().splitlines()]
    path.write_text("\n".join(rows) + "\n")


def test_report_is_one_page_that_loads_nothing(run_dir):
    page = Page(render_report(run_dir))
    assert not page.tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "xlink:href", "action"}
    assert not any(name.startswith("on") for name in names)
    style = render_report(run_dir).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_report_shows_plots_table_transcripts_times_and_settings(run_dir):
    html = render_report(run_dir)
    for part in (
        "Oracle score", "The criteria apart", "Agreement of the judge", "Reward margins",
        "Mean length", "Throughput", "4.77 ± 0.04", "dropped in the round: duplicate",
        "sorted : fig nut . hope this helps !", "relevant yes exact yes Score: 5",
        "no score line", "cut off at the limit", "No pair was made of this prompt.",
        "answer of M3", "round-1/judgements", "20,000", "num_candidates: 4", "torch",
        "it judged nothing in a round",
    ):  # fmt: skip
        assert part in html, part


def test_report_shows_how_the_evaluation_data_was_made(run_dir):
    html = render_report(run_dir)
    assert "51 of 300 ranked groups gave evaluation data" in html
    cells = html.partition("Evaluation fine-tuning data")[2].partition("</table>")[0]
    rows = [Page(row).text for row in re.findall("<tr>.*?</tr>", cells)]
    assert rows == ["scorejudgedorder agreestaught", "2201818", "3.51", "4300160122"]


def test_every_text_of_a_run_is_escaped(run_dir):
    summary = poisoned(json.loads((run_dir / "summary.json").read_text()))
    for model in summary["models"]:
        model["dropped"] = {ATTACK: 1}
        model["criteria"] = {ATTACK: 0.5}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    for path in run_dir.rglob("*.jsonl"):
        rewrite(path, poisoned)
    html = render_report(run_dir)
    assert "<script" not in html and "<img" not in html
    page = Page(html)
    assert page.text.count(ATTACK) > 50
    assert not page.tags & {"script", "img"}


def test_chosen_and_rejected_candidates_are_marked(run_dir):
    first, second = round_transcripts(run_dir / "round-1", limit=8)
    chosen, rejected = first.split('class="response"')[1:3]
    assert ">chosen<" in chosen and "5.00" in chosen and "2 judgements" in chosen
    assert ">rejected<" in rejected and "1.00" in rejected
    assert first.count("not judged") == 1
    assert "chosen" not in second and "no score: no score line" in second


def test_transcripts_stop_at_the_limit(run_dir):
    assert len(round_transcripts(run_dir / "round-1", limit=1)) == 1
    assert round_transcripts(run_dir / "round-9", limit=1) == []


def test_answers_stand_side_by_side(run_dir):
    (article,) = answers_by_model(run_dir / "evaluation", ["SFT", "M3", "missing"], limit=2)
    assert article.index("answer of SFT") < article.index("answer of M3")
    assert article.count("answer of M3") == 1


def test_spa_report_without_votes_or_oracle(run_dir, summary):
    unknown = dict.fromkeys(
        (
            "oracle_score",
            "oracle_se",
            "criteria",
            "greedy_oracle_score",
            "judge",
            "win_rates",
            "eft",
        )
    )
    summary["models"] = [m | unknown | {"preference_accuracy": 0.6} for m in summary["models"]]
    (run_dir / "summary.json").write_text(json.dumps(summary))
    rewrite(run_dir / "round-1/judgements.jsonl", lambda row: row | {"votes": [], "score": -1.5})
    html = render_report(run_dir)
    Page(html)
    assert "-1.50" in html
    assert "Oracle score" not in html and "Agreement of the judge" not in html
    assert "held-out preference accuracy" in html


def test_report_renders_with_only_a_summary(run_dir, summary):
    for path in [*run_dir.glob("round-*"), run_dir / "evaluation"]:
        shutil.rmtree(path)
    (run_dir / "metrics.jsonl").unlink()
    summary["models"] = [{"name": "SFT", "round": 0}]
    summary["stages"] = []
    (run_dir / "summary.json").write_text(json.dumps(summary))
    html = render_report(run_dir)
    Page(html)
    assert "<svg" not in html and "Round 1" not in html
    assert "Configuration" in html


def test_rounds_are_in_numeric_order(run_dir):
    shutil.copytree(run_dir / "round-2", run_dir / "round-10")
    html = render_report(run_dir)
    assert html.index("Round 1:") < html.index("Round 2:") < html.index("Round 10:")


def test_report_of_an_unfinished_run_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"summary\.json does not exist"):
        render_report(tmp_path)
