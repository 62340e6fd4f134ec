"""`python -m srlm_fast.env`: what it reports, and that asking costs nothing optional."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srlm_fast import env
from srlm_kernels import native

ROOT = Path(__file__).resolve().parent.parent


def test_versions_are_those_of_the_running_packages() -> None:
    found = env.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__
    assert all(found.values())


def test_a_required_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "REQUIRED", ("no-such-package",))
    assert env.versions()["no-such-package"] == "not installed"


def test_collect_is_json_and_covers_every_extra_and_op() -> None:
    found = env.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["optional"].keys() == env.OPTIONAL.keys()
    assert found["ops"].keys() == {*env.OPS, env.SAMPLER_OPS}
    names = {"chunked", "pieces", "flex", "reference"}
    assert all(found["ops"][op].split()[0] in names for op in env.OPS)
    assert found["ops"][env.SAMPLER_OPS] in ("triton", "cpp", "torch")
    assert found["extensions"] == {"C++ kernels": native.why()}
    assert ("gpu 0" in found["device"]) == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", "unknown version"),
        ("raise OSError('libcudart.so.12: no such file\\ndetails')", "OSError: libcudart.so.12"),
        ("raise RuntimeError", "RuntimeError: no message"),
        ("import no_such_module", "ModuleNotFoundError"),
    ],
)
def test_probe_says_why_an_installed_package_cannot_be_used(
    body: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extra.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_extra", raising=False)
    line = env.probe("liger", "broken-extra", "broken_extra")
    assert expected in line and "\n" not in line
    assert ("does not load" in line) == bool(body)


def test_probe_names_the_extra_to_install() -> None:
    line = env.probe("liger", "no-such-package", "no_such_package")
    assert line == "not installed: pip install 'srlm_fast[liger]'"


def test_importing_it_loads_nothing_optional() -> None:
    command = [sys.executable, "-c", "import sys, srlm_fast.env; print(*sys.modules)"]
    loaded = set(subprocess.check_output(command, cwd=ROOT, text=True).split())
    optional = {module.partition(".")[0] for _, module in env.OPTIONAL.values()}
    assert "torch" in loaded
    assert not loaded & (optional | {"transformers"})


def test_main_prints_one_line_per_fact(capsys: pytest.CaptureFixture[str]) -> None:
    env.main()
    lines = capsys.readouterr().out.splitlines()
    facts = env.collect()
    assert len(lines) == len(facts) + sum(len(rows) for rows in facts.values())
    assert any(torch.__version__ in line for line in lines)
