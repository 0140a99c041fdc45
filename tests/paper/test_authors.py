"""The authors' files: imported, exported tensor by tensor, and refused when one is not accounted for."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.authors_models import AuthorsSwin, AuthorsViT

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
    read_names,
)
from rlrr_kernels.train.task import load_task


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


def test_their_names_are_those_of_their_models():
    vit = AuthorsViT(depth=3).trained
    assert len(vit) == 72
    for name in (
        "transformer.embeddings.ssf_scale_patch",
        "transformer.embeddings.ssf_shift_patch",
        "transformer.encoder.ssf_scale_enc_norm",
        "transformer.encoder.ssf_shift_enc_norm",
        "transformer.encoder.layer.2.ssf_scale_attn_norm",
        "transformer.encoder.layer.2.ssf_shift_ffn_norm",
        "transformer.encoder.layer.2.attn.value.scale_line",
        "head.bias",
    ):
        assert name in vit
    swin = AuthorsSwin(depths=(1, 1)).trained
    for name in (
        "layers.0.blocks.0.ssf_scale_norm1",
        "layers.1.blocks.0.ssf_shift_norm2",
        "layers.0.downsample.reduction.scale_col",
        "layers.1.blocks.0.attn.qkv.shift_bias",
        "ssf_scale_encode_norm",
        "ssf_shift_encode_norm",
        "head.weight",
    ):
        assert name in swin
    for oracle, name, sizes in (
        (AuthorsViT(depth=3), "vit_tiny_patch16_224", {"depth": 3, "embed_dim": 48, "img_size": 32}),
        (
            AuthorsSwin(),
            "swin_tiny_patch4_window7_224",
            {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "img_size": 112},
        ),
    ):
        model = timm.create_model(name, num_classes=5, **sizes)
        adapt_model(model, RLRRConfig(recipe="paper"))
        exported = authors_tensors({name: p for name, p in model.named_parameters() if p.requires_grad})
        assert {name: tensor.shape for name, tensor in exported.items()} == {
            name: tensor.shape for name, tensor in oracle.trained.items()
        }


def test_command_line_imports_and_exports_tensor_by_tensor(theirs, tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("ant\nbee\ncat\ndog\n")
    run("import-adapter", theirs["file"], "--model", MODEL, "--weights", theirs["weights"], "--dataset", "kitti",
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


def test_a_swin_comes_and_goes(tmp_path):
    oracle = AuthorsSwin(depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), size=96, image=224, classes=200, seed=3)
    torch.save({name: tensor.detach() for name, tensor in oracle.trained.items()}, tmp_path / "cub.pth")
    torch.save({"model": oracle.microsoft_state()}, tmp_path / "swin.pth")
    name, weights = "swin_tiny_patch4_window7_224", tmp_path / "swin.pth"
    printed = run("import-adapter", tmp_path / "cub.pth", "--model", name, "--weights", weights,
        "--dataset", "CUB_200_2011", "--out", tmp_path / "adapter")  # fmt: skip
    assert 'labels: the class ids of the JSON files, sorted; as strings ("10" before "2")' in printed
    model, task = load_task(tmp_path / "adapter", weights)
    transform = task.preprocessing
    assert (transform.resize, transform.interpolation, transform.crop) == ("squash", "bilinear", 224 / 256)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        exact = oracle.to(torch.float64)(images.double())
        torch.testing.assert_close(model.to(torch.float64).eval()(images.double()), exact, rtol=1e-10, atol=1e-10)
    export_adapter(tmp_path / "adapter", tmp_path / "back.pth")
    assert same_files(tmp_path / "cub.pth", tmp_path / "back.pth")


def test_other_names_and_shapes_come_with_a_mapping_and_go_back(theirs, tmp_path):
    tensors = {}
    for name, tensor in theirs["tensors"].items():
        name = name.replace("encoder.ssf_scale_enc_norm", "encoder.encoder_norm.ssf_scale")
        if name.endswith("ssf_scale_ffn_norm"):
            name, tensor = name.replace("ssf_scale_ffn_norm", "ffn_norm_ssf.scale"), tensor[None, None]
        tensors[name] = tensor
    torch.save(tensors, tmp_path / "other.pth")
    options = {"model": MODEL, "weights": "none"}
    with pytest.raises(ValueError, match=r"other\.pth: the authors' adapter does not fit") as error:
        import_adapter(tmp_path / "other.pth", tmp_path / "adapter", **options)
    for name in ("encoder_norm.ssf_scale [192]", "ssf_scale_enc_norm [192]", "layer.7.ssf_scale_ffn_norm [192]"):
        assert name in str(error.value)
    assert not (tmp_path / "adapter").exists()
    names = {
        "transformer.encoder.encoder_norm.ssf_scale": "transformer.encoder.ssf_scale_enc_norm",
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
        "values": good
        | {
            "head.bias": good["head.bias"] * torch.nan,
            "head.weight": good["head.weight"].to_sparse(),
            f"{layer}.ssf_scale_attn_norm": torch.empty(192, device="meta"),
            f"{layer}.ssf_shift_attn_norm": torch.nested.nested_tensor(
                [torch.ones(3), torch.ones(4)], layout=torch.jagged
            ),
            f"{layer}.ssf_scale_ffn_norm": [1.0] * 192,
            f"{layer}.ssf_shift_ffn_norm": torch.ones(192).to_mkldnn(),
        },
    }
    expected = {
        "missing": [f"missing in the adapter: {gone[0]} [1, 192]", f"missing in the adapter: {gone[1]} [192]"],
        "strange": ["not in the model: ema.decay []", f"not in the model: {layer}.attn.query.weight [192, 192]"],
        "shapes": [
            f"shape of {layer}.ffn.fc1.scale_line: the adapter has [192, 1], the model needs [768, 1]",
            "shape of head.weight: the adapter has [192, 4], the model needs [4, 192]",
        ],
        "dtype": ["head.bias: dtype torch.float64, not torch.float32"],
        "values": [
            "head.bias: not all of its values are finite",
            "head.weight: a sparse_coo tensor, not a dense one",
            "ssf_scale_attn_norm: on the meta device, which holds no values",
            "ssf_shift_attn_norm: a nested tensor, not a dense one",
            "ssf_scale_ffn_norm: a list, not a tensor",
            "ssf_shift_ffn_norm: a _mkldnn tensor, not a dense one",
        ],
    }
    for case, tensors in cases.items():
        model = timm.create_model(MODEL, num_classes=4)
        before = [type(module) for module in model.modules()]
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError) as error:
            load_authors_tensors(model, tensors)
        for text in expected[case]:
            assert text in str(error.value), case
        assert [type(module) for module in model.modules()] == before
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    with torch.device("meta"):
        model = timm.create_model(MODEL, num_classes=4)
    with pytest.raises(ValueError, match="model is on the meta device"):
        load_authors_tensors(model, good)
    for name in ("swinv2_tiny_window8_256", "beit_base_patch16_224"):  # their tensors have the same names
        with torch.device("meta"), pytest.raises(ValueError, match=r"of a ViT or a Swin, .*; got (SwinT.*V2|Beit)"):
            load_authors_tensors(timm.create_model(name, num_classes=4), good)


def test_damaged_files_and_folders_are_told(theirs, tmp_path):
    def mutant(data: bytes):
        (tmp_path / "mutant.pth").write_bytes(data)
        return tmp_path / "mutant.pth"

    data = theirs["file"].read_bytes()
    numbers = random.Random(0)
    for cut in (0, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"mutant\.pth is truncated or was not written by torch\.save: ."):
            read_authors_file(mutant(data[:cut]))
    start = data.index(b"\x80\x02}")  # of the pickle that names the tensors
    for _ in range(40):
        flipped = bytearray(data)
        flipped[start + numbers.randrange(2000)] ^= 1 << numbers.randrange(8)
        with contextlib.suppress(ValueError):  # no other error
            read_authors_file(mutant(flipped))
    torch.save({"head.weight": Path("code")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth is damaged, or holds more than tensors by name: it is not loaded"):
        read_authors_file(tmp_path / "code.pth")

    (tmp_path / "names.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"names\.json is truncated or no JSON"):
        read_names(tmp_path / "names.json")

    model = timm.create_model(MODEL, num_classes=4, depth=1)
    adapt_model(model, RLRRConfig(recipe="paper"))
    for bad, message in (
        (["names"], "authors_file must hold names and shapes"),
        ({"names": {}, "shapes": {"head.bias": ["2", 2]}}, "shapes that are sizes"),
        ({"names": {"head.bias": 3}, "shapes": {}}, "names that are words"),
        (
            {"names": {}, "shapes": {"head.bias": [5]}},
            r"head\.bias \[4\] cannot be written as 'head\.bias': \[5\] is another size",
        ),
        (
            {"names": {"head.bias": "head.weight"}, "shapes": {}},
            r"head\.weight \[4, 192\] cannot be written as 'head\.weight': that is there already",
        ),
    ):
        folder = save_adapter(model, tmp_path / "adapter", metadata={"authors_file": bad})
        with pytest.raises(ValueError, match=message) as error:
            export_adapter(folder, tmp_path / "out.pth")
        assert str(folder) in str(error.value)
        assert not (tmp_path / "out.pth").exists()


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
    torch.save(theirs["tensors"] | {"head.weight": torch.ones(())}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth has no head\.weight \[C, D\]"):
        import_adapter(tmp_path / "odd.pth", tmp_path / "adapter", model=MODEL, weights="none")
    with pytest.raises(
        ValueError, match=r"dataset must be the one of .*cifar\.pth, whose head has 4 outputs; CUB.* 200"
    ):
        import_adapter(theirs["file"], tmp_path / "adapter", model=MODEL, weights="none", dataset="CUB_200_2011")
    with pytest.raises(ValueError, match="classes must be 4 names"):
        import_adapter(theirs["file"], tmp_path / "adapter", model=MODEL, weights="none", classes=["one"])
    with pytest.raises(ValueError, match="the authors' files have no tensor for stages"):
        authors_tensors({"stages.0.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"no tensor for norm\.weight"):  # trained beside an adapter
        authors_tensors({"norm.weight": torch.ones(2)})
    model = timm.create_model(MODEL, num_classes=4, depth=1)
    adapt_model(model, RLRRConfig(recipe="paper", rank=2, groups=1))
    folder = save_adapter(model, tmp_path / "rank2")
    with pytest.raises(ValueError, match=r"RLRRConfig\(recipe='paper'\) alone; rank is 2, groups is 1"):
        export_adapter(folder, tmp_path / "rank2.pth")
