"""The README and the pages it leads to: their Python runs, their commands and links exist."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import shlex
from urllib.parse import urlsplit

import pytest

from tests.support.paths import ROOT

PAGES = {
    page.relative_to(ROOT).as_posix(): page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page.parent.name != "api"  # which the site alone can show
}
TEXTS = {name: page.read_text(encoding="utf-8") for name, page in PAGES.items()}


def blocks(language: str) -> list:
    """Every fenced block of ``language``, as test parameters (page, text)."""
    return [
        pytest.param(name, block, id=f"{name}-{index}")
        for name, text in TEXTS.items()
        for index, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    ]


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_run(page, code, tmp_path, monkeypatch):
    if "timm" in code:
        pytest.importorskip("timm", reason="needs timm and safetensors, of the extra [models]")
    if "rlrr_kernels.peft" in code:
        pytest.importorskip("peft", reason="needs peft, of the extra [peft]")
    if "gpu=" in code:
        pytest.importorskip("triton", reason="what a GPU would do is asked of Triton's kernels")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


def _program_options(words: list[str]) -> tuple[str, set[str]]:
    """The command of ``rlrr`` that ``words`` name, and its options."""
    typer = pytest.importorskip("typer", reason="the program needs the extra [train]")
    from rlrr_kernels.cli import app

    command, name = typer.main.get_command(app), "rlrr"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = f"{name} {words[0]}"
        assert words[0] in command.commands, f"there is no {name}"
        command, words = command.commands[words[0]], words[1:]
    return name, {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def _check_program(words: list[str]) -> None:
    name, known = _program_options(words[1:])
    unknown = {word.split("=")[0] for word in words if word.startswith("--")} - known - {"--help"}
    assert not unknown, f"{name} has no {', '.join(sorted(unknown))}"


@pytest.mark.parametrize(("page", "text"), blocks("sh"))
def test_commands_exist(page, text):
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if "rlrr_kernels.cli" in words:  # under torchrun or accelerate
            words = ["rlrr", *words[words.index("rlrr_kernels.cli") + 1 :]]
        if words[0] == "rlrr":
            _check_program(words)
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), line
        else:
            assert words[0] in ("pip", "python"), f"a command that nothing checks: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_what_the_prose_names_exists(page):
    prose = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", prose):
        code = " ".join(code.split())
        if code.startswith("rlrr "):
            _check_program(code.split())
        elif re.fullmatch(r"[\w*/.]+\.(py|cpp|h|inl|sh)", code):
            folders = [ROOT / name for name in ("rlrr_kernels", "benchmarks", "csrc")]
            found = next(ROOT.glob(code), None) or any(next(folder.rglob(code), None) for folder in folders)
            assert found, f"{code} is nowhere"
        elif name := re.match(r"rlrr_kernels(\.\w+)+", code):
            pkgutil.resolve_name(name[0])  # raises where there is no such module or attribute
        elif code.startswith("python -m "):
            assert importlib.util.find_spec(code.split()[2]), code


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        url = urlsplit(target)
        if url.scheme:
            continue
        file = PAGES[page].parent / url.path if url.path else PAGES[page]
        assert file.exists(), target
        if url.fragment:
            assert url.fragment in _anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_no_merge_was_left_half_done(page):
    assert not re.search(r"^(<{7}|>{7}) ", TEXTS[page], re.MULTILINE)


def test_readme_links_every_page():
    assert not [name for name in PAGES if name != "README.md" and f"]({name})" not in TEXTS["README.md"]]


@pytest.mark.parametrize("picture", ["layers", "serving"])
def test_drawn_pictures_are_what_their_scripts_draw(picture):
    """That of the layers shows what is enforced."""
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    script = ROOT / "docs" / "pictures" / f"{picture}.py"
    spec = importlib.util.spec_from_file_location(picture, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.draw() == script.with_suffix(".svg").read_text(encoding="utf-8"), f"python {script} draws it anew"
