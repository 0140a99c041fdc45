"""The training loop: what it chooses, that resuming changes no number, that kill -9 and a full disk lose no work."""

import dataclasses
import errno
import os
import sys

import pytest
import torch

from tests.support.image_folders import make_splits

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from safetensors.torch import load_file

from rlrr_kernels.train.config.files import read_config
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import ImageDataset, find_splits
from rlrr_kernels.train.finetune import FinetuneConfig, finetune
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.loop import fit as loop
from rlrr_kernels.train.loop.fit import fit
from rlrr_kernels.train.models.backbones import create_model
from rlrr_kernels.train.run import results
from tests.support.fitting import CONFIG, Stop, assert_same, numbers, train, trained
from tests.support.killed import epochs_of, run_and_kill


@pytest.fixture
def images(tmp_path):
    return make_splits(tmp_path / "images")


@pytest.mark.parametrize("reads", [3, 24, 24 + 12, 24 + 24 + 7, 24 * 4 - 1])
def test_a_run_that_stopped_and_resumed_ends_the_same(images, tmp_path, reads):
    model, result = train(images, tmp_path / "straight")
    with pytest.raises(Stop):
        train(images, tmp_path / "stopped", reads=reads)
    if (tmp_path / "stopped" / checkpoint.NAME).exists():
        resumed_model, resumed = train(images, tmp_path / "stopped", resume=True)
        assert_same(resumed_model, model)
        assert numbers(resumed) == numbers(result)
        assert resumed.best_epoch == result.best_epoch
    else:
        assert reads < 10  # before the first update


def test_the_epoch_best_on_validation_is_kept(images, tmp_path):
    model, result = train(images, tmp_path / "run")
    best = max(result.history, key=lambda entry: (entry["val_accuracy"], -entry["val_loss"]))
    assert result.best_epoch == best["epoch"]
    assert result.best.accuracy == best["val_accuracy"]
    state = checkpoint.load_checkpoint(tmp_path / "run")
    for name, tensor in trained(model).items():
        assert torch.equal(tensor, state["best"]["tensors"][name])
    assert result.seconds > 0
    assert result.peak_memory > 2**20


def test_training_learns_and_leaves_the_backbone_alone(images, tmp_path):
    fresh, _ = create_model("test_vit", 2, image_size=32, weights="none")
    model, result = train(images, tmp_path / "run", dataclasses.replace(CONFIG, epochs=10, accumulate=1))
    assert result.history[-1]["train_loss"] < 0.8 * result.history[0]["train_loss"]
    assert result.best.accuracy > 0.8
    assert torch.equal(model.blocks[0].attn.qkv.weight, fresh.blocks[0].attn.qkv.weight)
    assert type(model.forward).__name__ == "method"  # accelerate's wrapper is gone


def determined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the shifts of keys, which softmax does not see: AdamW makes steps of the rounding in their gradients."""
    shifts = {name: tensor.chunk(3) for name, tensor in tensors.items() if name.endswith("qkv.shift")}
    return tensors | {name: torch.cat((q, v)) for name, (q, _, v) in shifts.items()}


def test_steps_of_one_update_count_as_one_batch(images, tmp_path):
    """Also at an epoch's end, where a step is short (4 images after 5) or an update has fewer steps than others."""
    for batch, accumulate in ((5, 2), (5, 3)):  # of 24 images: 5 + 5, 5 + 5, 4; 5 + 5 + 5, 5 + 4
        config = dataclasses.replace(CONFIG, batch_size=batch, accumulate=accumulate, epochs=2)
        model, result = train(images, tmp_path / f"steps-{accumulate}", config)
        config = dataclasses.replace(config, batch_size=batch * accumulate, accumulate=1)
        whole, expected = train(images, tmp_path / f"whole-{accumulate}", config)
        found, wanted = determined(trained(model)), determined(trained(whole))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert [entry["val_loss"] for entry in result.history] == pytest.approx(
            [entry["val_loss"] for entry in expected.history], rel=1e-4
        )


def test_accelerate_s_own_configuration_divides_no_gradient(images, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, epochs=2)
    model, _ = train(images, tmp_path / "plain", config)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # as accelerate launch sets it
    configured, _ = train(images, tmp_path / "configured", config)
    assert_same(configured, model)


def test_a_checkpoint_of_another_run_is_refused(images, tmp_path):
    with pytest.raises(Stop):
        train(images, tmp_path / "run", reads=24 + 12 + 10, identity={"model": "a"})
    cases = {
        "epochs was 4, is 5$": {"config": dataclasses.replace(CONFIG, epochs=5)},
        "model was a, is b$": {"identity": {"model": "b"}},
        "other settings: lr was 0.01, is 0.001$": {"lr": 1e-3},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            train(images, tmp_path / "run", resume=True, **{"identity": {"model": "a"}} | change)


def test_of_settings_within_settings_what_differs_is_named(images, tmp_path):
    names = [f"class {i:03}" for i in range(300)]

    def identity(size=32, classes=names, rank=1):
        return {
            "task": {"classes": classes, "preprocessing": {"image_size": size, "crop": 0.9}},
            "method": {"rank": rank},
        }

    with pytest.raises(Stop):
        train(images, tmp_path / "run", reads=24 + 12 + 10, identity=identity())
    cases = {
        "image_size was 32, is 48": identity(size=48),
        "image_size was 32, is 48; rank was 1, is 2": identity(size=48, rank=2),
        "classes are without class 000, class 001 and with cat": identity(classes=[*names[2:], "cat"]),
        "classes are without class 000": identity(classes=names[1:]),
        "classes are with cat": identity(classes=[*names, "cat"]),
        "classes are in another order": identity(classes=names[::-1]),
        "method was {'rank': 1}, is lora": identity() | {"method": "lora"},
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=f"run with other settings: {message}$"):
            train(images, tmp_path / "run", resume=True, identity=other)


def test_a_finished_run_gets_more_epochs(images, tmp_path):
    two, four = (dataclasses.replace(CONFIG, epochs=epochs) for epochs in (2, 4))
    _, short = train(images, tmp_path / "run", two)
    _, longer = train(images, tmp_path / "run", four, resume=True)
    assert numbers(longer)[:2] == numbers(short)
    assert [entry["epoch"] for entry in longer.history] == [1, 2, 3, 4]
    assert (short.extended, longer.extended) == ((), (2,))
    _, straight = train(images, tmp_path / "straight", four)
    assert [entry["lr"] for entry in longer.history[2:]] == [entry["lr"] for entry in straight.history[2:]]
    with pytest.raises(ValueError, match="epochs was 4, is 2"):
        train(images, tmp_path / "run", two, resume=True)


def test_checkpoints_of_before_the_digests_are_gone_on_with(images, tmp_path):
    _, result = train(images, tmp_path / "run", identity={"model": "a"})
    _, again = train(images, tmp_path / "run", resume=True, identity={"model": "a", "images_digest": "0"})
    assert numbers(again) == numbers(result)


def test_a_damaged_checkpoint_is_named(images, tmp_path):
    train(images, tmp_path / "run")
    path = tmp_path / "run" / checkpoint.NAME
    state = checkpoint.load_checkpoint(tmp_path / "run")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint: it is truncated"):
        train(images, tmp_path / "run", resume=True)
    checkpoint.save_checkpoint(tmp_path / "run", {name: value for name, value in state.items() if name != "tensors"})
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint that this version wrote: KeyError"):
        train(images, tmp_path / "run", resume=True)
    checkpoint.save_checkpoint(tmp_path / "run", {"value": torch.zeros(1000)})
    data = bytearray(path.read_bytes())
    data[data.index(bytes(1000))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint: it is damaged: the checksum of"):
        checkpoint.load_checkpoint(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train(images, tmp_path / "other", resume=True)


def test_a_full_disk_in_mid_run_does_not_end_it(images, tmp_path, monkeypatch):
    _, expected = train(images, tmp_path / "straight")
    written = []

    def write(folder, contents):
        written.append(folder)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / checkpoint.NAME))
        return original(folder, contents)

    original = checkpoint.write_together
    monkeypatch.setattr(checkpoint, "write_together", write)
    warnings = []
    monkeypatch.setattr(loop.TrainProgress, "warn", lambda self, message: warnings.append(message))
    _, result = train(images, tmp_path / "run")
    assert numbers(result) == numbers(expected)
    assert "could not be written, the one before stays: [Errno 28] No space left" in warnings[0]
    assert str(tmp_path / "run" / checkpoint.NAME) in warnings[0]
    assert checkpoint.load_checkpoint(tmp_path / "run")["updates"] == 2


def test_a_checkpoint_that_the_system_cuts_short_leaves_the_one_before(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of the size of files are Unix's")
    checkpoint.save_checkpoint(tmp_path, {"value": torch.ones(10)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save_checkpoint(tmp_path, {"value": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.load_checkpoint(tmp_path)["value"].tolist() == [1.0] * 10
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_a_disk_too_full_for_a_checkpoint_is_told_at_the_start(images, tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="No space left: the run needs about") as caught:
        train(images, tmp_path / "run", reads=0)
    assert caught.value.errno == errno.ENOSPC


def finetune_config(images, out):
    return FinetuneConfig(
        model="test_vit", data=images, out=out, weights="none", image_size=32, train=TrainConfig(epochs=2)
    )


def test_an_adapter_that_cannot_be_saved_is_saved_elsewhere(images, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(results.tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere" / "rlrr-adapter-run").touch()
    out = tmp_path / "run"
    original = results.save_trained

    def save(model, folder, **options):
        if folder.is_relative_to(out):
            raise OSError(errno.ENOSPC, "the adapter could not be saved (No space left on device)")
        return original(model, folder, **options)

    monkeypatch.setattr(results, "save_trained", save)
    with pytest.raises(OSError, match=r"it was saved to .*elsewhere/rlrr-adapter-run-.* instead"):
        finetune(finetune_config(images, out), quiet=True)
    (rescued,) = (tmp_path / "elsewhere").glob(
        "rlrr-adapter-run-*"
    )  # of this run alone: another folder's name may be the same
    saved = load_file(rescued / "adapter.safetensors")
    monkeypatch.setattr(results, "save_trained", original)
    result = finetune(finetune_config(images, out), quiet=True, resume=True)
    again = load_file(result.adapter / "adapter.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


def test_a_run_folder_is_never_overwritten(images, tmp_path):
    finetune(finetune_config(images, tmp_path / "run"), quiet=True)
    with pytest.raises(ValueError, match="holds a run already; go on with it with --resume"):
        finetune(finetune_config(images, tmp_path / "run"), quiet=True)


def test_killed_and_resumed_is_as_never_killed(images, tmp_path):
    arguments = (
        "finetune --model test_vit --weights none --image-size 32 --epochs 5 --batch-size 4 --checkpoint-minutes 0 "
        "--lr 0.01 --augment timm --mixed-precision bf16 --accumulate 2 --mixup 0.8 --cutmix 1 --label-smoothing 0.1 "
        "--ema-decay 0.9 --activation-checkpointing --schedule restarts --schedule-per epoch "
        f"--data {images} --out {tmp_path / 'killed'}"
    ).split()
    command = [sys.executable, "-m", "rlrr_kernels.cli", *arguments]
    run_and_kill(command, lambda: epochs_of(tmp_path / "killed") >= 2)
    assert not (tmp_path / "killed" / "adapter").exists()

    def run(folder, resume):
        config = read_config(FinetuneConfig, tmp_path / "killed" / "config.json")
        config = dataclasses.replace(config, out=tmp_path / folder)
        return load_file(finetune(config, resume=resume, quiet=True).adapter / "adapter.safetensors")

    (tmp_path / "killed" / ".checkpoint.pt.12345678.tmp").touch()  # as when the signal came while it was written
    resumed, straight = run("killed", True), run("straight", False)
    assert not list((tmp_path / "killed").glob(".*"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_a_parameter_without_gradient_is_named(images, tmp_path):
    splits = find_splits(images)
    model, preprocessing = create_model("test_vit", 2, image_size=32, weights="none")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.unused = torch.nn.Parameter(torch.zeros(1))
    data = ImageDataset(splits["train"], preprocessing.transform())
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3, "weight_decay": 0.0}]
    with pytest.raises(ValueError, match=r"1 of 3 trained parameters got no gradient.*unused"):
        fit(model, groups, data, data, CONFIG, tmp_path, quiet=True)


def test_a_loss_that_explodes_is_told(images, tmp_path):
    with pytest.raises(FloatingPointError, match=r"training loss is (nan|inf) in epoch 1 at learning rate"):
        train(images, tmp_path / "run", lr=1e30)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of auto, no, fp16, bf16; got 'fp8'"),
        ({"epochs": 2, "warmup_epochs": 2}, "must be less than epochs = 2"),
        ({"select_by": "test"}, "select_by must be one of"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be at least 0 and less than 1; got 1\.0"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_the_time_it_will_take_is_said_after_the_first_steps(images, tmp_path, monkeypatch):
    read, said, get = [], [], ImageDataset.__getitem__
    monkeypatch.setattr(ImageDataset, "__getitem__", lambda self, index: read.append(index) or get(self, index))
    monkeypatch.setattr(loop.time, "monotonic", lambda: 5.0 * len(read))  # five seconds an image
    monkeypatch.setattr(loop.TrainProgress, "say", lambda self, message: said.append(message))
    config = dataclasses.replace(CONFIG, epochs=20, batch_size=2, accumulate=1, checkpoint_minutes=1e6)
    with pytest.raises(Stop):
        train(images, tmp_path / "run", config, reads=20)
    # Of 20 epochs of 12 steps, 234 are left after six; and 20 times 6 batches to score, at 0.35 of a step each.
    assert said == [f"about {10 * (234 + 0.35 * 120) / 60:.0f} min to go"]
    assert said == ["about 46 min to go"]
