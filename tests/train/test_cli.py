"""The program ``rlrr``: what it writes, what it prints, and the errors it gives in place of tracebacks."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.image_folders import make_images, make_splits
from tests.support.paths import ROOT
from tests.support.tiny_models import SIZES, disturb, tiny_images, tiny_model

timm = pytest.importorskip("timm", reason="the program needs timm")
pytest.importorskip("accelerate", reason="the program needs accelerate")
pytest.importorskip("typer", reason="the program needs typer")

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rlrr_kernels
from rlrr_kernels import RLRRConfig, RLRRLinear, adapt_model, adapter_info, merge_adapter, save_adapter
from rlrr_kernels.cli import app, main
from rlrr_kernels.train.data.folders import ImageDataset, find_samples
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.export import Merged, load_merged, merge_to_file
from rlrr_kernels.train.task import Task, load_task

SQUARE = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def images(tmp_path):
    return make_splits(tmp_path / "images")


def arguments(images, out):
    return (
        *("finetune", "--model", "test_vit", "--weights", "none", "--image-size", 32, "--data", images, "--out", out),
        *("--epochs", 6, "--batch-size", 6, "--lr", 0.01, "--mixed-precision", "no"),
    )


def test_finetune_evaluate_merge(rlrr, images, tmp_path):
    run, adapter = tmp_path / "run", tmp_path / "run" / "adapter"
    status, printed = rlrr(*arguments(images, run))
    assert status == 0
    for text in (
        "2 classes, 24 train, 12 val, 12 test images",
        "epoch 6/6",
        "best so far",
        f"next: rlrr merge {adapter}",
    ):
        assert text in printed
    result = json.loads((run / "result.json").read_text())
    assert len(result["history"]) == 6
    assert result["epoch_chosen_on"] == "validation"
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (
        sum(tensor.numel() for tensor in load_file(adapter / "adapter.safetensors").values())
        == (result["trained_parameters"])
    )
    assert adapter_info(adapter).metadata["task"]["classes"] == ["blue", "red"]

    card = (adapter / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    made = {}
    exec(code.replace("path/to/this/folder", str(adapter)), made)
    assert made["task"].preprocessing.image_size == 32
    assert not any(isinstance(module, RLRRLinear) for module in made["model"].modules())

    status, printed = rlrr("evaluate", adapter, "--data", images, "--json", tmp_path / "scores.json")
    assert status == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["loss"] == pytest.approx(result["test"]["loss"], rel=1e-2)  # in the precision of the device
    assert f"accuracy {scores['accuracy']:.4f}" in printed

    status, printed = rlrr("merge", adapter, "--output", tmp_path / "merged.safetensors")
    assert status == 0
    plain = timm.create_model(
        "test_vit", num_classes=2, img_size=32, checkpoint_path=str(tmp_path / "merged.safetensors")
    ).eval()
    model, task = load_task(adapter)
    data = ImageDataset(find_samples(images / "test"), task.preprocessing.transform())
    batch = torch.stack([data[i][0] for i in range(len(data))])
    with torch.no_grad():
        torch.testing.assert_close(plain(batch), model.eval()(batch), rtol=1e-4, atol=1e-5)

    status, printed = rlrr("merge", adapter, "--output", tmp_path / "merged.safetensors")
    assert status == 1
    assert "merged.safetensors exists; replace it with --overwrite" in printed


def test_finished_run_is_kept_and_can_be_shown_again(rlrr, images, tmp_path):
    assert rlrr(*arguments(images, tmp_path / "run"))[0] == 0
    status, printed = rlrr(*arguments(images, tmp_path / "run"))
    assert status == 1
    assert "holds a run already; go on with it with --resume" in printed
    status, printed = rlrr(*arguments(images, tmp_path / "run"), "--resume")
    assert status == 0
    assert "epoch 6/6" not in printed


def test_mixed_precision_and_accumulation(rlrr, images, tmp_path):
    status, printed = rlrr(
        *arguments(images, tmp_path / "run"), "--mixed-precision", "bf16", "--accumulate", 2, "--recipe", "layers"
    )
    assert status == 0, printed
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not any("norm1" in name for name in tensors)


def test_weights_file_is_asked_for_again(rlrr, images, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    status, printed = rlrr(*arguments(images, tmp_path / "run"), "--weights", weights)
    assert status == 0
    assert f"--weights {weights}" in printed
    adapter = tmp_path / "run" / "adapter"
    assert str(tmp_path) not in (adapter / "config.json").read_text()  # no path of this machine leaves it
    status, printed = rlrr("evaluate", adapter, "--data", images)
    assert status == 1
    assert "weights from a file called weights.safetensors; say where it is with --weights FILE" in printed
    status, printed = rlrr("evaluate", adapter, "--data", images, "--weights", weights)
    assert status == 0
    assert "warning" not in printed
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), other)
    status, printed = rlrr("evaluate", adapter, "--data", images, "--weights", other)
    assert "warning: the frozen weights of 24 of 24 layers differ" in printed


def test_bad_input_is_told_in_a_line_before_any_work(rlrr, images, tmp_path):
    def fails(*options, text):
        status, printed = rlrr(*arguments(images, tmp_path / "run"), *options)
        assert status == 1
        assert printed.startswith("error:")
        assert text in printed, printed
        assert not (tmp_path / "run").exists()

    fails("--model", "test_vitt", text="timm has no model 'test_vitt'; did you mean test_vit")
    fails("--model", "test_vit.", text="timm has no weights '' of test_vit; there are r160_in1k")
    fails("--image-size", 10**8, text="image_size must be at most 16384; got 100000000")
    fails("--data", tmp_path / "nowhere", text="nowhere does not exist")
    fails("--weights", tmp_path / "absent.pth", text="absent.pth does not exist")
    fails("--lr", "-1", text="lr must be a finite number of at least 0; got -1.0")
    fails("--augment", "mirror", text="augment must be one of none, flip, crop, timm; got 'mirror'")
    fails("--recipe", "book", text="recipe must be one of auto, paper, layers; got 'book'")
    fails("--drop", "1", text="drop must be at least 0 and less than 1; got 1.0")
    fails("--drop-kind", "path", text="drop_kind must be one of branch, depth; got 'path'")
    fails("--epochs", "0", text="epochs must be at least 1; got 0")
    fails("--data", make_images(tmp_path / "one", {"only": 3}), text="one class folder only, 'only'")
    (images / "train" / "green").mkdir()
    fails(text="green holds no image")
    (images / "train" / "green").rmdir()
    broken = images / "test" / "red" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    fails(text=f"1 of 48 images cannot be read; repair or remove them: cannot read the image {broken}")


def test_evaluate_names_what_does_not_fit(rlrr, images, tmp_path):
    assert rlrr(*arguments(images, tmp_path / "run"))[0] == 0
    adapter = tmp_path / "run" / "adapter"
    status, printed = rlrr("evaluate", adapter, "--data", make_images(tmp_path / "fish", {"fish": 2}))
    assert status == 1
    assert "classes that the model does not have: 'fish'; it has blue, red" in printed
    tensors = adapter / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    for command in (("evaluate", adapter, "--data", images), ("merge", adapter)):
        status, printed = rlrr(*command)
        assert status == 1
        assert "adapter.safetensors is truncated" in printed
    status, printed = rlrr("merge", images)
    assert status == 1
    assert "is no adapter written by save_adapter" in printed


def test_doctor_names_versions_devices_and_reasons(rlrr):
    status, printed = rlrr("doctor")
    assert status == 0
    for text in ("torch", torch.__version__, "timm", "cpu", "rlrr_linear", "norm_rescale", "why"):
        assert text in printed


def test_doctor_explains_a_default_that_cannot_run(rlrr, monkeypatch):
    from rlrr_kernels import backends

    monkeypatch.setattr(backends, "INTERPRETING", False)
    with rlrr_kernels.use_backend("triton"):
        status, printed = rlrr("doctor")
    assert status == 0
    assert "default: triton" in printed
    if not torch.cuda.is_available():
        assert "cannot run here" in printed


def test_help_and_version():
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output.startswith("rlrr-kernels ")
    shown = runner.invoke(app, ["--help"]).output
    commands = ("finetune", "evaluate", "merge", "doctor", "demo", "reproduce", "report")
    assert sorted(commands, key=shown.index) == list(commands)


def test_too_little_memory_is_told_in_a_line(rlrr, monkeypatch, tmp_path):
    from rlrr_kernels.train import export

    def merge(error):
        def fail(*_):
            if error is None:
                torch.empty(10**15)
            raise error

        monkeypatch.setattr(export, "merge_to_file", fail)
        return rlrr("merge", tmp_path)

    for error in (None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")):
        status, printed = merge(error)
        assert status == 1
        assert printed.startswith("error: out of memory; lower --batch-size or --image-size, or")
    with pytest.raises(RuntimeError, match="a fault"):
        merge(RuntimeError("a fault"))


@pytest.mark.parametrize("out", [("--out", ""), ("--out=",)])
def test_an_empty_argument_is_not_the_current_folder(rlrr, out, images, tmp_path, monkeypatch):
    """As a shell's unset variable leaves it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    status, printed = rlrr("finetune", "--model", "test_vit", "--data", images, *out)
    assert (status, printed) == (1, "error: the argument after --out is empty")
    assert not [*here.iterdir()]


def test_errors_go_to_the_error_stream(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rlrr", "merge", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: the adapter folder")


def test_a_network_of_convolutions_is_trained_and_merged(rlrr, images, tmp_path):
    pytest.importorskip("accelerate", reason="training needs accelerate")
    run, options = tmp_path / "run", ("--model", "test_resnet", "--epochs", 1, "--warmup-epochs", 0)
    status, printed = rlrr(*arguments(images, run), *options)
    assert status == 1
    assert "ResNet has no linear layer beside its head; adapt its convolutions with convs='*' (--convs '*')" in printed
    for method in ("lora", "ssf"):
        status, printed = rlrr(*arguments(images, run), *options, "--method", method)
        assert status == 1
        assert f"method {method} adapts linear layers; ResNet has none beside its head" in printed
    layout = ("--conv-layout", "out*kh,in*kw")
    status, printed = rlrr(*arguments(images, run), *options, "--convs", "*", *layout, "--rank", 10)
    assert status == 0, printed
    assert adapter_info(run / "adapter").config.conv_layout == "out*kh,in*kw"
    status, printed = rlrr("merge", run / "adapter")
    assert status == 0
    assert "its state dict has the keys of the plain model" in printed
    plain = timm.create_model("test_resnet", num_classes=2, checkpoint_path=str(run / "merged.safetensors")).eval()
    model, _ = load_task(run / "adapter")
    batch = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(batch), model.eval()(batch), rtol=1e-4, atol=1e-5)


def test_what_the_user_named_is_printed_as_it_is(rlrr, images, tmp_path):
    (images / "train" / "red").rename(images / "train" / "[bold]red")
    for split in ("val", "test"):
        (images / split / "red").rename(images / split / "[bold]red")
    run = tmp_path / "vit[lr=3e-3] a"
    status, printed = rlrr(*arguments(images, run), "--epochs", 1)
    assert status == 0, printed
    assert "training images by class: [bold]red 12, blue 12" in printed
    adapter = run / "adapter"
    assert f"learning curve: {run / 'learning_curve.png'} adapter: {adapter} next:" in printed
    command = shlex.split(printed.partition("next: ")[2])
    assert command[-2:] == ["merge", str(adapter)]
    status, printed = rlrr("evaluate", adapter, "--data", images)
    assert "[bold]red" in printed
    assert f"{images / 'test'}: accuracy" in printed
    status, printed = rlrr("merge", adapter)
    assert f'checkpoint_path="{run / "merged.safetensors"}")' in printed


def test_a_folder_whose_name_begins_with_a_dash_is_no_option_of_the_next_command():
    from rlrr_kernels.train.output.progress import command

    assert command("merge", Path("-run/adapter"), "--weights", Path("a b.pth")).endswith(
        " merge ./-run/adapter --weights 'a b.pth'"
    )


def test_many_classes_are_shown_by_the_first_and_last(rlrr, tmp_path):
    data = make_images(tmp_path / "images", {f"class {i:02}": 2 for i in range(40)}, size=8)
    _, printed = rlrr(*arguments(data, tmp_path / "run"), "--epochs", 1)
    assert "by class: class 00 1, class 01 1, class 02 1, class 03 1, ..., class 36 1, class 37 1" in printed


def test_a_run_goes_on_with_its_own_images_and_weights_alone(rlrr, images, tmp_path):
    weights = tmp_path / "a" / "weights.safetensors"
    weights.parent.mkdir()
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    run = tmp_path / "run"
    options = (*arguments(images, run), "--epochs", 2, "--weights")
    status, printed = rlrr(*options, weights, "--resume")
    assert status == 0
    assert f"{run} holds no run to go on with: one is started there" in printed
    saved = (run / "adapter" / "config.json").read_bytes()
    other = tmp_path / "b" / "weights.safetensors"  # of the same name
    other.parent.mkdir()
    torch.manual_seed(2)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), other)
    status, printed = rlrr(*options, other, "--resume")
    assert status == 1
    assert "run with other settings: the weights of the backbone are not the same" in printed
    assert (run / "adapter" / "config.json").read_bytes() == saved
    shutil.copytree(images, tmp_path / "moved")
    assert rlrr(*options, weights, "--resume", "--data", tmp_path / "moved")[0] == 0
    with open(tmp_path / "moved" / "train" / "red" / "003.png", "ab") as file:
        file.write(b"0")
    status, printed = rlrr(*options, weights, "--resume", "--data", tmp_path / "moved")
    assert status == 1
    assert "the images are not the same (their names, sizes in bytes, labels or splits)" in printed
    status, printed = rlrr(*options, weights, "--resume", "--lr", 0.1)
    assert printed.endswith("other settings: lr was 0.01, is 0.1")


def test_a_finished_run_gets_more_epochs(rlrr, images, tmp_path):
    run = tmp_path / "run"
    assert rlrr(*arguments(images, run), "--epochs", 2)[0] == 0
    status, printed = rlrr(*arguments(images, run), "--epochs", 3, "--resume")
    assert status == 0
    assert "the finished run of 2 epochs gets 1 more, at the learning rates of a run of 3" in printed
    assert "epoch 3/3" in printed
    result = json.loads((run / "result.json").read_text())
    assert (len(result["history"]), result["extended_from_epochs"]) == (3, [2])
    assert json.loads((run / "config.json").read_text())["train"]["epochs"] == 3


def test_evaluate_finds_the_split_and_takes_a_size(rlrr, images, tmp_path):
    run = tmp_path / "run"
    assert rlrr(*arguments(images, run), "--epochs", 1)[0] == 0
    (images / "test").rename(images / "Testing")
    status, printed = rlrr("evaluate", run / "adapter", "--data", images, "--image-size", 48)
    assert status == 0, printed
    assert f"{images / 'Testing'}: accuracy" in printed
    assert f"{images / 'val'}: accuracy" in rlrr("evaluate", run / "adapter", "--data", images, "--split", "valid")[1]
    status, printed = rlrr("evaluate", run / "adapter", "--data", images, "--image-size", 40)
    assert status == 1
    assert "the image size must be a multiple of 16" in printed
    status, printed = rlrr("evaluate", run / "adapter", "--data", images / "Testing", "--split", "dev")
    assert "holds no split dev; there are no splits" in printed


def test_evaluate_checks_its_options_before_the_images(rlrr, images, tmp_path, monkeypatch):
    from rlrr_kernels.train.data import folders

    run = tmp_path / "run"
    assert rlrr(*arguments(images, run), "--epochs", 1)[0] == 0
    monkeypatch.setattr(folders, "check_images", lambda *_: pytest.fail("images were decoded"))
    for option, value, text in (
        ("--batch-size", 0, "batch_size must be at least 1; got 0"),
        ("--image-size", 40, "the image size must be a multiple of 16"),
        ("--image-size", 10**8, "image_size must be at most 16384; got 100000000"),
        ("--weights", tmp_path / "absent.pth", "absent.pth does not exist"),
        ("--json", images, f"{images} exists and is a folder"),
    ):
        status, printed = rlrr("evaluate", run / "adapter", "--data", images, option, value)
        assert status == 1
        assert printed.startswith("error: ")
        assert text in printed


def test_a_file_in_place_of_a_folder_and_the_reverse_are_told(rlrr, tmp_path):
    file = tmp_path / "file"
    file.touch()
    pth = ("import-adapter", file, "--model", "test_vit", "--out", tmp_path / "out")
    for arguments, text in (
        (("data", "check", file), f"the data folder {file} is no folder"),
        (("report", file), f"the results folder {file} is no folder"),
        (("serve", "--adapters", file), f"the folder of adapters {file} is no folder"),
        (("finetune", "--data", file, "--model", "test_vit"), f"the image folder {file} is no folder"),
        (("evaluate", file, "--data", file), f"the adapter folder {file} is no folder"),
        ((*pth, "--classes", tmp_path), f"--classes {tmp_path} is no file"),
        ((*pth, "--classes", tmp_path / "absent"), f"--classes {tmp_path / 'absent'} does not exist"),
        ((*pth, "--names", tmp_path), f"the file of names {tmp_path} is no file"),
    ):
        assert rlrr(*arguments) == (1, f"error: {text}"), arguments


def test_a_cluster_is_looked_at_before_any_list(rlrr, tmp_path):
    pytest.importorskip("submitit", reason="jobs need submitit")
    reproduce = "reproduce", "vtab", "--root", tmp_path, "--model", "test_vit", "--cluster"
    assert rlrr(*reproduce, "moon") == (1, "error: cluster must be one of local, slurm; got 'moon'")
    status, printed = rlrr(*reproduce, "local", "--job", "no_such=1")
    assert status == 1
    assert "no_such" in printed


def test_equal_images_in_two_splits_or_classes_are_warned_of(rlrr, images, tmp_path):
    shutil.copy(images / "train" / "red" / "000.png", images / "test" / "red" / "copy.png")
    shutil.copy(images / "val" / "red" / "000.png", images / "val" / "blue" / "other.png")
    status, printed = rlrr(*arguments(images, tmp_path / "run"), "--epochs", 1)
    assert status == 0
    assert "warning: 1 images are, byte for byte, in two splits, such as" in printed
    assert "copy.png: scores on them are too good" in printed
    assert "warning: 1 images are, byte for byte, in two classes of one split, such as" in printed


def test_one_bad_image_ends_a_run_in_a_line(rlrr, images, tmp_path):
    (images / "train" / "red" / "000.png").write_bytes(b"none")
    status, printed = rlrr(*arguments(images, tmp_path / "run"), "--no-check", "--workers", 1)
    assert status == 1
    assert re.search(r"error: cannot read the image \S*000\.png: cannot identify image file \S+$", printed), printed


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_one_speaks(rlrr, tmp_path, monkeypatch, rank):
    """A launcher ends the others while they wait; one that fails alone speaks after a while."""
    from rlrr_kernels import cli

    waited = []
    monkeypatch.setattr(cli.console, "quiet", False)  # main sets it for good
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    status, printed = rlrr("merge", tmp_path / "none")
    assert status == 1
    assert printed.startswith("error: the adapter folder")
    assert bool(waited) == (rank == "1")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"].startswith("the adapter folder")


@pytest.mark.slow
def test_an_input_error_under_torchrun_is_one_line_of_ours(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "rlrr_kernels.cli", "finetune", "--model", "test_vitt", "--data", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert ours == ["error: timm has no model 'test_vitt'; did you mean test_vit or test_vit4 or test_vit3?"]
    assert "traceback : timm has no model 'test_vitt'" in done.stderr  # torchrun's own report says why


@pytest.mark.parametrize("family", ["swin", "eva02"])
def test_a_merged_file_that_gained_biases_is_loaded_by_the_line_that_merge_prints(tmp_path, family):
    model, images = tiny_model(family), tiny_images(family)
    adapt_model(model, RLRRConfig(recipe="paper") if family == "swin" else RLRRConfig())
    disturb(model)
    report = merge_adapter(model)
    assert report.gained
    file = tmp_path / "merged.safetensors"
    save_file(model.state_dict(), file)
    name, options = SIZES[family]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        timm.create_model(name, num_classes=5, **options).load_state_dict(load_file(file))
    plain = load_merged(file, name, num_classes=5, **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images), model.eval()(images))
    merged = Merged(Task(name, "none", ("a", "b"), preprocessing=SQUARE), report, 0.0, 0.0, True)
    assert merged.loading(file) == (
        f'from rlrr_kernels.train.export import load_merged; load_merged("{file}", "{name}", num_classes=2, '
        "img_size=32)"
    )
    with pytest.raises(ValueError, match=r"merged\.safetensors is no merged model of test_vit"):
        load_merged(file, "test_vit")
    key = "head.fc.weight" if family == "swin" else "head.weight"
    for damaged in (model.state_dict()[key].view(torch.int32), model.state_dict()[key] * torch.nan):
        save_file(model.state_dict() | {key: damaged}, file)
        with pytest.raises(ValueError, match=rf"merged\.safetensors.*: {key} must be of the kind|not finite: {key}"):
            load_merged(file, name, num_classes=5, **options)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "mobilevit_xxs"])
def test_the_line_that_merge_prints_makes_the_model_at_the_size_it_was_trained_at(tmp_path, name):
    """A DeiT that is distilled takes ``img_size`` as any of its options; a MobileViT has no size of its own."""
    task = Task(name, "none", ("a", "b"), SQUARE)
    model = task.backbone()
    adapt_model(model, RLRRConfig())
    disturb(model)
    save_adapter(model, tmp_path / "adapter", metadata={"task": task.to_dict()})
    file = tmp_path / "merged.safetensors"
    line = merge_to_file(tmp_path / "adapter", file).loading(file)
    assert ("img_size=32" in line) == name.startswith("deit")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            eval(line, {"timm": timm}).eval()(images), model.eval()(images), rtol=1e-4, atol=1e-4
        )
