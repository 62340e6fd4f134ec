"""The package runs from a bare clone, from an install and from a wheel, beside HF's `kernels`."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from srlm_fast.installed import OPTIONAL

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
IMPORT_BOTH = "import srlm_fast, srlm_kernels; print(srlm_fast.__file__, srlm_kernels.__file__)"


def python(code: str, cwd: Path, *flags: str, path: Path | None = None) -> str:
    """What a fresh interpreter prints, with `path` as the only PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def installed() -> bool:
    try:
        return importlib.metadata.distribution("srlm_fast") is not None
    except importlib.metadata.PackageNotFoundError:
        return False


def bare_clone(folder: Path) -> Path:
    """A copy of what git tracks of the package, at a place that no install points to."""
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in ("srlm_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(source: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of setuptools or pip in a clone; `env` is added to the environment."""
    return subprocess.run(
        [sys.executable, *command], cwd=source, env=os.environ | env, capture_output=True, text=True
    )


def test_a_bare_clone_imports_both_packages(tmp_path: Path) -> None:
    clone = bare_clone(tmp_path)
    # -S hides site-packages, and with it any install of this package; neither import needs more.
    code = "import srlm_fast, importlib.util as u; print(u.find_spec('srlm_kernels').origin)"
    assert python(code, clone, "-S") == str(clone / "kernels" / "srlm_kernels" / "__init__.py")


@pytest.mark.skipif(not installed(), reason="the package is not installed in this interpreter")
def test_the_install_works_from_any_folder(tmp_path: Path) -> None:
    first, second = python(IMPORT_BOTH, tmp_path).split()
    assert first == str(ROOT / "srlm_fast" / "__init__.py")
    assert second == str(ROOT / "kernels" / "srlm_kernels" / "__init__.py")


def test_the_wheel_holds_every_file_and_runs(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools 77")
    source = bare_clone(tmp_path / "source")
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet")
    built = build(source, *command, "--wheel-dir", str(tmp_path), ".", SRLM_BUILD_EXT="0")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if ".dist-info/" not in n}
        archive.extractall(tmp_path / "site")
    expected = {
        p.relative_to(top).as_posix()
        for top, package in ((ROOT, "srlm_fast"), (ROOT / "kernels", "srlm_kernels"))
        for p in (top / package).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".so"
    }
    assert packed == expected
    first, second = python(IMPORT_BOTH, tmp_path, path=tmp_path / "site").split()
    assert first == str(tmp_path / "site" / "srlm_fast" / "__init__.py")
    assert second == str(tmp_path / "site" / "srlm_kernels" / "__init__.py")


@pytest.fixture
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """An environment that lacks what the C++ ops are built with."""
    if request.param == "compiler":
        return {"CXX": str(tmp_path / "no-such-compiler")}
    (tmp_path / "torch.py").write_text("raise ImportError('no torch for this build')")
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("broken", ["compiler", "torch"], indirect=True)
def test_what_cannot_be_built_is_left_out_with_a_warning(
    broken: dict[str, str], tmp_path: Path
) -> None:
    source = bare_clone(tmp_path / "source")
    arguments = ("setup.py", "bdist_wheel", "--dist-dir", str(tmp_path))
    built = build(source, *arguments, SRLM_BUILD_EXT="auto", **broken)
    assert built.returncode == 0, built.stderr
    warnings = [s for s in built.stderr.splitlines() if s.startswith("warning: C++ ops not built")]
    assert len(warnings) == 1
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "srlm_kernels/native.py" in names
    assert not [n for n in names if n.endswith(".so")]


@pytest.mark.parametrize("broken", ["compiler", "torch"], indirect=True)
def test_a_build_that_was_asked_for_fails_aloud(broken: dict[str, str], tmp_path: Path) -> None:
    source = bare_clone(tmp_path / "source")
    built = build(source, "setup.py", "build_ext", "--inplace", SRLM_BUILD_EXT="1", **broken)
    assert built.returncode != 0
    assert "no-such-compiler" in built.stderr or "no torch for this build" in built.stderr


def test_an_unknown_switch_is_an_error(tmp_path: Path) -> None:
    built = build(bare_clone(tmp_path), "setup.py", "--version", SRLM_BUILD_EXT="yes")
    assert built.returncode != 0
    assert built.stderr.strip() == "SRLM_BUILD_EXT must be auto, 0 or 1, got 'yes'"


def test_the_source_distribution_holds_the_sources_of_the_ops(tmp_path: Path) -> None:
    source = bare_clone(tmp_path / "source")
    built = build(source, "setup.py", "sdist", "--dist-dir", str(tmp_path), SRLM_BUILD_EXT="0")
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    assert sources | {"setup.py"} <= names


def test_our_folder_never_shadows_the_package_named_kernels(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("CUDAProperties = 'the real one'\n")
    # transformers reads `kernels` in this module, and dies there when ours takes the name.
    code = "import transformers.integrations.hub_kernels, kernels; print(kernels.CUDAProperties)"
    assert python(code, ROOT, path=tmp_path) == "the real one"


def test_env_probes_every_optional_package() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(OPTIONAL) == extras.keys() - {"docs", "test", "bench"}
    assert {name: [distribution] for name, (distribution, _) in OPTIONAL.items()} == {
        name: [re.split(r"[~<>=]", requirement)[0] for requirement in extras[name]]
        for name in OPTIONAL
    }


def test_constraints_pin_what_the_tests_use() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"], "setuptools"]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in needed}
    assert names - pinned == {"triton"}, "triton follows torch: see constraints.txt"
