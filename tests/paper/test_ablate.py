"""``rlrr ablate``: which runs it makes, the tables beside the paper's, and that it goes on where it was."""

import dataclasses
import json

import pytest

from tests.support.image_folders import make_splits
from tests.support.paper_trees import make_vtab

pytest.importorskip("timm", reason="the program needs timm")
pytest.importorskip("accelerate", reason="the program needs accelerate")
pytest.importorskip("typer", reason="the program needs typer")

from rlrr_kernels.paper import ablate
from rlrr_kernels.train.grid import runs as grid
from rlrr_kernels.train.run.config import FinetuneConfig


def test_every_variant_is_a_valid_run_and_another_one(tmp_path):
    config = FinetuneConfig(model="test_vit", data=tmp_path, out=tmp_path)
    varied = [dataclasses.replace(config, **variant.settings) for variant in ablate.VARIANTS.values()]
    assert len({json.dumps(dataclasses.asdict(one), default=str) for one in varied}) == len(varied)
    assert varied[list(ablate.VARIANTS).index("both")] == config
    assert set(ablate.REPORTED_SIDES) == set(ablate.STUDIES["sides"])
    assert set(ablate.REPORTED_INIT) == set(ablate.STUDIES["init"])
    assert {name for names in ablate.STUDIES.values() for name in names} == set(ablate.VARIANTS)


def result(accuracy, trained=10, images="test"):
    scores = {"accuracy": accuracy}
    return {"test": scores if images == "test" else None, "validation": scores, "trained_parameters": trained}


def test_means_are_over_datasets_first_and_over_whole_seeds_alone():
    results = {
        "both/cub/seed-1": result(0.9, 10),
        "both/cars/seed-1": result(0.7, 30),
        "both/cub/seed-2": result(0.8, 10),
        "both/cars/seed-2": result(0.6, 30),
        "left/cub/seed-1": result(0.5),  # cars is still to come
        "right/cub/seed-1": result(0.5),
        "right/cars/seed-1": result(0.6),
        "right/cub/seed-2": result(1.0),
    }
    scores = ablate.gather(results, "test")
    assert set(scores) == {"both", "right"}
    assert scores["both"].accuracies == pytest.approx((0.8, 0.7))
    assert scores["both"].trained == 20
    assert scores["right"].accuracies == pytest.approx((0.55,))


def test_the_papers_numbers_give_the_papers_table():
    results = {f"{name}/seed-42": result(value / 100) for name, value in ablate.REPORTED_SIDES.items()}
    text = ablate.tables(ablate.gather(results, "test"), ("sides",), "test")
    rows = [line for line in text.splitlines() if line.startswith("| with")]
    assert rows == [
        "| without residual, ours | 89.2 | 89.3 | 88.9 |",
        "| without residual, paper: mean of FGVC | 89.2 | 89.3 | 88.9 |",
        "| with residual, ours | 89.5 | 89.7 | 90.4 |",
        "| with residual, paper: mean of FGVC | 89.5 | 89.7 | 90.4 |",
    ]
    assert "## Start" not in text
    whole = ablate.tables({}, tuple(ablate.STUDIES), "test")
    assert "| identity: s_r = 0 | - | 82.4 | 85.1 | 60.8 |" in whole
    assert "| all | - | - |" in whole


def test_the_program_trains_every_variant_once_and_prints_the_tables(rlrr, tmp_path, monkeypatch):
    trained, original = [], grid.finetune
    monkeypatch.setattr(grid, "finetune", lambda config, **o: trained.append(config.out) or original(config, **o))
    images, out = make_splits(tmp_path / "images", train=6, val=3, test=3), tmp_path / "out"
    arguments = (
        *("ablate", "--model", "test_vit", "--weights", "none", "--image-size", 32, "--data", images, "--out", out),
        *("--epochs", 1, "--batch-size", 6, "--seeds", 1, "--mixed-precision", "no"),
    )
    status, printed = rlrr(*arguments, "--study", "form,layers")
    assert status == 0, printed
    names = ("both", "additive", "attention", "mlp", "qkv")
    assert trained == [out / name / "seed-42" for name in names]
    results = {name: json.loads((out / name / "seed-42" / "result.json").read_text()) for name in names}
    text = (out / "ablation.md").read_text()
    for name, title in (("both", "all"), ("attention", "attention"), ("mlp", "MLPs"), ("additive", "W + s_r s_c")):
        count, accuracy = results[name]["trained_parameters"], 100 * results[name]["test"]["accuracy"]
        assert f"| {title} | {count:,} | {accuracy:.1f} |" in text
    assert results["both"]["trained_parameters"] == results["additive"]["trained_parameters"]
    assert results["qkv"]["adapter_parameters"] < results["attention"]["adapter_parameters"]
    assert "## Form" in printed
    rows = json.loads((out / "ablation.json").read_text())
    assert {row["variant"]: row["accuracy"] for row in rows} == {
        name: result["test"]["accuracy"] for name, result in results.items()
    }
    trained.clear()
    status, printed = rlrr(*arguments, "--study", "form", "--study", "layers")
    assert (status, trained) == (0, [])
    assert "## Layers" in printed


def test_a_benchmark_is_ablated_by_the_papers_settings(rlrr, tmp_path):
    for name in ("svhn", "kitti"):
        make_vtab(tmp_path / "data", name, 8, 4, 4)
    status, printed = rlrr(
        *("ablate", "--model", "test_vit", "--weights", "none", "--image-size", 32, "--out", tmp_path / "out"),
        *("--benchmark", "vtab", "--root", tmp_path / "data", "--tasks", "svhn,kitti", "--epochs", 1, "--seeds", 1),
        *("--mixed-precision", "no", "--study", "form"),
    )
    assert status == 0, printed
    rows = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [row["run"] for row in rows] == [
        f"{variant}/{name}/seed-42" for name in ("svhn", "kitti") for variant in ("both", "additive")
    ]
    assert {row["settings"]["lr"] for row in rows} == {5e-3, 3e-3}  # of the paper's table
    mean = 50 * sum(row["accuracy"] for row in rows if row["variant"] == "both")
    assert "| W ⊙ (1 + s_r s_c) | " in printed
    assert f" | {mean:.1f} |" in printed


def test_bad_input_is_told_before_any_work(rlrr, tmp_path):
    def fails(*options, text):
        status, printed = rlrr("ablate", "--model", "test_vit", "--out", tmp_path / "out", *options)
        assert status == 1
        assert printed.startswith("error:")  # no run is announced before
        assert text in " ".join(printed.split()), printed
        assert not (tmp_path / "out").exists()

    fails(text="give either --data, an image folder, or --benchmark together with --root")
    fails("--data", tmp_path, "--root", tmp_path, text="give either --data")
    fails("--data", tmp_path, "--study", "side", text="a study must be one of sides, init, layers, form; got side")
    fails("--data", tmp_path, "--seeds", 0, text="seeds must be at least 1; got 0")
    fails("--data", tmp_path / "none", text="none does not exist")
    fails("--data", tmp_path, text="holds no class folders")
    fails("--benchmark", "imagenet", "--root", tmp_path, text="imagenet")
    fails("--data", tmp_path, "--tasks", "svhn", text="tasks can be given with benchmark alone; got data")
    benchmark = "--benchmark", "vtab", "--root", tmp_path / "data"
    fails(*benchmark, "--lr", 1e-2, "--augment", "none", text="lr, augment can be given with data alone; got benchmark")
    make_vtab(tmp_path / "data", "svhn", 8, 4, 4)  # and no kitti, whose turn comes later
    fails(*benchmark, "--tasks", "svhn,kitti", text="1 of 2 datasets cannot be used")


def test_names_with_brackets_are_printed_as_they_are(rlrr, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "run_grid", lambda *_, **__: None)
    out = tmp_path / "lr[red]3e-3 a"
    status, printed = rlrr("ablate", "--model", "test_vit", "--data", tmp_path, "--out", out)
    assert status == 0
    assert str(out / "ablation.md") in printed
