"""The methods RLRR is compared with: what each trains, that gradients arrive, that saving and merging keep logits."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.support.image_folders import make_splits
from tests.support.tiny_models import backward, disturb, tiny_images, tiny_model

timm = pytest.importorskip("timm", reason="the methods need timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")
pytest.importorskip("peft", reason="LoRA, DoRA and HiRA need peft")

from safetensors.torch import load_file
from timm.layers import Conv2dSame, StdConv2d

from rlrr_kernels.cli import main
from rlrr_kernels.nn.output_rescale import OutputRescale
from rlrr_kernels.train.data.folders import ImageDataset, find_splits
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.export import example_images, logits, merge_to_file
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.loop.fit import TrainConfig, fit
from rlrr_kernels.train.methods import baselines as methods
from rlrr_kernels.train.methods.baselines import METHODS, Baseline, apply_method, merge_baseline, optimizer_groups
from rlrr_kernels.train.methods.files import folder_info, load_trained, save_trained
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.task import load_task

BASELINES = METHODS[1:]


def expected_adapter_parameters(model: nn.Module, method: str) -> int:
    """Counted by hand for a ViT of depth 2, width D, before the method is applied."""
    width, blocks = model.embed_dim, len(model.blocks)
    linears = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))  # [in, out] of a block
    biases = blocks * sum(out for _, out in linears) + width * (1 + 2 * blocks + 1)  # patches, norms, last norm
    low_rank = blocks * sum(sum(shape) for shape in linears)
    return {
        "probe": 0,
        "full": sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.head.parameters()),
        "bias": biases,
        "ssf": 2 * biases,  # the same places: every linear layer, the patch projection, every norm
        "lora": 8 * low_rank,
        "dora": 8 * low_rank + blocks * sum(out for _, out in linears),
        "hira": 32 * low_rank,
    }[method]


@pytest.mark.parametrize("method", BASELINES)
def test_trained_parameters_are_counted(method):
    model = tiny_model("vit")
    expected = expected_adapter_parameters(model, method)
    report = apply_method(model, Baseline(method))
    assert report.adapter == expected
    assert report.head == 48 * 5 + 5
    assert report.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert not model.head.weight.any()


@pytest.mark.parametrize("family", ["vit", "swin", "beit", "convnext"])
@pytest.mark.parametrize("method", BASELINES)
def test_everything_trained_gets_a_gradient_and_merging_keeps_the_logits(family, method):
    model, images = tiny_model(family), tiny_images(family)
    keys = set(model.state_dict())
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    apply_method(model, Baseline(method))
    disturb(model)
    backward(model, images)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(model.get_parameter(name).grad is not None for name in trained)
    before = logits(model.eval(), images)
    report = merge_baseline(model)
    torch.testing.assert_close(logits(model, images), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    assert set(model.state_dict()) - keys == set(report.gained)
    assert set(model.state_dict()) >= keys
    if method in ("probe", "bias"):
        assert torch.equal(model.get_parameter(weight := first_weight(model)), frozen[weight])
    with pytest.raises(ValueError, match="was not prepared by a baseline"):
        merge_baseline(model)


def first_weight(model: nn.Module) -> str:
    return next(name for name, p in model.named_parameters() if name.endswith("weight") and p.dim() > 1)


def test_ssf_scales_and_shifts_after_every_operation():
    """Against the formula: every linear layer, convolution and norm of a block followed by γ ⊙ · + β."""
    model, images = tiny_model("vit"), tiny_images("vit")
    plain = tiny_model("vit")
    apply_method(model, Baseline("ssf"))
    disturb(model)
    handles = []
    for name, module in plain.named_modules():
        ours = model.get_submodule(name)
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm) or name == "head":
            continue
        rescale = ours.rescale if isinstance(ours, OutputRescale) else ours
        shape = (-1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
        scale, shift = rescale.scale.view(shape), rescale.shift.view(shape)
        handles.append(module.register_forward_hook(lambda _, __, y, scale=scale, shift=shift: y * scale + shift))
    assert len(handles) == 2 * 6 + 2
    plain.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(logits(model, images), logits(plain, images), rtol=1e-5, atol=1e-5)


def test_ssf_refuses_convolutions_into_which_it_cannot_be_merged():
    """γ ⊙ W of a weight-standardised convolution is W again: the merged model lost the scales."""
    model = tiny_model("vit")
    model.patch_embed.proj = StdConv2d(3, model.embed_dim, 4, 4)
    before = {name: type(module) for name, module in model.named_modules()}
    message = r"cannot fold its scales into patch_embed\.proj: StdConv2d has a forward of its own"
    with pytest.raises(ValueError, match=message):
        apply_method(model, Baseline("ssf"))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    for layer in (model.patch_embed.proj, spectral_norm(nn.Linear(4, 4))):
        with pytest.raises(TypeError, match="layer must be one into which a scale can be folded"):
            OutputRescale(layer)


def test_ssf_folds_into_a_convolution_that_pads_by_itself():
    rescaled, x = OutputRescale(Conv2dSame(3, 4, 3, stride=2)), torch.randn(2, 3, 7, 7)
    disturb(rescaled)
    expected = rescaled(x)
    torch.testing.assert_close(rescaled.fold()(x), expected)


def test_lora_and_hira_start_at_the_backbone_and_dora_too():
    images = tiny_images("vit")
    for method in ("lora", "dora", "hira"):
        model = tiny_model("vit")
        features = model.forward_features(images)
        apply_method(model, Baseline(method, rank=2))
        torch.testing.assert_close(model.eval().forward_features(images), features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", BASELINES)
def test_saved_and_loaded_gives_equal_logits(method, tmp_path):
    model, images = tiny_model("vit"), tiny_images("vit")
    apply_method(model, Baseline(method, rank=3 if method in methods.RANKS else None))
    disturb(model)
    save_trained(model, tmp_path / "adapter", metadata={"note": 1})
    fresh = tiny_model("vit", seed=1 if method == "full" else 0)
    load_trained(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, images), logits(model, images))
    assert folder_info(tmp_path / "adapter").method == method
    held = load_file(tmp_path / "adapter" / "adapter.safetensors")
    if method != "full":
        assert sum(tensor.numel() for tensor in held.values()) == methods.baseline_report(model).trained
    assert (tmp_path / "adapter" / "README.md").read_text().startswith("# ")


def test_values_that_no_training_leaves_are_named(tmp_path):
    model = tiny_model("vit")
    apply_method(model, Baseline("bias"))
    with torch.no_grad():
        model.blocks[1].norm1.bias[3] = torch.nan
    save_trained(model, tmp_path, metadata={})
    with pytest.raises(ValueError, match=r"adapter\.safetensors: tensors that are not finite: blocks\.1\.norm1\.bias$"):
        load_trained(tiny_model("vit"), tmp_path)


def test_loading_into_the_wrong_model_names_what_does_not_fit(tmp_path):
    model = tiny_model("vit")
    apply_method(model, Baseline("bias"))
    save_trained(model, tmp_path, metadata={})
    with pytest.raises(ValueError, match=r"does not fit this VisionTransformer:\n  shape of patch_embed.proj.bias"):
        load_trained(tiny_model("vit", embed_dim=96), tmp_path)
    with pytest.warns(UserWarning, match="frozen weights of 8 of 8 layers differ"):
        load_trained(tiny_model("vit", seed=1), tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["baseline"] == {"method": "bias", "rank": None}


def test_decay_spares_vectors_and_what_the_model_names():
    model = tiny_model("vit")
    apply_method(model, Baseline("full"))
    groups = optimizer_groups(model, 1e-3, 0.05)
    by_decay = {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups}
    assert {group["lr"] for group in groups} == {1e-3}
    for name, parameter in model.named_parameters():
        spared = parameter.dim() == 1 or name in ("pos_embed", "cls_token")
        assert id(parameter) in by_decay[0.0 if spared else 0.05], name


def test_statistics_of_trained_batch_norms_go_with_the_best_epoch(tmp_path):
    """A ResNet under full fine-tuning: they are in the checkpoint, in the folder, and back after loading."""
    images = make_splits(tmp_path / "images", train=4, val=4, test=4)
    torch.manual_seed(0)

    def network():
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=2)

    model = network()
    apply_method(model, Baseline("full"))
    transform = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3).transform()
    sets = {name: ImageDataset(samples, transform) for name, samples in find_splits(images).items()}
    config = TrainConfig(epochs=2, batch_size=4, mixed_precision="no", warmup_epochs=0)
    fit(model, optimizer_groups(model, 1e-2, 0.0), sets["train"], sets["val"], config, tmp_path, quiet=True)
    name, mean = next((n, b) for n, b in model.named_buffers() if n.endswith("running_mean"))
    assert not torch.equal(mean, network().get_buffer(name))
    save_trained(model, tmp_path / "adapter", metadata={})
    fresh = network()
    load_trained(fresh, tmp_path / "adapter")
    batch = torch.randn(3, 3, 64, 64)
    assert torch.equal(logits(fresh, batch), logits(model, batch))


@pytest.mark.parametrize("method", METHODS)
def test_the_program_trains_scores_and_merges_every_method(method, tmp_path, monkeypatch, capsys):
    def rlrr(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlrr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = " ".join("".join(capsys.readouterr()).split())
        assert not ended.value.code, printed
        return printed

    images, run = make_splits(tmp_path / "images", train=6, val=3, test=3), tmp_path / "run"
    printed = rlrr(
        *("finetune", "--method", method, "--model", "test_vit", "--weights", "none", "--image-size", 32),
        *("--data", images, "--out", run, "--epochs", 2, "--batch-size", 6, "--mixed-precision", "no", "--lr", 0.003),
    )
    assert methods.TITLES[method] in printed
    result = json.loads((run / "result.json").read_text())
    assert result["method"] == method
    rlrr("evaluate", run / "adapter", "--data", images, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"] == result["test"]["accuracy"]
    rlrr("merge", run / "adapter")
    plain = timm.create_model("test_vit", num_classes=2, img_size=32, checkpoint_path=str(run / "merged.safetensors"))
    model, task = load_task(run / "adapter")
    batch = example_images(task)
    torch.testing.assert_close(logits(plain, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    assert merge_to_file(run / "adapter", tmp_path / "again.safetensors").difference < 1e-4


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_run_goes_on_with_the_same_numbers(method, tmp_path, monkeypatch):
    images = make_splits(tmp_path / "images", train=6, val=3, test=3)

    def run(out, resume=False):
        train = TrainConfig(epochs=3, batch_size=4, mixed_precision="no")
        config = FinetuneConfig(
            model="test_vit", data=images, out=out, weights="none", image_size=32, method=method, train=train
        )
        adapter = finetune(config, quiet=True, resume=resume).adapter
        return load_file(adapter / "adapter.safetensors")

    straight = run(tmp_path / "straight")
    read = ImageDataset.__getitem__
    left = 12 + 6 + 5  # into the second epoch

    def stopping(self, index):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "__getitem__", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    resumed = run(tmp_path / "stopped", resume=True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_bad_settings_are_named(tmp_path, monkeypatch):
    def config(**settings):
        return FinetuneConfig(model="test_vit", data=tmp_path, out=tmp_path / "run", weights="none", **settings)

    with pytest.raises(ValueError, match="method must be one of rlrr, probe, full"):
        config(method="adapter")
    with pytest.raises(ValueError, match="rank must be left out for method full, which has none; got 4"):
        config(method="full", rank=4)
    with pytest.raises(ValueError, match="rank must be an integer of at least 1; got 0"):
        config(method="lora", rank=0)
    with pytest.raises(ValueError, match="init is a setting of rlrr; got 'identity' for ssf"):
        config(method="ssf", init="identity")
    with pytest.raises(ValueError, match="needs a head to train; VisionTransformer has none"):
        apply_method(tiny_model("vit", num_classes=0), Baseline("probe"))
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"method lora needs the package peft: pip install 'rlrr-kernels\[baselines\]'"
    ):
        finetune(config(method="lora"), quiet=True)
    assert not (tmp_path / "run").exists()
