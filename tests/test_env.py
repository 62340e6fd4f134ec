"""`python -m srlm_fast.env`: what it reports, and that asking costs nothing optional."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srlm_fast import env, installed
from srlm_fast.sandbox.model import new_model
from srlm_fast.sandbox.tokenizer import make_tokenizer
from srlm_kernels import native

ROOT = Path(__file__).resolve().parent.parent


def test_versions_are_those_of_the_running_packages() -> None:
    found = installed.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__
    assert all(found.values())


def test_a_required_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "REQUIRED", ("no-such-package",))
    assert installed.versions()["no-such-package"] == "not installed"


def test_collect_is_json_and_covers_every_extra_and_op() -> None:
    found = env.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["optional"].keys() == installed.OPTIONAL.keys()
    assert found["ops"].keys() == {*installed.OPS, installed.SAMPLER_OPS}
    names = {"chunked", "cpp", "pieces", "flex", "reference"}
    assert all(found["ops"][op].split()[0] in names for op in installed.OPS)
    assert found["ops"][installed.SAMPLER_OPS] in ("triton", "cpp", "torch")
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
    line = installed.probe("liger", "broken-extra", "broken_extra")
    assert expected in line and "\n" not in line
    assert ("does not load" in line) == bool(body)


def test_probe_names_the_extra_to_install() -> None:
    line = installed.probe("liger", "no-such-package", "no_such_package")
    assert line == "not installed: pip install 'srlm_fast[liger]'"


def test_importing_it_loads_nothing_optional() -> None:
    command = [sys.executable, "-c", "import sys, srlm_fast.env; print(*sys.modules)"]
    loaded = set(subprocess.check_output(command, cwd=ROOT, text=True).split())
    optional = {module.partition(".")[0] for _, module in installed.OPTIONAL.values()}
    assert "torch" in loaded
    assert not loaded & (optional | {"transformers"})


def test_main_prints_one_line_per_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = env.collect()
    assert len(lines) == len(facts) + sum(len(rows) for rows in facts.values())
    assert any(torch.__version__ in line for line in lines)


def test_memory_of_a_model_whose_weights_need_not_be_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = new_model(make_tokenizer(), seed=0)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    recipe = ["--recipe", "sandbox-spa", "--memory", "24"]
    assert env.main(["--model", str(tmp_path), *recipe]) == 0
    said = capsys.readouterr().out
    assert "0.8M parameters in float32" in said and "scoring: at most" in said
    assert "24.00 GB are free" in said and "too much" not in said
    assert env.main(["--model", str(tmp_path), *recipe[:-1], "0.001"]) == 0
    assert "too much: sampling takes 0.0 GB at the least" in capsys.readouterr().out
    assert env.main(["--model", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
