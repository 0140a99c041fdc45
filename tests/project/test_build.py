"""What setup.py promises: the wheel and the source archive are complete, and a failed build says so."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.support.paths import ROOT

SOURCES = ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from the source tree"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


@pytest.fixture
def source(tmp_path):
    """A copy of what a build reads, without what earlier builds left."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "rlrr_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def build(source, kind, **environment):
    """The hook ``build_<kind>`` of the project's backend, as an installer runs it; returns the process."""
    code = f"import build_backend as b; b.build_{kind}('dist')"
    environment = {name: value for name, value in os.environ.items() if name != "RLRR_BUILD_CPP"} | environment
    environment["PYTHONPATH"] = str(source)
    (source / "dist").mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)


def wheel_names(source):
    (path,) = (source / "dist").glob("*.whl")
    return path.name, zipfile.ZipFile(path).namelist()


def test_wheel_contains_the_extension(source):
    run = build(source, "wheel", RLRR_BUILD_CPP="1")
    assert run.returncode == 0, run.stderr
    name, members = wheel_names(source)
    assert "-cp310-abi3-" in name
    assert any(member.startswith("rlrr_kernels/_cpp.abi3.") for member in members)


def test_extension_can_be_left_out(source):
    run = build(source, "wheel", RLRR_BUILD_CPP="0")
    assert run.returncode == 0, run.stderr
    name, members = wheel_names(source)
    assert name.endswith("-py3-none-any.whl")
    assert "rlrr_kernels/py.typed" in members  # else type checkers take nothing from an installed package
    assert not any("_cpp" in member for member in members if member.startswith("rlrr_kernels/_"))


def test_failed_build_leaves_a_package_and_a_reason(source):
    run = build(source, "wheel", CXX="false", CC="false")
    assert run.returncode == 0, run.stderr
    assert "installing without the C++ extension" in run.stderr
    assert not any(".so" in member for member in wheel_names(source)[1])


def test_failed_build_is_fatal_when_demanded(source):
    run = build(source, "wheel", CXX="false", CC="false", RLRR_BUILD_CPP="1")
    assert run.returncode != 0
    assert not list((source / "dist").glob("*.whl"))


def test_source_archive_contains_the_sources(source):
    run = build(source, "sdist")
    assert run.returncode == 0, run.stderr
    (path,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.split("/", 1)[1] for member in archive.getnames() if "/" in member}
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.[chi]*")}
    assert expected | {"build_backend.py"} <= members


def test_isolated_builds_ask_for_torch(source):
    code = "import build_backend as b; print(b.get_requires_for_build_wheel())"
    for wanted, present in (("1", True), ("0", False)):
        environment = os.environ | {"RLRR_BUILD_CPP": wanted}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, check=True
        )
        assert ("torch" in run.stdout.splitlines()[-1]) == present


def test_an_old_setuptools_is_named(source):
    code = "import setuptools; setuptools.__version__ = '65.5.0'; import build_backend"
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert run.stderr.strip().endswith(
        "RuntimeError: building rlrr-kernels needs setuptools >= 77, and 65.5.0 is installed: update it, or leave out "
        "--no-build-isolation"
    )
