"""The shape of the repository: floors, pairing of ops with their tests, names and sizes."""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "srlm_kernels"
PACKAGES = sorted(p for top in (ROOT / "srlm_fast", KERNELS) for p in top.rglob("*.py"))
SOURCES = sorted(
    [ROOT / "setup.py", *PACKAGES]
    + [p for top in ("tests", "benchmarks", "docs", "examples") for p in (ROOT / top).rglob("*.py")]
)

# Lowest first. A part imports from lower floors and from itself, never from its neighbours.
FLOORS = (
    {"srlm_kernels"},
    {"errors"},
    {"config", "installed", "parallel"},
    {"recipes"},
    {"data"},
    {"model"},
    {"sampler", "train"},
    {"judge", "prompts", "evaluate"},
    {"rounds", "sandbox"},
    {"job"},
    {"loop", "env", "integrations"},
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
IMPLEMENTATIONS = ("_chunked", "_tiled", "_triton")
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "tools"}


def dotted(path: Path) -> tuple[str, ...]:
    """`srlm_fast/judge/parser.py` as ("srlm_fast", "judge", "parser")."""
    base = KERNELS.parent if path.is_relative_to(KERNELS) else ROOT
    return path.relative_to(base).with_suffix("").parts


def part_of(module: tuple[str, ...]) -> str:
    """The part that a module belongs to; "" is the package's own `__init__`."""
    if module[0] == "srlm_kernels":
        return "srlm_kernels"
    return module[1] if len(module) > 1 and module[1] != "__init__" else ""


def imports(source: str, module: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every module that `source` imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from srlm_fast import judge` imports a part, `... import __version__` a name.
            yield from ((*base, alias.name) if len(base) == 1 else base for alias in node.names)


def at_run_time(source: str) -> str:
    """`source` without what only type checkers read."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.unparse(tree)


def violations(source: str, module: tuple[str, ...]) -> list[str]:
    part = part_of(module)
    if part == "":  # its public names are everyone's, and no part is imported with it
        source = at_run_time(source)
    found = []
    for target in imports(source, module):
        if target[0] not in {"srlm_fast", "srlm_kernels"}:
            continue
        other = part_of(target)
        if target[0] == "srlm_fast" and other not in FLOOR_OF:
            continue  # a name of srlm_fast/__init__.py, which imports no part itself
        if other != part and (part == "" or FLOOR_OF[other] >= FLOOR_OF[part]):
            found.append(f"{'.'.join(module)} must not import {'.'.join(target)}")
    return found


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import srlm_fast.rounds.srlm", "srlm_fast.judge.pairs"),
        ("from srlm_fast.loop import main", "srlm_fast.rounds.srlm"),
        ("from srlm_fast import rounds", "srlm_fast.data.jsonl"),
        ("def f():\n    from srlm_fast.judge import base", "srlm_fast.evaluate.policy"),
        ("from ..judge import base", "srlm_fast.evaluate.policy"),
        ("import srlm_fast.config", "srlm_kernels.losses"),
        ("from srlm_fast.data import records", "srlm_fast.__init__"),
        ("if TYPE_CHECKING:\n    from srlm_fast.loop import main", "srlm_fast.rounds.srlm"),
    ],
)
def test_the_check_sees_every_form_of_import(source: str, module: str) -> None:
    assert len(violations(source, tuple(module.split(".")))) == 1


def test_imports_go_only_to_lower_floors() -> None:
    unplaced = {part_of(dotted(p)) for p in PACKAGES} - FLOOR_OF.keys() - {""}
    assert not unplaced, f"say in FLOORS where these belong: {unplaced}"
    assert not [v for p in PACKAGES for v in violations(p.read_text("utf-8"), dotted(p))]


def test_ops_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "srlm_kernels", *sys.stdlib_module_names}
    for path in KERNELS.rglob("*.py"):
        foreign = {t[0] for t in imports(path.read_text("utf-8"), dotted(path))} - allowed
        assert not foreign, f"{path.name} imports {foreign}"


def test_every_op_has_a_reference_and_tests() -> None:
    trees = {path: ast.parse(path.read_text("utf-8")) for path in KERNELS.rglob("*.py")}
    defined = {p: {n.name for n in t.body if hasattr(n, "name")} for p, t in trees.items()}
    tested = {path.stem for path in (ROOT / "tests" / "srlm_kernels").glob("test_*.py")}
    made = {path.stem for path, names in defined.items() if path.stem in names}
    ops = {stem for stem in made if not stem.endswith(IMPLEMENTATIONS)}
    assert {"linear_logp", "linear_preference_loss", "row_stats", "logits_grad"} <= ops
    assert {f"{op}_ref" for op in ops} <= set().union(*defined.values())
    benches = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert {f"bench_{op}" for op in ops} <= benches
    public = {path.stem for path in defined if not path.stem.startswith("_")}
    untested = {n for n in public if not any(t.startswith(f"test_{n}") for t in tested)}
    assert not untested, f"no tests/srlm_kernels/test_<name>*.py for {untested}"


def test_no_folder_can_shadow_the_package_named_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_tests_mirror_the_tree() -> None:
    parts = {p.name for p in (ROOT / "srlm_fast").iterdir() if p.is_dir()}
    tests = ROOT / "tests"
    found = {p.relative_to(tests).parts[0] for p in tests.glob("*/**/test_*.py")}
    assert found <= parts | {"srlm_kernels", "benchmarks"}


def test_files_have_names_and_fit_in_the_head() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert not [p.name for p in SOURCES if p.stem in NAMELESS]
    assert not {p.name: n for p, n in lines.items() if n > 400}
    assert statistics.median(lines[p] for p in PACKAGES if p.name != "__init__.py") < 150


def body_lines(function: ast.FunctionDef) -> int:
    """Lines from the first statement after the docstring: a long list of keywords is no sin."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_fit_a_screen() -> None:
    functions = {
        f"{path.name}: {node.name}": body_lines(node)
        for path in PACKAGES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: lines for name, lines in functions.items() if lines > 60}
