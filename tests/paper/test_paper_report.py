"""The paper's table from results: its own numbers give its own means, and what is missing or differs is said."""

import csv
import dataclasses
import json
import re
import sys

import pytest

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("typer", reason="the program needs typer")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib")

from rlrr_kernels.cli import main
from rlrr_kernels.paper.hyperparameters import GROUPS, dataset_names
from rlrr_kernels.paper.report import build_report, headline, to_markdown
from rlrr_kernels.paper.reported import PEERS, REPORTED, reported_for, reported_models
from rlrr_kernels.paper.results import Protocol, Run, TaskResults, read_results, write_results

ORIGINAL, AUGREG = "vit_base_patch16_224.orig_in21k", "vit_base_patch16_224.augreg_in21k"


def protocol(benchmark="vtab", model=ORIGINAL, **changes):
    epochs = 110 if benchmark == "vtab" else 60
    values = Protocol(benchmark, model, "hub", "paper", "test", 224, epochs, epochs)
    return dataclasses.replace(values, **changes)


def results(accuracies, seeds=(42,), **changes):
    """TaskResults by dataset, with the same accuracy, in percent, of every seed."""
    made = protocol(**changes)
    return {
        name: TaskResults(name, made, seeds, tuple(Run(seed, value / 100, None, 9, 288_768, 60.0) for seed in seeds))
        for name, value in accuracies.items()
    }


def row(report, title):
    return next(row for row in report.rows if row.title == title)


def test_the_papers_own_numbers_give_its_own_means():
    reported = REPORTED["vtab", "ViT-B/16"]
    report = build_report(results(reported.tasks))
    assert len(report.rows) == 19 + 3 + 2
    assert all(abs(line.difference) < 1e-9 for line in report.rows if not line.is_mean)
    assert f"{row(report, 'mean over tasks').accuracy:.1f}" == "74.5"
    assert f"{row(report, 'mean over groups').accuracy:.1f}" == "76.7"
    assert row(report, "mean over groups").note == "76.75 without that rounding"
    printed = [f"{row(report, f'mean of {group}').accuracy:.1f}" for group in GROUPS]
    assert printed == ["82.6", "85.8", "61.8"]
    assert all(abs(row(report, f"mean of {group}").difference) < 1e-9 for group in GROUPS)
    assert row(report, "mean over tasks").reported == 74.5
    assert row(report, "mean over groups").reported == 76.7
    text = to_markdown(report)
    assert "| **mean over tasks** | **74.5** | **1** | **74.5** | **+0.0** |" in text
    assert "| **mean over groups** | **76.7** | **1** | **76.7** | **+0.0** |" in text


@pytest.mark.parametrize("unclear", [82.0, 83.0])
def test_augreg_numbers_too(unclear):
    reported = REPORTED["vtab", "ViT-B/16 AugReg"]
    assert len(reported.tasks) == 18  # one figure of the paper could not be read for certain
    report = build_report(results(reported.tasks | {"dsprites_loc": unclear}, model=AUGREG))
    assert report.reported is reported
    assert f"{row(report, 'mean over tasks').accuracy:.1f}" == "75.1"
    assert f"{row(report, 'mean over groups').accuracy:.1f}" == "77.5"
    assert row(report, "dSpr-Loc").reported is None
    assert row(report, "mean of Structured").reported is None
    large = build_report(results({"cifar": 80.0}), "ViT-L/16")
    assert row(large, "mean over tasks").note == "partial: 1 of 19 datasets"
    assert row(large, "CIFAR-100").reported is None
    full = build_report(results(dict.fromkeys(dataset_names("vtab"), 80.0)), "ViT-L/16")
    assert row(full, "mean of Natural").difference == pytest.approx(80 - 83.9)


@pytest.mark.parametrize(("model", "mean"), [("ViT-B/16", 90.5), ("ViT-B/16 AugReg", 91.0)])
def test_fgvc(model, mean):
    reported = REPORTED["fgvc", model]
    report = build_report(results(reported.tasks, benchmark="fgvc"), model)
    assert [line.title for line in report.rows] == ["CUB", "NABirds", "Flowers", "Dogs", "Cars", "mean over tasks"]
    assert round(report.rows[-1].accuracy, 1) == mean
    assert report.rows[-1].reported == {"ViT-B/16": 90.4, "ViT-B/16 AugReg": 91.0}[model]


def test_printed_group_means_agree_with_printed_means_over_tasks():
    for model in ("ViT-L/16", "ViT-H/14", "Swin-B"):
        reported = REPORTED["vtab", model]
        natural, specialized, structured = (reported.groups[group] for group in GROUPS)
        assert round((7 * natural + 4 * specialized + 8 * structured) / 19, 1) == reported.over_tasks
    assert dict(PEERS)["full fine-tuning"] == 65.6


def test_the_row_to_compare_with_follows_the_backbone():
    for name, model in (
        (ORIGINAL, "ViT-B/16"),
        (AUGREG, "ViT-B/16 AugReg"),
        ("vit_large_patch16_224.augreg_in21k", "ViT-L/16"),
        ("vit_huge_patch14_224.orig_in21k", "ViT-H/14"),
        ("swin_base_patch4_window7_224.ms_in22k", "Swin-B"),
    ):
        assert reported_for("vtab", name).model == model
    assert reported_for("vtab", "vit_small_patch14_dinov2.lvd142m") is None
    assert reported_for("fgvc", "swin_base_patch4_window7_224") is None
    assert reported_models("fgvc") == ["ViT-B/16", "ViT-B/16 AugReg"]
    with pytest.raises(ValueError, match="reports nothing on fgvc for 'Swin-B'; it does for ViT-B/16, ViT-B/16 AugReg"):
        reported_for("fgvc", AUGREG, "Swin-B")


def test_spread_is_over_seeds():
    tasks = results(dict.fromkeys(dataset_names("vtab"), 50.0), seeds=(42, 43))
    for name, values in tasks.items():
        runs = tuple(dataclasses.replace(run, test_accuracy=0.5 + 0.01 * (run.seed - 42)) for run in values.runs)
        tasks[name] = dataclasses.replace(values, runs=runs)
    report = build_report(tasks)
    assert row(report, "KITTI-Dist").accuracy == pytest.approx(50.5)
    assert row(report, "KITTI-Dist").spread == pytest.approx(2**-0.5)
    assert row(report, "mean over tasks").spread == pytest.approx(2**-0.5)  # all tasks move together here
    assert "50.5 ± 0.7" in to_markdown(report)


def test_what_is_missing_is_shown_and_means_are_partial():
    tasks = results({"cifar": 70.0, "kitti": 80.0}, seeds=(42, 43, 44), split="honest", epoch_chosen_on="validation")
    tasks["cifar"] = dataclasses.replace(tasks["cifar"], runs=tasks["cifar"].runs[:2], note="a note of its own")
    tasks["svhn"] = dataclasses.replace(tasks["cifar"], dataset="svhn", runs=(), note=None)
    report = build_report(tasks)
    assert row(report, "CIFAR-100").note == "a note of its own; 2 of 3 seeds"
    assert (row(report, "SVHN").accuracy, row(report, "SVHN").note) == (None, "missing")
    mean = row(report, "mean over tasks")
    assert mean.accuracy == pytest.approx(75)
    assert (mean.note, mean.reported, mean.difference) == ("partial: 2 of 19 datasets", None, None)
    assert row(report, "mean of Specialized").note == "missing"
    assert row(report, "mean over groups").note.startswith("partial: 2 of 19 datasets")
    assert row(report, "mean over groups").reported is None
    assert "the epoch is chosen on the validation images" in "\n".join(headline(report))


def test_report_writes_markdown_csv_and_picture(monkeypatch, capsys, tmp_path):
    tasks = results(REPORTED["fgvc", "ViT-B/16"].tasks | {"NABirds": 80.0}, benchmark="fgvc", epochs=2)
    del tasks["StanfordCars"]
    for values in tasks.values():
        write_results(tmp_path / "results", values)
    assert read_results(tmp_path) == tasks
    monkeypatch.setattr(sys, "argv", ["rlrr", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = " ".join("".join(capsys.readouterr()).split())
    for text in ("TRIAL: 2 epochs in place of the paper's 60", "optimistic score", "report.md", "missing", "-4.7"):
        assert text in printed
    markdown = (tmp_path / "report.md").read_text()
    assert "| FGVC | NABirds | 80.0 | 1 | 84.7 | -4.7 |  |" in markdown
    assert "TRIAL" in markdown
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [line["dataset"] for line in rows][-2:] == ["Cars", "mean over tasks"]
    assert float(rows[1]["difference"]) == pytest.approx(-4.7)
    assert (rows[4]["accuracy"], rows[4]["note"]) == ("", "missing")
    assert {(line["split"], line["epoch chosen on"], line["epochs"]) for line in rows} == {("paper", "test", "2")}
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_bad_results_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no results"):
        read_results(tmp_path)
    tasks = results({"cifar": 70.0, "kitti": 80.0})
    write_results(tmp_path, tasks["cifar"])
    honest = dataclasses.replace(tasks["kitti"], protocol=protocol(split="honest"))
    file = write_results(tmp_path, honest)
    with pytest.raises(
        ValueError, match=r"cifar and kitti in .* do not belong in one table: split 'paper' and 'honest'"
    ):
        read_results(tmp_path)
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"kitti\.json is damaged or no results file"):
        read_results(tmp_path)
    text = write_results(tmp_path, tasks["kitti"]).read_text()
    for entry, message in (
        ('"test_accuracy": ', "test_accuracy must be a number; got 'x"),
        ('"epochs": ', "epochs must be"),
    ):
        file.write_text(re.sub(f"{entry}([0-9.]+)", rf'{entry}"x\1"', text, count=1))
        with pytest.raises(ValueError, match=rf"kitti\.json is damaged or no results file .*: {message}"):
            read_results(tmp_path)
    file.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="it is of another format or version"):
        read_results(tmp_path)
    write_results(tmp_path, dataclasses.replace(tasks["kitti"], dataset="kiti"))
    file.unlink()
    with pytest.raises(ValueError, match=r"kiti\.json is of 'kiti', which is no dataset of vtab"):
        read_results(tmp_path)
