"""The documentation is a site without a warning, and every public name is in it."""

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
