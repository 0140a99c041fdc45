"""The authors' files: imported, exported bit by bit, and refused when a tensor is not accounted for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.support.authors_models import AuthorsViT

timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")
pytest.importorskip("typer", reason="needs typer, of the extra [train]")

from typer.testing import CliRunner

from rlrr_kernels import RLRRConfig, adapt_model, adapter_info, save_adapter
from rlrr_kernels.cli import app
from rlrr_kernels.paper.authors import (
    authors_tensors,
    export_adapter,
    import_adapter,
    load_authors_tensors,
    read_authors_file,
)
from rlrr_kernels.train.models.task import load_task


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict:
    """A file as the authors' code saves it, the backbone it belongs to, and the oracle of both."""
    folder = tmp_path_factory.mktemp("authors")
    oracle = AuthorsViT(depth=12, size=192, heads=3, image=224, classes=4, seed=5)
    tensors = {name: tensor.detach() for name, tensor in oracle.trained.items()}
    torch.save(tensors, folder / "cifar.pth")
    save_file(oracle.timm_state(), folder / "backbone.safetensors")
    files = {"file": folder / "cifar.pth", "weights": folder / "backbone.safetensors"}
    return {"oracle": oracle, "tensors": tensors, **files}


def same_files(first, second) -> bool:
    first, second = read_authors_file(first), read_authors_file(second)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


MODEL = "vit_tiny_patch16_224"


def run(*arguments) -> str:
    """What ``rlrr ARGUMENTS`` prints, on one line."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_command_line_imports_and_exports_bit_by_bit(theirs, tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("ant\nbee\ncat\ndog\n")
    run("import-adapter", theirs["file"], "--model", MODEL, "--weights", theirs["weights"], "--dataset", "cifar",
        "--classes", classes, "--out", tmp_path / "adapter")  # fmt: skip
    task = adapter_info(tmp_path / "adapter").metadata["task"]
    assert task["classes"] == ["ant", "bee", "cat", "dog"]
    assert task["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert f"{len(theirs['tensors'])} tensors" in run("export-adapter", tmp_path / "adapter", tmp_path / "back.pth")
    assert same_files(theirs["file"], tmp_path / "back.pth")
    again = CliRunner().invoke(app, ["export-adapter", str(tmp_path / "adapter"), str(tmp_path / "back.pth")])
    assert isinstance(again.exception, FileExistsError)

    model, _ = load_task(tmp_path / "adapter", theirs["weights"])
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        exact = theirs["oracle"].to(torch.float64)(images.double())
        torch.testing.assert_close(model.eval()(images).double(), exact, rtol=1e-4, atol=1e-5)


def test_other_names_and_shapes_come_with_a_mapping_and_go_back(theirs, tmp_path):
    tensors = {}
    for name, tensor in theirs["tensors"].items():
        name = name.replace("encoder.ssf_scale_encoder_norm", "encoder.encoder_norm.ssf_scale")
        if name.endswith("ssf_scale_ffn_norm"):
            name, tensor = name.replace("ssf_scale_ffn_norm", "ffn_norm_ssf.scale"), tensor[None, None]
        tensors[name] = tensor
    torch.save(tensors, tmp_path / "other.pth")
    options = {"model": MODEL, "weights": "none"}
    with pytest.raises(ValueError, match="the authors' adapter does not fit") as error:
        import_adapter(tmp_path / "other.pth", tmp_path / "adapter", **options)
    for name in ("encoder_norm.ssf_scale [192]", "ssf_scale_encoder_norm [192]", "layer.7.ssf_scale_ffn_norm [192]"):
        assert name in str(error.value)
    assert not (tmp_path / "adapter").exists()
    names = {
        "transformer.encoder.encoder_norm.ssf_scale": "transformer.encoder.ssf_scale_encoder_norm",
        "transformer.encoder.layer.*.ffn_norm_ssf.scale": "transformer.encoder.layer.*.ssf_scale_ffn_norm",
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    run("import-adapter", tmp_path / "other.pth", "--model", MODEL, "--weights", "none", "--out", tmp_path / "adapter",
        "--names", tmp_path / "names.json")  # fmt: skip
    export_adapter(tmp_path / "adapter", tmp_path / "back.pth")
    assert same_files(tmp_path / "other.pth", tmp_path / "back.pth")
    for bad, message in (
        ({"head.*.weight": "head.*.weight"}, r"names: 'head\.\*\.weight' matches no tensor of the file"),
        ({"head.weight": "head.*"}, r"differ in their number of \*"),
        ({"head.weight": "head.bias"}, r"the file has these already: head\.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            load_authors_tensors(timm.create_model(MODEL, num_classes=4), tensors, bad)


def test_an_adapter_trained_here_is_exported_and_comes_back(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2)
    adapt_model(model, RLRRConfig(recipe="paper"))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    folder = save_adapter(model.eval(), tmp_path / "adapter")
    names = export_adapter(folder, tmp_path / "ours.pth")
    assert "transformer.encoder.layer.1.attn.query.scale_col" in names
    shapes = {name: tuple(tensor.shape) for name, tensor in read_authors_file(tmp_path / "ours.pth").items()}
    for name, shape in (("query.scale_col", (1, 192)), ("value.scale_line", (192, 1)), ("out.shift_bias", (1, 192))):
        assert shapes[f"transformer.encoder.layer.0.attn.{name}"] == shape
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2)
    load_authors_tensors(fresh, read_authors_file(tmp_path / "ours.pth"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(fresh.get_parameter(name), parameter), name


def test_every_tensor_is_accounted_for_or_named(theirs):
    good = theirs["tensors"]
    layer = "transformer.encoder.layer.3"
    gone = (f"{layer}.attn.key.scale_col", f"{layer}.ssf_shift_ffn_norm")
    cases = {
        "missing": {name: tensor for name, tensor in good.items() if name not in gone},
        "strange": good | {"ema.decay": torch.ones(()), f"{layer}.attn.query.weight": torch.ones(192, 192)},
        "shapes": good | {f"{layer}.ffn.fc1.scale_line": torch.ones(192, 1), "head.weight": good["head.weight"].t()},
        "dtype": good | {"head.bias": good["head.bias"].double()},
    }
    expected = {
        "missing": [f"missing in the adapter: {gone[0]} [1, 192]", f"missing in the adapter: {gone[1]} [192]"],
        "strange": ["not in the model: ema.decay []", f"not in the model: {layer}.attn.query.weight [192, 192]"],
        "shapes": [
            f"shape of {layer}.ffn.fc1.scale_line: the adapter has [192, 1], the model needs [768, 1]",
            "shape of head.weight: the adapter has [192, 4], the model needs [4, 192]",
        ],
        "dtype": ["dtype of head.bias: torch.float64, not torch.float32"],
    }
    for case, tensors in cases.items():
        model = timm.create_model(MODEL, num_classes=4)
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError) as error:
            load_authors_tensors(model, tensors)
        for text in expected[case]:
            assert text in str(error.value), case
        assert [type(module) for module in model.modules()] == before


def test_what_is_no_such_file_or_adapter_is_said(theirs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        read_authors_file(tmp_path / "absent.pth")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(theirs["file"].read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"truncated\.pth is truncated or was not written by torch\.save"):
        read_authors_file(truncated)
    for content, message in (([1], "must hold a dict of tensors; got list"), ({"epoch": 3}, r"it has 'epoch' \(int\)")):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=message):
            read_authors_file(tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="classes must be 4 names"):
        import_adapter(theirs["file"], tmp_path / "adapter", model=MODEL, weights="none", classes=["one"])
    with pytest.raises(ValueError, match="the authors' files have no tensor for stages"):
        authors_tensors({"stages.0.weight": torch.ones(2)})
    model = timm.create_model(MODEL, num_classes=4, depth=1)
    adapt_model(model, RLRRConfig(recipe="paper", rank=2, groups=1))
    folder = save_adapter(model, tmp_path / "rank2")
    with pytest.raises(ValueError, match=r"RLRRConfig\(recipe='paper'\) alone; rank is 2, groups is 1"):
        export_adapter(folder, tmp_path / "rank2.pth")
