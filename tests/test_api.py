"""The public names: what their import costs, where they come from, and what is said about them."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import srlm_fast
import srlm_kernels
from srlm_fast.installed import OPTIONAL

ROOT = Path(__file__).resolve().parent.parent
TABLE = (ROOT / "docs" / "api.md").read_text("utf-8")
STABLE_OPS = {"linear_logp", "linear_preference_loss", "losses", "PairLogps", "explain"}


def fresh(code: str) -> list[str]:
    """The JSON list that a new interpreter prints at the end of `code`."""
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_import_loads_nothing_but_the_standard_library() -> None:
    code = """
import json
before = set(sys.modules)
import srlm_fast
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    assert set(fresh(code)) - set(sys.stdlib_module_names) == {"srlm_fast"}


def test_all_names_load_no_optional_package_and_touch_no_gpu() -> None:
    code = """
import json, torch
def touched(*_): raise AssertionError("an import initialises CUDA")
torch.cuda._lazy_init = torch._C._cuda_init = touched
import srlm_fast
for name in srlm_fast.__all__: getattr(srlm_fast, name)
assert not torch.cuda.is_initialized()
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(fresh(code))
    assert "srlm_fast.sampler" in loaded
    optional = {module.partition(".")[0] for _, module in OPTIONAL.values()}
    assert not (optional | {"flash_attn", "axolotl", "verl", "openrlhf"}) & loaded


@pytest.mark.parametrize("name", srlm_fast.__all__)
def test_a_name_is_the_one_of_its_module(name: str) -> None:
    value = getattr(srlm_fast, name)
    assert value.__name__ == name and value.__module__.startswith("srlm_fast.")
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert value.__doc__ and name in dir(srlm_fast)


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse(Path(srlm_fast.__file__).read_text("utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and node.body and
                ast.unparse(node.test) == "TYPE_CHECKING")  # fmt: skip
    seen = {}
    for node in typed.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # what strict checkers take for an export
            seen[alias.name] = node.module
    assert seen == srlm_fast._HOME_OF


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'srlm_fast' has no attribute 'Sampel'"):
        srlm_fast.Sampel  # noqa: B018
    from srlm_fast import loop  # a module that nobody has imported is no public name

    assert callable(loop.main)


def test_the_table_of_stability_has_every_name_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", TABLE, re.MULTILINE)
    assert sorted(name for name, _ in rows) == srlm_fast.__all__
    assert {level for _, level in rows} == {"stable", "provisional"}
    promised = TABLE.partition("## srlm_kernels")[2].partition(" are stable")[0]
    assert set(re.findall(r"`(\w+)`", promised)) == STABLE_OPS
    assert set(srlm_kernels.__all__) >= STABLE_OPS


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_use_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("srlm_"):
            names = {alias.name for alias in node.names}
            if node.module == "srlm_fast":
                assert names <= set(srlm_fast.__all__)
            elif node.module == "srlm_kernels":
                assert names <= set(srlm_kernels.__all__)
            else:
                assert node.module.startswith("srlm_fast.integrations.")
