"""The server over a real socket: answers, refusals, adapters that come and go, overload, and how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

pytest.importorskip("fastapi", reason="needs fastapi, of the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs prometheus-client, of the extra [serve]")
pytest.importorskip("uvicorn", reason="needs uvicorn, of the extra [serve]")

from rlrr_kernels import load_adapter
from rlrr_kernels.serve.config import ServeConfig
from rlrr_kernels.serve.images import decode
from rlrr_kernels.serve.logs import JsonFormatter
from rlrr_kernels.serve.service import Service
from rlrr_kernels.train.models.backbones import create_model
from tests.serve.client import Client, running
from tests.serve.served_adapters import MODEL, PIXELS, gif_header, png, save_folder, save_marked
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(folder):
    with running(folder, body_mb=0.2, pixels_mp=0.5) as (client, _):
        yield client


def test_the_probabilities_are_those_of_the_adapter_alone(client, folder):
    answer = client.classify("cells", **{"Content-Type": "image/png"})
    assert (answer.status, answer.json["adapter"]) == (200, "cells")
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers["x-request-id"]) == 32
    model, preprocessing = create_model(MODEL, 1, image_size=PIXELS, weights="none")
    model.reset_classifier(2)
    load_adapter(model, folder / "cells" / "adapter")
    with torch.no_grad():
        image = preprocessing.transform()(decode(png(), 1e9))
        wanted = model.eval()(image[None])[0].softmax(0).tolist()
    got = {entry["name"]: entry["probability"] for entry in answer.json["classes"]}
    assert list(got) == ["cells 0-0", "cells 0-1"]  # the most probable first
    assert list(got.values()) == pytest.approx(wanted, rel=1e-4)
    assert sum(got.values()) == pytest.approx(1)


def test_names_of_any_kind_and_the_most_probable_alone(client):
    answer = client.classify("flowers é&-?", query="&top=1")
    assert [entry["name"] for entry in answer.json["classes"]] == ["flowers é&/? 0-0"]
    assert client.classify("cells", png(kind="JPEG")).status == 200
    assert client.get("/v1/adapters").json == {
        "model": MODEL,
        "adapters": [
            {"name": "cells", "classes": ["cells 0-0", "cells 0-1"]},
            {"name": "flowers é&-?", "classes": [f"flowers é&/? 0-{i}" for i in range(3)]},
        ],
    }


REFUSED = {
    "unknown adapter": ({"adapter": "cell"}, 404, "there is no adapter 'cell'"),
    "no image": ({"adapter": "cells", "body": b"<svg/>"}, 415, "no image that is read here: JPEG"),
    "empty": ({"adapter": "cells", "body": b""}, 415, "no image that is read here"),
    "cut off": ({"adapter": "cells", "body": png((90, 90), kind="JPEG")[:-300]}, 400, "cannot read the image"),
    "PostScript": ({"adapter": "cells", "body": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, 415, "no image that is read here"),
    "many pixels": ({"adapter": "cells", "body": png((1000, 501))}, 413, "1000 x 501 = 0.5 megapixels; at most 0.5"),
    "a long row": ({"adapter": "cells", "body": png((20_000, 1))}, 413, "resize to 700000 x 35 makes 24.5 megapixels"),
    "bomb": ({"adapter": "cells", "body": gif_header(14000, 13000)}, 413, "too many pixels"),
    "many bytes": ({"adapter": "cells", "body": b"x" * 200_001}, 413, "more than 0.2 megabytes"),
    "a form": (
        {"adapter": "cells", "body": b"--x", "Content-Type": "multipart/form-data; boundary=x"},
        415,
        "not a form",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(client, case):
    request, status, reason = REFUSED[case]
    answer = client.classify(**request)
    assert (answer.status, reason in answer.json["detail"]) == (status, True), answer.json
    assert client.classify("cells").status == 200


def test_bodies_without_a_length_are_counted(client):
    def chunks(count):
        yield from (b"x" * 50_000 for _ in range(count))

    assert client.request("POST", "/v1/classify?adapter=cells", chunks(5)).status == 413
    assert client.request("POST", "/v1/classify?adapter=cells", iter([png()])).status == 200


def test_questions_of_another_form(client):
    assert client.request("POST", "/v1/classify", png()).status == 422
    assert client.classify("").status == 422
    assert client.classify("x" * 300).status == 422
    assert client.classify("cells", query="&top=0").status == 422
    assert client.get("/v1/classify?adapter=cells").status == 405
    assert client.get("/nothing").status == 404
    assert client.request("POST", "/v1/adapters/rescan").status == 403  # there is no token


def test_health_metrics_description_and_page(client):
    assert client.get("/healthz").json == {"status": "ok"}
    assert client.get("/readyz").json == {"status": "ready"}
    assert client.request("HEAD", "/healthz").status == client.request("HEAD", "/readyz").status == 200
    before = client.get("/metrics").body.decode()
    client.classify("cells")
    after = client.get("/metrics")
    assert after.headers["content-type"].startswith("text/plain; version=0.0.4")

    def value(text, name):
        values = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} ")]
        return sum(values)  # no line before the first answer of a status

    for name in ('rlrr_requests_total{status="200"}', "rlrr_request_seconds_count", "rlrr_batch_images_sum"):
        assert value(after.body.decode(), name) == value(before, name) + 1
    assert value(after.body.decode(), "rlrr_adapters") == 2
    assert value(after.body.decode(), "rlrr_open_requests") == 0
    assert value(after.body.decode(), "rlrr_adapter_bytes") > 1e5
    description = client.get("/openapi.json").json
    assert list(description["paths"]["/v1/classify"]["post"]["requestBody"]["content"]) == [
        "image/jpeg",
        "image/png",
        "image/webp",
        "application/octet-stream",
    ]
    docs = client.get("/docs").body.decode()
    assert all(path in docs for path in description["paths"])
    assert "http" not in docs.replace("HTTP", "")  # nothing from elsewhere
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"Drop an image here" in page.body


def test_a_token_is_asked_for(folder):
    with running(folder, token="secret") as (client, _):
        for token in (None, "wrong", "secret2"):
            stranger = Client(client.port, token)
            for answer in (stranger.classify("cells"), stranger.get("/v1/adapters")):
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert stranger.request("POST", "/v1/adapters/rescan").status == 401
            assert {stranger.get(path).status for path in ("/", "/docs", "/healthz", "/readyz", "/metrics")} == {200}
        for given, status in (("bearer secret", 200), ("BEARER  secret", 200), ("Basic secret", 401), ("secret", 401)):
            assert Client(client.port).get("/v1/adapters", Authorization=given).status == status
        assert client.classify("cells").status == 200
        assert client.request("POST", "/v1/adapters/rescan").status == 200


def test_adapters_come_change_and_go_at_a_rescan(folder, tmp_path):
    root = tmp_path / "adapters"
    shutil.copytree(folder / "cells", root / "cells")
    with running(root, token="t") as (client, service):
        rescan = lambda: client.request("POST", "/v1/adapters/rescan").json  # noqa: E731
        nothing = {"added": [], "swapped": [], "removed": [], "failed": {}}
        assert rescan() == nothing
        save_marked(root / "new", "new", 4)
        save_marked(root / "cells" / "adapter", "cells", 3, version=1)
        save_marked(root / "other size", "other size", pixels=48)
        damaged = save_marked(root / "damaged", "damaged")
        (damaged / "adapter.safetensors").write_bytes(b"no")
        changes = rescan()
        assert (changes["added"], changes["swapped"], changes["removed"]) == (["new"], ["cells"], [])
        assert "trained at 48 pixels; the server's backbone takes 32" in changes["failed"]["other size"]
        assert "is truncated or no safetensors file" in changes["failed"]["damaged"]
        assert client.classify("cells").json["classes"][0]["name"] == "cells 1-0"
        assert client.classify("new").json["classes"][0]["name"] == "new 0-0"
        assert client.classify("other size").status == 404
        save_marked(root / "cells" / "adapter", "cells", 3, version=2, pixels=48)
        assert list(rescan()["failed"]) == ["cells", "damaged", "other size"]
        assert client.classify("cells").json["classes"][0]["name"] == "cells 1-0"  # the old version stays
        shutil.rmtree(root / "new")
        shutil.rmtree(root / "other size")
        shutil.rmtree(root / "damaged")
        save_marked(root / "cells" / "adapter", "cells", 3, version=1)
        assert rescan() == {**nothing, "removed": ["new"], "swapped": ["cells"]}
        assert client.classify("new").status == 404
        root.rename(tmp_path / "elsewhere")
        assert client.request("POST", "/v1/adapters/rescan").status == 500
        assert client.classify("cells").status == 200
        assert service.bank.names == ("cells",)


PEFT_CONFIGS = {
    "array": "[]",
    "null": "null",
    "text": '"x"',
    "types": '{"peft_type": 5, "r": "x"}',
    "targets": '{"peft_type": "RLRR", "r": [1], "target_modules": 5}',
    "deep": "[" * 100_000,
    "latin": "\xff",
}


def test_odd_folders_are_reported_and_leave_the_rest_alone(folder, tmp_path, monkeypatch):
    root = tmp_path / "adapters"
    shutil.copytree(folder / "cells", root / "cells")
    for name, text in PEFT_CONFIGS.items():
        odd = root / f"a {name}"
        odd.mkdir()
        (odd / "adapter_config.json").write_bytes(text.encode("latin-1"))
        shutil.copy(root / "cells" / "adapter" / "adapter.safetensors", odd / "adapter_model.safetensors")
    (root / "lost+found").mkdir()
    (root / "a loop" / "adapter").mkdir(parents=True)
    (root / "a loop" / "adapter" / "adapter.safetensors").symlink_to("adapter.safetensors")
    name = "caf\udce9"
    with contextlib.suppress(OSError, UnicodeError):  # macOS has Unicode names alone
        shutil.copytree(root / "cells", root / name)
    save_marked(root / "surrogate", "caf\udce9")
    odd = {path.name for path in root.iterdir()} - {"cells"}
    look = os.stat

    def refusing(path, *args, **options):
        if "lost+found/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return look(path, *args, **options)

    monkeypatch.setattr(os, "stat", refusing)  # root may look anywhere
    with running(root, token="t") as (client, _):
        failed = client.request("POST", "/v1/adapters/rescan").json["failed"]
        assert failed.keys() == {name.encode(errors="backslashreplace").decode() for name in odd}
        assert all(failed.values())
        assert "Permission denied" in failed["lost+found"]
        assert failed.get("caf\\udce9", "is no Unicode text: caf\\udce9").endswith("is no Unicode text: caf\\udce9")
        assert "a name of its classes is no Unicode text" in failed["surrogate"]
        assert [entry["name"] for entry in client.get("/v1/adapters").json["adapters"]] == ["cells"]
        assert client.classify("cells").status == 200


def test_mixed_requests_share_batches_and_get_their_own_answers_while_adapters_swap(folder, tmp_path):
    names = [f"task {i}" for i in range(6)]
    versions = [tmp_path / str(version) for version in range(2)]
    for version, path in enumerate(versions):
        for name in names:
            save_marked(path / name, name, 2 + int(name[-1]), version=version)
    root = tmp_path / "served"
    shutil.copytree(versions[0], root)
    size = sum(path.stat().st_size for path in (root / names[0]).iterdir())
    with running(root, memory_mb=3.5 * size / 1e6, latency_ms=20.0) as (client, service):
        failures, answered = [], [0]

        def ask(seed):
            draw = random.Random(seed)
            for _ in range(12):
                name = draw.choice(names)
                answer = client.classify(name)
                classes = answer.json.get("classes", [])
                whose = {entry["name"].rpartition(" ")[0] for entry in classes}
                if answer.status != 200 or whose != {name} or not classes[0]["name"].endswith("-0"):
                    failures.append((name, answer.status, answer.json))
                answered[0] += 1

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for turn in range(1, 5):
            for name in names[:3]:
                shutil.copytree(versions[turn % 2] / name, root / name, dirs_exist_ok=True)
            service.rescan()
        for thread in threads:
            thread.join()
        assert not failures, failures[:3]
        assert answered[0] == 72
        text = client.get("/metrics").body.decode()
        batches = float(
            next(line for line in text.splitlines() if line.startswith("rlrr_batch_images_count")).split()[1]
        )
        assert batches < 72


def test_too_many_open_requests_are_told_when_to_come_again(folder, monkeypatch):
    gate = threading.Event()
    compute = Service._run
    monkeypatch.setattr(Service, "_run", lambda *args: (gate.wait(20), compute(*args))[1])
    with running(folder, queue=2, timeout=10.0) as (client, service):
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(client.classify("cells"))) for _ in range(2)]
        for thread in threads:
            thread.start()
        while service._open < 2:
            time.sleep(0.005)
        refused = client.classify("cells")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "2 requests are open" in refused.json["detail"]
        assert client.get("/readyz").status == 200
        gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200, 200]
        assert client.classify("cells").status == 200


def test_an_unknown_adapter_is_compared_with_none(folder, monkeypatch):
    """With thousands of names that would hold up all other requests."""
    compared = []
    monkeypatch.setattr("difflib.get_close_matches", lambda *args, **options: compared.append(args) or [])
    with running(folder) as (client, _):
        assert client.classify("cell").status == 404
    assert not compared


def test_what_takes_too_long_ends(folder, monkeypatch):
    compute = Service._run
    monkeypatch.setattr(Service, "_run", lambda *args: (time.sleep(1), compute(*args))[1])
    with running(folder, timeout=0.5) as (client, service):
        late = client.classify("cells")
        assert (late.status, late.headers["retry-after"]) == (503, "1")

        def slowly():
            yield png()[:20]
            time.sleep(1)
            yield png()[20:]

        assert client.request("POST", "/v1/classify?adapter=cells", slowly()).status == 408
        assert service._open == 0


def test_a_reader_that_is_stuck_keeps_its_request_open_and_is_not_waited_for(folder, monkeypatch):
    gate, entered = threading.Event(), threading.Event()

    def slow(data, most):
        entered.set()
        gate.wait(20)
        return decode(data, most)

    monkeypatch.setattr("rlrr_kernels.serve.service.decode", slow)
    with running(folder, readers=1, queue=1, timeout=1.0, shutdown_timeout=0.2) as (client, service):
        assert client.classify("cells").status == 503
        assert service._open == 1
        assert "1 requests are open" in client.classify("cells").json["detail"]
        while (ready := client.get("/readyz")).status == 200:
            time.sleep(0.01)
        assert (ready.status, "every reader is busy" in ready.json["detail"]) == (503, True)
        assert client.get("/healthz").status == 200
        gate.set()
        while service._open:
            time.sleep(0.001)
        assert client.classify("cells").status == client.get("/readyz").status == 200
        gate.clear()
        entered.clear()
        assert client.classify("cells").status == 503
        assert entered.is_set()
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    gate.set()


def test_evicted_adapters_that_are_gone_are_the_servers_fault(folder, tmp_path):
    root = tmp_path / "adapters"
    shutil.copytree(folder, root)
    with running(root, memory_mb=0.3) as (client, _):  # there is room for one
        assert client.classify("cells").status == client.classify("flowers é&-?").status == 200
        shutil.rmtree(root / "cells")
        answer = client.classify("cells")
        assert (answer.status, answer.json["detail"]) == (500, "the adapter 'cells' cannot be read")
        assert client.classify("flowers é&-?").status == 200


def test_an_evicted_adapter_that_is_replaced_by_a_misfit_is_refused_with_the_reason(folder, tmp_path):
    root = tmp_path / "adapters"
    shutil.copytree(folder, root)
    with running(root, memory_mb=0.3, token="t") as (client, _):  # there is room for one
        for version, name, pixels, reason in (
            (1, "cells", 48, "trained at 48 pixels; the server's backbone takes 32"),
            (2, "caf\udce9", PIXELS, "a name of its classes is no Unicode text"),
        ):
            assert client.classify("flowers é&-?").status == 200  # evicts the other
            save_marked(root / "cells" / "adapter", name, 2, version=version, pixels=pixels)
            for looked_again in (False, True):
                answer = client.classify("cells")
                assert (answer.status, reason in answer.json["detail"]) == (503, True), answer.json
                assert "retry-after" in answer.headers
                assert client.classify("flowers é&-?").status == 200
                assert [entry["name"] for entry in client.get("/v1/adapters").json["adapters"]] == ["flowers é&-?"]
                if not looked_again:
                    failed = client.request("POST", "/v1/adapters/rescan").json["failed"]
                    assert reason in failed["cells"]
        save_marked(root / "cells" / "adapter", "cells", 3, version=3)
        assert client.classify("cells").json["classes"][0]["name"] == "cells 3-0"
        assert len(client.get("/v1/adapters").json["adapters"]) == 2


def test_logs_are_one_json_object_a_line(folder, caplog):
    with caplog.at_level(logging.INFO, "rlrr_kernels.serve"), running(folder) as (client, _):
        identity = client.classify("cells\n\x1b[31m").headers["x-request-id"]
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    entry = next(line for line in lines if line.get("id") == identity)
    assert (entry["event"], entry["status"], entry["path"]) == ("request", 404, "/v1/classify")
    assert entry["ms"] > 0
    assert not any("\n" in JsonFormatter().format(record) for record in caplog.records)
    assert lines[-1]["event"] == "stopped"
    assert lines[-1]["finished"] is True


def test_nothing_to_serve_is_said_before_the_start(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder of adapters .* does not exist"):
        Service(ServeConfig(adapters=tmp_path / "missing"))
    with pytest.raises(ValueError, match="says which backbone it is for; name it with --model"):
        Service(ServeConfig(adapters=tmp_path))
    with pytest.raises(ValueError, match=f"can be served by {MODEL}: there is none"):
        Service(ServeConfig(adapters=tmp_path, model=MODEL, weights="none", image_size=PIXELS))
    save_marked(tmp_path / "a", "a", pixels=48)
    with pytest.raises(ValueError, match=r"can be served by .*\n  a: it was trained at 48 pixels"):
        Service(ServeConfig(adapters=tmp_path, image_size=PIXELS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency_ms": -1.0}, "latency_ms must be at least 0"),
        ({"queue": 0}, "queue must be at least 1"),
        ({"pixels_mp": 0.0}, "pixels_mp must be above 0"),
        ({"port": 70_000}, "port must be from 0 to 65535"),
        ({"headers_timeout": 0.0}, "headers_timeout must be above 0"),
        ({"timeout": "soon"}, "timeout must be a number"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(adapters=tmp_path, **options)


def test_a_token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text("abc-123\n")
    assert ServeConfig(adapters=tmp_path, token_file=file).token() == "abc-123"
    for text in (b"two words", b"", b"\xff\xfea", "\ufeffabc".encode(), b"a\xa0", b"a\x00"):
        file.write_bytes(text)
        with pytest.raises(ValueError, match="one token of printable ASCII"):
            ServeConfig(adapters=tmp_path, token_file=file).token()


@pytest.mark.slow
def test_the_command_looks_again_on_sighup_and_finishes_on_sigterm(folder, tmp_path):
    root, port = tmp_path / "adapters", 18_000 + os.getpid() % 10_000
    shutil.copytree(folder / "cells", root / "cells")
    command = [sys.executable, "-m", "rlrr_kernels.cli", "serve", "--adapters", root, "--cpu", "--port", str(port)]
    command += ["--latency-ms", "1500", "--image-size", str(PIXELS)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        client, lines = Client(port), []
        for line in process.stderr:
            lines.append(json.loads(line))
            if "running on" in lines[-1]["event"]:
                break
        save_marked(root / "new", "new")
        process.send_signal(signal.SIGHUP)
        for line in process.stderr:
            lines.append(json.loads(line))
            if lines[-1]["event"] == "adapters":
                break
        assert (lines[-1]["added"], lines[-1]["served"]) == (1, 2)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(client.classify("new")))
        thread.start()
        time.sleep(0.5)  # it waits for others to share its batch
        process.send_signal(signal.SIGTERM)
        thread.join()
        lines += [json.loads(line) for line in process.stderr]
    assert answers[0].status == 200
    assert {"event": "stopped", "finished": True}.items() <= next(x for x in lines if x["event"] == "stopped").items()
