"""House rules that a linter does not know."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(p for top in ("srlm_fast", "kernels") for p in (ROOT / top).rglob("*.py"))
FOLDERS = ("srlm_fast", "kernels", "tests", "benchmarks", "docs", "examples", "csrc", ".ci")
SUFFIXES = {".py", ".md", ".txt", ".toml", ".yaml", ".jinja", ".cpp", ".cu"}
TEXTS = sorted(
    path
    for files in (ROOT.iterdir(), *((ROOT / folder).rglob("*") for folder in FOLDERS))
    for path in files
    if path.is_file() and (path.suffix in SUFFIXES or path.name in {"Makefile", "run"})
)

PRINTING = {"srlm_fast/loop.py", "srlm_fast/env.py"}
READING_ENVIRONMENT = (
    "srlm_fast/config/", "srlm_fast/env.py", "srlm_fast/parallel.py", "srlm_fast/sandbox/"
)  # fmt: skip
GLOBAL_RNG = re.compile(
    r"random\.(?!Random\b)\w+|(np|numpy)\.random\.(?!default_rng\b)\w+|torch\.(cuda\.)?manual_seed"
)
WORDS = {
    "a path of one machine": r"/(?:home|root|work|Users)/\w",
    "an unfinished place": r"\b(?:TO" r"DO|FIX" r"ME)\b",
    "a package registry": r"--(?:extra-)?index-url|\bpy(?:pi)\.org",
}


def banned(source: str, name: str) -> Iterator[str]:
    """What the package must not do: surprise the reader, the seed or the environment."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{name}:{node.lineno}: bare except"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}:
            if not name.startswith(READING_ENVIRONMENT):
                yield f"{name}:{node.lineno}: reads the environment"
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if call == "print" and name not in PRINTING:
                yield f"{name}:{node.lineno}: print"
            if call == "hash":
                yield f"{name}:{node.lineno}: hash() differs between processes; use hashlib"
            if GLOBAL_RNG.fullmatch(call):
                yield f"{name}:{node.lineno}: {call} uses the global random state"
            if call in {"eval", "exec", "pickle.load", "pickle.loads"} or (
                call == "torch.load" and keywords.get("weights_only") != "True"
            ):
                yield f"{name}:{node.lineno}: {call} can run what it reads"


@pytest.mark.parametrize(
    "source",
    [
        "try: pass\nexcept: pass",
        "import os\nos.environ['A']",
        "print(1)",
        "hash('a')",
        "random.choice([1])",
        "np.random.rand()",
        "torch.manual_seed(0)",
        "torch.load('f')",
        "pickle.loads(b'')",
    ],
)
def test_the_check_sees_each_banned_call(source: str) -> None:
    assert len(list(banned(source, "srlm_fast/data/x.py"))) == 1


def test_the_check_lets_the_right_way_pass() -> None:
    source = "random.Random(0).choice([1])\ntorch.load('f', weights_only=True)\ng.manual_seed(1)"
    assert not list(banned(source, "srlm_fast/data/x.py"))


def test_package_has_no_banned_call() -> None:
    names = {p: p.relative_to(ROOT).as_posix() for p in PACKAGES}
    assert not [line for p in PACKAGES for line in banned(p.read_text("utf-8"), names[p])]


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for path in PACKAGES:
        tree = ast.parse(path.read_text("utf-8"))
        nodes = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        public = [n for n in nodes if not n.name.startswith("_")]
        missing += [f"{path.name}: {n.name}" for n in public if ast.get_docstring(n) is None]
        if tree.body and ast.get_docstring(tree) is None and path.name != "__init__.py":
            missing.append(f"{path.name}: the module")
    assert not missing


@pytest.mark.parametrize("what", WORDS)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(WORDS[what])
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in TEXTS
        if (match := pattern.search(path.read_text("utf-8")))
    ]
    assert not found
