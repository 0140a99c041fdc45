"""The page in a browser: a task is chosen, an image dropped, its classes shown; and what it does without."""

from __future__ import annotations

import base64
import shutil

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, of the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs prometheus-client, of the extra [serve]")
pytest.importorskip("uvicorn", reason="needs uvicorn, of the extra [serve]")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which no extra has")

from tests.serve.client import running
from tests.serve.served_adapters import png, save_marked

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the path"),
]

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

DROP = """(element, data) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0)), moved = new DataTransfer();
    moved.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
    for (const kind of ["dragenter", "dragover", "drop"])
        element.dispatchEvent(new DragEvent(kind, { dataTransfer: moved, bubbles: true, cancelable: true }));
}"""


@pytest.fixture
def page(tmp_path):
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
        yield page
        context.close()


@pytest.fixture
def adapters(tmp_path):
    root = tmp_path / "adapters"
    for name, classes in (("cells", 2), ("flowers <b>", 4)):
        save_marked(root / name, name, classes)
    return root


def shown(page):
    page.wait_for_selector("#answer[aria-busy=false] li")
    return [entry.split("\n") for entry in page.locator("#answer li").all_inner_texts()]


def test_an_image_is_dropped_and_a_task_chosen(page, adapters, tmp_path):
    with running(adapters) as (client, _):
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.wait_for_selector("#task option >> nth=1", state="attached")
        assert page.locator("#task option").all_inner_texts() == ["cells", "flowers <b>"]
        assert "2 tasks" in page.locator("main").inner_text()
        page.locator("#drop").evaluate(DROP, base64.b64encode(png()).decode())
        classes = shown(page)
        assert [line[0] for line in classes] == ["cells 0-0", "cells 0-1"]
        assert sum(float(line[1].rstrip(" %")) for line in classes) == pytest.approx(100, abs=0.2)
        assert page.locator("#preview").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [40, 50]
        page.select_option("#task", "flowers <b>")
        page.wait_for_selector("text=flowers <b> 0-3")
        assert len(shown(page)) == 4
        (tmp_path / "note.txt").write_text("no image")
        page.set_input_files("#file", tmp_path / "note.txt")
        page.wait_for_selector("#answer .problem")
        assert "no image that is read here" in page.locator("#answer").inner_text()
        page.complaints = [text for text in page.complaints if "415" not in text]
        assert not page.complaints
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
    page.wait_for_selector("text=The server cannot be reached")


def test_the_page_is_usable_without_a_mouse_and_by_readers(page, adapters):
    with running(adapters) as (client, _):
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.wait_for_selector("#task option >> nth=1", state="attached")
        assert page.get_by_label("Task", exact=True).first.evaluate("field => field.id") == "task"
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.locator("#answer").get_attribute("aria-live") == "polite"
        reached = []
        for _ in range(4):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
        assert [name for name in reached if name] == ["task", "file"]
        sizes = """() => [...document.querySelectorAll("h1, p, label, a")].map(e => getComputedStyle(e).fontSize)"""
        assert all(float(size.rstrip("px")) >= 14 for size in page.evaluate(sizes))


def test_a_token_is_asked_for_and_kept_in_the_page_alone(page, adapters):
    with running(adapters, token="secret") as (client, _):
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.wait_for_selector("text=Enter the token")
        page.fill("#token", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#task option >> nth=1", state="attached")
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
        assert [line[0] for line in shown(page)] == ["cells 0-0", "cells 0-1"]
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_many_tasks_are_searched_by_name(page, adapters):
    for i in range(60):
        shutil.copytree(adapters / "cells", adapters / f"task {i:02}")
    with running(adapters) as (client, _):
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.wait_for_selector("#name", state="visible")
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
        page.fill("#name", "task 17")
        page.keyboard.press("Enter")
        assert [line[0] for line in shown(page)] == ["cells 0-0", "cells 0-1"]
