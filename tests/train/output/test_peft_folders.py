"""``rlrr combine``, ``to-peft`` and ``from-peft``."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("typer", reason="needs the extra [train]")
pytest.importorskip("peft", reason="needs the extra [peft]")

from peft import PeftModel
from safetensors.torch import save_file
from typer.testing import CliRunner

from rlrr_kernels import RLRRConfig, adapt_model, adapter_info, save_adapter
from rlrr_kernels.cli import app
from rlrr_kernels.train.models.backbones import create_model
from rlrr_kernels.train.task import Task, load_task
from tests.support.tiny_models import disturb

MODEL, CLASSES = "test_vit", ("ant", "bee")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file with the weights of a small ViT."""
    file = tmp_path_factory.mktemp("backbone") / "weights.safetensors"
    torch.manual_seed(0)
    model = create_model(MODEL, 2, weights="none")[0]
    model.reset_classifier(0)
    save_file(model.state_dict(), file)
    return file


@pytest.fixture
def adapter(backbone, tmp_path):
    model, transform = create_model(MODEL, 2, weights=backbone)
    adapt_model(model, RLRRConfig(recipe="paper"))
    disturb(model)
    metadata = {"task": Task(MODEL, backbone.name, CLASSES, transform).to_dict()}
    return save_adapter(model, tmp_path / "adapter", metadata=metadata)


def run(*arguments, error=None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if error is None:
        assert result.exit_code == 0, result.output or result.exception
        return result.output
    assert isinstance(result.exception, error)
    return str(result.exception)


def test_to_peft_from_peft_and_to_the_authors_file(adapter, backbone, tmp_path):
    images = torch.randn(2, 3, 160, 160)
    model = load_task(adapter, backbone)[0].eval()
    assert "import rlrr_kernels.peft" in run("to-peft", adapter, tmp_path / "peft", "--weights", backbone)
    in_peft = PeftModel.from_pretrained(create_model(MODEL, 2, weights=backbone)[0], tmp_path / "peft").eval()
    torch.testing.assert_close(in_peft(images), model(images))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    options = ("--model", MODEL, "--weights", backbone, "--out", tmp_path / "back")
    printed = run("from-peft", tmp_path / "peft", *options, "--classes", tmp_path / "classes.txt", "--recipe", "paper")
    assert "trained parameters" in printed
    back, task = load_task(tmp_path / "back", backbone)
    assert task.classes == CLASSES
    torch.testing.assert_close(back.eval()(images), model(images))
    run("export-adapter", tmp_path / "back", tmp_path / "authors.pth")
    theirs = torch.load(tmp_path / "authors.pth")
    torch.testing.assert_close(
        theirs["transformer.encoder.layer.0.attn.query.scale_line"],
        model.blocks[0].attn.qkv.scale_row[: model.embed_dim].detach(),
    )
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree")
    assert "classes must be 2 names" in run(
        "from-peft", tmp_path / "peft", *options, "--overwrite", "--classes", tmp_path / "classes.txt", error=ValueError
    )


def test_combine(adapter, backbone, tmp_path):
    images = torch.randn(2, 3, 160, 160)
    arguments = (tmp_path / "negative", adapter, "--weight", "-1")
    assert "head_of says whose is taken" in run("combine", *arguments, error=ValueError)
    (tmp_path / "negative").mkdir()  # an empty folder is filled
    assert "-1 * adapter, rank 1" in run("combine", *arguments, "--head-of", "0")
    printed = run("combine", tmp_path / "none", adapter, tmp_path / "negative", "--weight", "0.5", "--weight", "0.5")
    assert "0.5 * adapter + 0.5 * negative, rank 2" in printed
    assert adapter_info(tmp_path / "none").config.rank == 2
    model, task = load_task(tmp_path / "none", backbone)
    assert task.classes == CLASSES
    plain = create_model(MODEL, 2, weights=backbone)[0].eval()
    plain.head = model.head
    torch.testing.assert_close(model.eval()(images), plain(images))


def test_what_is_there_is_replaced_on_demand_alone(adapter, backbone, tmp_path):
    out, file = tmp_path / "out", tmp_path / "file.pth"
    combine = ("combine", out, adapter, "--weight", "1")
    run(*combine)
    before = (out / "adapter.safetensors").read_bytes()
    commands = (
        ("combine", out, adapter, "--weight", "-1", "--head-of", "0"),
        ("to-peft", adapter, out, "--weights", backbone),
        ("from-peft", tmp_path / "peft", "--model", MODEL, "--out", out),
        ("import-adapter", file, "--model", MODEL, "--out", out),
        ("merge", adapter, "--output", backbone),
        ("export-adapter", adapter, backbone),
    )
    for command in commands:
        assert "exists; replace it with --overwrite, or name another" in run(*command, error=FileExistsError)
    assert (out / "adapter.safetensors").read_bytes() == before
    run(*commands[0], "--overwrite")
    assert (out / "adapter.safetensors").read_bytes() != before
    file.touch()
    (tmp_path / "merged.safetensors").mkdir()
    for command, kind in ((("combine", file, *combine[2:]), "a file, no folder"), (("merge", adapter), "a folder")):
        assert f"exists and is {kind}" in run(*command, "--overwrite", error=FileExistsError)


def test_what_is_read_is_never_replaced(adapter, backbone, tmp_path):
    (tmp_path / "link").symlink_to(adapter)
    for command in (
        ("combine", tmp_path / "link", adapter, "--weight", "1"),
        ("to-peft", adapter, adapter),
        ("from-peft", adapter, "--model", MODEL, "--out", adapter),
        ("merge", adapter, "--weights", backbone, "--output", backbone),
    ):
        assert "is what is read; write to another" in run(*command, "--overwrite", error=ValueError)


def test_a_peft_folder_without_a_head_does_not_say_how_many_classes(tmp_path):
    from peft import get_peft_model

    from rlrr_kernels.peft import RLRRPeftConfig

    get_peft_model(create_model(MODEL, 2, weights="none")[0], RLRRPeftConfig()).save_pretrained(tmp_path / "peft")
    message = run("from-peft", tmp_path / "peft", "--model", MODEL, "--out", tmp_path / "back", error=ValueError)
    assert "no head among its modules_to_save" in message
    assert not (tmp_path / "back").exists()
