"""The evidence command on a tiny model: what it chooses, that it goes on where it was, what its report says."""

import dataclasses
import json
import math
import sys

import pytest

from tests.support.image_folders import make_splits

timm = pytest.importorskip("timm", reason="the evidence command needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from safetensors.torch import save_file

from benchmarks.evidence import __main__ as program
from benchmarks.evidence import report as evidence_report
from benchmarks.evidence import runs as evidence
from rlrr_kernels.train.grid import runs as grid

ARMS = {
    "probe": evidence.Arm("linear probe", {"method": "probe"}, lrs=(1e-7, 1e-2)),
    "rlrr": evidence.Arm("RLRR", {}, lrs=(1e-2,)),
    "rlrr-layers": evidence.Arm("RLRR without SSF", {"recipe": "layers"}, lr_of="rlrr"),
}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command on test_vit and 24 images; returns the names of the runs that were trained."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    images = make_splits(tmp_path / "images", train=6, val=3, test=3)
    monkeypatch.setattr(evidence, "TIMM_NAME", "test_vit")
    monkeypatch.setattr(evidence, "backbone_file", lambda cache: weights)
    monkeypatch.setattr(evidence, "DATASETS", {"tiny": evidence.Source(lambda cache: images, "none")})
    for name in ("MAIN", "ABLATIONS", "ARMS"):
        part = {"MAIN": ("probe", "rlrr"), "ABLATIONS": ("rlrr-layers",), "ARMS": tuple(ARMS)}[name]
        monkeypatch.setattr(evidence, name, {arm: ARMS[arm] for arm in part})
    monkeypatch.setattr(evidence, "MOST_BEYOND", 0)
    for module in (program, evidence_report):
        monkeypatch.setattr(module, "ARMS", ARMS)
    monkeypatch.setattr(program, "DATASETS", evidence.DATASETS)
    trained, original = [], grid.finetune
    monkeypatch.setattr(
        grid,
        "finetune",
        lambda config, **options: trained.append(str(config.out.relative_to(tmp_path))) or original(config, **options),
    )

    def run(*options):
        trained.clear()
        arguments = ("--cache", tmp_path, "--out", tmp_path / "runs", "--datasets", "tiny", "--image-size", 32)
        arguments += ("--epochs", 2, "--seeds", 1, 2)
        monkeypatch.setattr(sys, "argv", ["evidence", *map(str, (*arguments, *options))])
        program.main()
        return [name.removeprefix("runs/") for name in trained]

    return run


def test_rates_are_chosen_on_one_seed_and_nothing_is_done_twice(command, tmp_path, capsys):
    assert command("--methods", "probe") == [
        "tiny/probe/lr-1e-07/seed-1",
        "tiny/probe/lr-0.01/seed-1",
        "tiny/probe/lr-0.01/seed-2",  # six images and two epochs: the lower rate learns nothing
    ]
    assert command("--methods", "rlrr-layers") == [
        "tiny/rlrr/lr-0.01/seed-1",  # chooses for its ablation
        "tiny/rlrr-layers/lr-0.01/seed-1",
        "tiny/rlrr-layers/lr-0.01/seed-2",
    ]
    capsys.readouterr()
    assert command("--report-only") == []
    printed = capsys.readouterr().out
    assert "| linear probe | 0.01 of 1e-07, 0.01 | 130 | 2 |" in printed
    assert "Not run: RLRR on tiny (1 of 2 seeds)." in printed
    assert command() == ["tiny/rlrr/lr-0.01/seed-2"]
    rows = json.loads((tmp_path / "runs" / "evidence.json").read_text())
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in ("probe", "rlrr", "rlrr-layers") for seed in (1, 2)
    ]
    result = json.loads((tmp_path / "runs/tiny/rlrr/lr-0.01/seed-2/result.json").read_text())
    (row,) = [row for row in rows if (row["method"], row["seed"]) == ("rlrr", 2)]
    assert row["test_accuracy"] == result["test"]["accuracy"]
    assert row["val_macro_f1"] == result["validation"]["macro_f1"]
    assert row["trained_parameters"] == result["trained_parameters"]
    assert {"cpu", "torch", "commit", "precision", "threads", "seconds"} <= set(row)
    assert "Not run: nothing." in (tmp_path / "runs" / "evidence.md").read_text()
    assert (tmp_path / "runs" / "evidence.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"other settings: train.epochs was 2, is 3"):
        command("--epochs", 3)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (3e-3, [1e-3, 3e-3, 1e-2]),
        (1e-2, [1e-3, 3e-3, 1e-2, 3e-2]),
        (3e-2, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (3e-4, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        (1.0, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]),  # no end without an end
    ],
)
def test_a_best_rate_at_an_end_has_the_next_one_tried(best, tried, monkeypatch):
    """Accuracies fall to both sides of ``best``; a rate has a result once it was asked for."""
    asked = []

    def result(run, out):
        if run not in asked:
            asked.append(run)
            return None
        return {"validation": {"accuracy": -abs(math.log(run / best)), "loss": 1.0}}

    monkeypatch.setattr(evidence, "finished_result", result)
    monkeypatch.setattr(evidence.Evidence, "run", lambda self, dataset, method, lr, seed: lr)
    grid = evidence.Evidence(cache=None, out=None)
    while (chosen := grid.chosen_lr("elpv", "rlrr-mlp")) is None:
        pass
    assert list(grid.candidates("elpv", "rlrr-mlp")) == sorted(asked) == tried
    assert chosen == min(tried, key=lambda lr: abs(math.log(lr / best)))


def test_a_trial_is_marked_and_kept_apart(command, tmp_path, capsys):
    assert command("--limit", 4, "--methods", "rlrr", "--seeds", 7) == ["trial-4/tiny/rlrr/lr-0.01/seed-7"]
    assert "A trial on about 4 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "evidence.json").read_text())[0]["trial"] is True


def test_report_without_any_result(command, tmp_path):
    assert command("--report-only") == []
    assert "Not run: linear probe on tiny (2 of 2 seeds)" in (tmp_path / "runs" / "evidence.md").read_text()


def test_every_arm_is_a_valid_run(tmp_path):
    for name, arm in evidence.ARMS.items():
        assert arm.lr_of is None or arm.lr_of in evidence.MAIN
        config = evidence.FinetuneConfig(model="test_vit", data=tmp_path, out=tmp_path, **arm.settings)
        assert dataclasses.asdict(config)["method"] == arm.settings.get("method", "rlrr"), name


def test_digits_are_split_the_same_way_in_every_class(tmp_path):
    pytest.importorskip("sklearn", reason="digits come with scikit-learn")
    folder = evidence.digits_folder(tmp_path)
    counts = {
        split: [len(list((folder / split / str(digit)).iterdir())) for digit in range(10)]
        for split in ("train", "val", "test")
    }
    assert {split: sum(each) for split, each in counts.items()} == {"train": 899, "val": 299, "test": 599}
    assert all(max(each) - min(each) <= 5 for each in counts.values())
    assert evidence.digits_folder(tmp_path) == folder


def test_cells_come_with_the_main_methods_first():
    cells = list(evidence.Evidence(cache=None, out=None).cells())
    assert cells[: len(evidence.MAIN)] == [("elpv", method) for method in evidence.MAIN]
    assert len(cells) == 2 * len(evidence.ARMS)
    assert evidence_report.NAME == "evidence"
