"""The documentation is a site without a warning, and every public name is in it."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import srlm_fast
import srlm_kernels

ROOT = Path(__file__).resolve().parent.parent


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    listed = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert len(listed) == len(set(listed))
    ours = {f"srlm_fast.{name}" for name in srlm_fast.__all__}
    assert ours == {n for n in listed if n.startswith("srlm_fast.") and n.count(".") == 1}
    ops = {name.rpartition(".")[2] for name in listed if name.startswith("srlm_kernels.")}
    assert ops == set(srlm_kernels.__all__)
    exported = ast.parse((ROOT / "srlm_fast/integrations/trl/__init__.py").read_text("utf-8"))
    names = {a.asname for node in exported.body if isinstance(node, ast.ImportFrom)
             for a in node.names} - {None}  # fmt: skip
    trl = "srlm_fast.integrations.trl."
    assert {f"{trl}{name}" for name in names} == {n for n in listed if n.startswith(trl)}


def test_every_name_of_the_reference_is_there_and_explained() -> None:
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    for name in re.findall(r"^::: (srlm_fast\.integrations\.\S+)$", page, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        path = ROOT.joinpath(*module.split("."))
        files = [*path.glob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
        trees = [ast.parse(file.read_text("utf-8")) for file in files]
        found = [n for t in trees for n in t.body if getattr(n, "name", None) == attribute]
        assert len(found) == 1 and ast.get_docstring(found[0]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["README.md", "mkdocs.yml", "docs/index.md"])
def test_every_page_is_found(source: str) -> None:
    text = (ROOT / source).read_text("utf-8")
    part = {"README.md": "## More", "mkdocs.yml": "nav:"}.get(source, "# srlm_fast")
    listed = set(re.findall(r"(\w+\.md)", text.partition(part)[2]))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    unlisted = {"reference.md"} if source == "README.md" else set()  # api.md leads there
    assert pages - unlisted <= listed


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "docs"])
def test_links_between_pages_lead_somewhere(path: str) -> None:
    for page in [*(ROOT / path).glob("*.md")] or [ROOT / path]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), (page.name, link)


@pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("mkdocstrings")),
    reason="mkdocs and mkdocstrings are not installed (extra [docs])",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "reference" / "index.html").read_text("utf-8")
    for name in srlm_fast.__all__:
        assert f'id="srlm_fast.{name}"' in page
    assert "logits = softcap(logit_scale" in page  # docstrings, not only names
