"""The report, rendered from the rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.fidelity import paper
from benchmarks.fidelity.claims import BySeed, Finding, entry, findings
from benchmarks.fidelity.study import of_variant
from benchmarks.fidelity.variants import VARIANTS
from benchmarks.rows import Row
from srlm_fast.evaluate.correlation import mean, standard_error
from srlm_fast.evaluate.table import lookup

MODELS = ("SFT", "M1", "M2", "M3")
ByVariant = Mapping[str, Sequence[Row]]

INTRODUCTION = """\
# Fidelity: the papers' tables on the sandbox

`python -m benchmarks.fidelity` runs what is below and writes this page; its rows are in
`benchmarks/results/fidelity.jsonl`. The sandbox is a world of word-list tasks with a model of 0.8M
parameters ([the sandbox](sandbox.md)): it can show whether a step of a method helps, not how much
it would help a large model. Numbers are means over seeds, each a pre-training with data of its own,
± their standard error. The papers' numbers, where there are some, stand beside them and are on
other scales. The score is the oracle's, 0 to 5."""
SRLM_NOTE = """\
In the paper the score is AlpacaEval 2.0's win rate, the length counts characters there, and GPT-4
decides the duels; here the oracle decides them, prompt by prompt, by the mean of two samples. The
five reward-model metrics are those of each model as the judge of held-out ranked responses: over
all pairs, ties half right, correlations as means over prompts; the paper names no convention."""
SPA_NOTE = """\
*gain* is over DPO on the seed in the same run (over SFT where there is no seed). *labels* is the
share of right ones among the self-made labels of all rounds, pairs of equal true score left out.
The paper's numbers are win rates on AlpacaEval 2.0 in percent, length-controlled / raw."""


def render(rows: list[Row], extra: Mapping[str, str]) -> str:
    """Markdown of the rows that were run with today's settings and `extra`."""
    groups = {v.key: of_variant(rows, v, extra) for v in VARIANTS}
    used = [row for group in groups.values() for row in group]
    if not used:
        return f"{INTRODUCTION}\n\nNothing has been run yet.\n"
    found = findings(_by_seed(groups))
    blocks = [
        INTRODUCTION,
        "## Does the sandbox agree?", *_agreement(found),
        "## Self-Rewarding Language Models", _srlm(groups), _duels(groups["srlm"]), SRLM_NOTE,
        "## Spread Preference Annotation",
        "### Ablation", _spa(groups, paper.ABLATION), *_same_flags(groups),
        "### Who judges", _spa(groups, paper.JUDGES),
        "### Size of the seed", _spa(groups, paper.SEEDS), SPA_NOTE,
        "## Every ordering", _orderings(found),
        "## How it was made", *_made(used),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _by_seed(groups: ByVariant) -> list[BySeed]:
    seeds: dict[int, dict[str, Row]] = {}
    for key, group in groups.items():
        for row in group:
            seeds.setdefault(row["seed"], {})[key] = row
    return [seeds[seed] for seed in sorted(seeds)]


def _agreement(found: Sequence[Finding]) -> list[str]:
    """Where the sandbox agrees with the papers and where not, in words."""
    counts = Counter(f.verdict for f in found)
    blocks = [
        f"Of the {len(found)} orderings of the papers that stand below, {counts['as reported']}"
        f" hold here, {counts['reversed']} are reversed, {counts['undecided']} are undecided (their"
        f" 95 % interval over seeds holds 0), {counts['not run']} have not been run on two seeds."
    ]
    for title, verdict in (
        ("The sandbox agrees:", "as reported"),
        ("It disagrees; the papers say, and the sandbox has the reverse:", "reversed"),
        ("It does not decide whether:", "undecided"),
    ):
        texts = [f"- {f.claim.text} ({_cell(f.differences, sign='+')})"
                 for f in found if f.verdict == verdict]  # fmt: skip
        blocks += [title, "\n".join(texts)] if texts else []
    return blocks


def _srlm(groups: ByVariant) -> str:
    rows = groups["srlm"]
    body = []
    for label, path, digits, values in paper.CHAINS:
        body.append([label, *_over_models(rows, path, digits)])
        body.append(["*paper*", *_reported(dict(values))])
    body.insert(2, ["oracle score, greedy", *_over_models(rows, "greedy_oracle_score", 2)])
    for label, key, reported in (
        ("pairs", "srlm", paper.PAIRS),
        ("pairs, without EFT data", "srlm/no-eft", paper.PAIRS_WITHOUT_EFT),
    ):
        body.append([label, *_over_models(groups[key], "pairs_kept", 0)])
        body.append(["*paper*", *_reported(reported)])
    for label, key in (
        ("oracle score, without EFT data", "srlm/no-eft"),
        ("oracle score, SFT on perfect responses instead of pairs", "srlm/positives"),
        ("control: random scores", "srlm/random"),
        ("control: longest wins", "srlm/longest"),
    ):
        body.append([label, *_over_models(groups[key], "oracle_score", 2)])
    return _table([f"{len(rows)} seeds", *MODELS], body)


def _over_models(rows: Sequence[Row], path: str, digits: int) -> list[str]:
    return [_measured(rows, name, path, digits) for name in MODELS]


def _reported(values: Mapping[str, float]) -> list[str]:
    return [str(values.get(name, "-")) for name in MODELS]


def _duels(rows: Sequence[Row]) -> str:
    body = []
    for (name, opponent), reported in paper.DUELS.items():
        found = [lookup(entry(row, name), "win_rates", opponent) or {} for row in rows]
        shares = [
            _cell([100 * f[part] for f in found if f.get(part) is not None], 1)
            for part in ("win", "tie", "lose")
        ]
        body.append([f"{name} against {opponent}", *shares, " / ".join(map(str, reported))])
    return _table(["duels, %", "win", "tie", "lose", "*paper*"], body)


def _spa(groups: ByVariant, lines: Sequence[paper.Line]) -> str:
    body = []
    for label, (key, name), reported in lines:
        rows = groups[key]
        body.append([
            label, str(len(rows)), _measured(rows, name, "oracle_score"),
            _measured(rows, name, "greedy_oracle_score"),
            _cell([_gain(row, name) for row in rows], sign="+"),
            _cell([_label_accuracy(row) for row in rows] if name == "last" else []),
            _measured(rows, name, "mean_length", 1), _measured(rows, name, "pairs_kept", 0),
            reported,
        ])  # fmt: skip
    head = ["", "seeds", "score", "greedy", "gain", "labels", "length", "pairs", "*paper*"]
    return _table(head, body)


def _same_flags(groups: ByVariant) -> list[str]:
    """That extrapolation changed little, where it did."""
    plain = {row["seed"]: _flags(row) for row in groups["spa/refinement"]}
    both = [row for row in groups["spa"] if row["seed"] in plain]
    same = sum(_flags(row) == plain[row["seed"]] != [] for row in both)
    if not same:
        return []
    return [
        "With extrapolated logits as many labels are flagged, and as many of them are wrong, as"
        f" with the policy's own on {same} of {len(both)} seeds: after so few steps an extrapolated"
        " margin is nearly 1 + lambda times the policy's, and the pairs with the least are the"
        " same."
    ]


def _flags(row: Row) -> list[Any]:
    return [flags for model in row["models"] if (flags := model.get("flags"))]


def _gain(row: Row, name: str) -> float | None:
    start, here = entry(row, "DPO") or entry(row, "SFT"), entry(row, name)
    if not here or here["name"] in ("SFT", "DPO"):
        return None
    gain: float = here["oracle_score"] - start["oracle_score"]
    return gain


def _label_accuracy(row: Row) -> float | None:
    """Over the pairs of all rounds that have a right label."""
    rounds = [m for m in row["models"] if m["name"].startswith("SPA") and m["labels"]]
    better, worse = (
        sum(m["labels"][x] * m["pairs_kept"] for m in rounds) for x in ("better", "worse")
    )
    return better / (better + worse) if better + worse else None


def _orderings(found: Sequence[Finding]) -> str:
    body = [
        [
            f.claim.method, f.claim.text, f.claim.reported, _cell(f.differences, sign="+"),
            f"{sum(d > 0 for d in f.differences)} of {len(f.differences)}", f.verdict,
        ]
        for f in found
    ]  # fmt: skip
    return _table(["", "ordering", "*paper*", "difference here", "seeds with it", "verdict"], body)


def _made(rows: Sequence[Row]) -> list[str]:
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    shared = " ".join(
        f"--{name} {value}" for name, value in rows[0]["settings"].items()
        if all(row["settings"].get(name) == value for row in rows)
    )  # fmt: skip
    seconds, dates = [row["seconds"] for row in rows], sorted({row["date"] for row in rows})
    made = sum(row["pretrain_seconds"] for row in rows)
    return [
        f"{len(rows)} runs at commit {commits}, from {dates[0]} to {dates[-1]}, all with"
        f" `{shared}`; each row has its whole command.",
        f"Without its base model a run took at most {max(seconds):.0f} seconds, of one thread, all"
        f" runs {sum(seconds) / 60:.0f} minutes; making the base models took {made / 60:.0f}.",
        "Versions: " + ", ".join(f"{n} {v}" for n, v in rows[-1]["versions"].items()) + ".",
    ]


def _measured(rows: Sequence[Row], name: str, path: str, digits: int = 2) -> str:
    return _cell([lookup(entry(row, name), *path.split(".")) for row in rows], digits)


def _cell(values: Sequence[float | None], digits: int = 2, sign: str = "") -> str:
    """Mean ± standard error of what is known."""
    known = [v for v in values if v is not None]
    centre, error = mean(known), standard_error(known)
    if centre is None:
        return "-"
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{centre:{sign}.{digits}f}{spread}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])
