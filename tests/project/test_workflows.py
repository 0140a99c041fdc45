"""Workflow files and commit hooks: they parse, and run what the Makefile and the lint target run."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.support.paths import ROOT

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which the extra [models] brings")

WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def load(name: str) -> dict:
    document = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    document["on"] = document.pop(True)  # YAML 1.1 reads the key on as a truth value
    return document


def commands(document: dict) -> list[list[str]]:
    steps = [step for job in document["jobs"].values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    return [shlex.split(step["run"]) for step in steps if "run" in step]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_a_workflow_runs_exists(name):
    document = load(name)
    assert document["permissions"] == {"contents": "read"}  # a job that needs more says so
    assert all(0 < job["timeout-minutes"] <= 120 for job in document["jobs"].values())
    for command in commands(document):
        if command[0] == "make":
            assert command[1] in TARGETS, command
        elif command[0].startswith("."):
            assert (ROOT / command[0]).stat().st_mode & 0o100, command
        else:
            assert command[0] in ("pipx", "ls"), f"a command that nothing checks: {command}"


def test_pushes_and_pull_requests_run_the_tests():
    document = load("ci")
    assert set(document["on"]) == {"push", "pull_request"}
    assert commands(document) == [[".ci/run"]]


def test_a_gpu_of_ours_runs_no_code_of_strangers():
    document = load("gpu")
    assert not {"pull_request", "pull_request_target"} & set(document["on"])
    (job,) = document["jobs"].values()
    assert "self-hosted" in job["runs-on"]
    assert [command[:2] for command in commands(document)] == [["make", "setup"], ["make", "gpu"]]
    assert job["steps"][-1]["uses"].startswith("actions/upload-artifact@")
    assert job["steps"][-1]["if"] == "always()"


def test_only_a_tag_is_published_and_by_what_was_built():
    document = load("wheels")
    assert document["on"]["push"] == {"tags": ["v*"]}
    publish = document["jobs"]["publish"]
    assert publish["needs"] == ["wheel", "sdist"]
    assert publish["if"] == "github.event_name == 'push'"
    assert publish["permissions"] == {"id-token": "write"}
    assert not any("password" in step.get("with", {}) for step in publish["steps"])
    jobs = [name for name, job in document["jobs"].items() if "id-token" in job.get("permissions", {})]
    assert jobs == ["publish"]


def test_hooks_are_part_of_lint():
    document = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in document["repos"]] == ["local"]  # no network
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for hook in document["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        command = hook["entry"].replace(".venv/", "$(VENV)/").split(" --")[0]
        assert f"\t{command}" in lint, command
