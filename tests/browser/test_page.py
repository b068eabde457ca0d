"""The status page in headless Chromium, over the embedded model: read, asked, traced, by keyboard.

``make test-browser`` runs these. They need Chromium, which no Python package brings, and so are no
part of ``make test``. With NSA_SERVE_SCREENSHOTS=FOLDER they leave pictures there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from nsa_serve.config import NSA_MODEL
from nsa_serve.models.config import NSAConfig
from tests.checkpoints import nsa_config_json
from tests.server_process import ServerProcess, running, write_small_model

SECONDS = 120_000  # ms that a slow machine may take to answer
KEY = "a-key-for-the-page"
STORY = "The ferry to Bregenz left at seven, and the fishermen of Lindau mended their nets. " * 90
TIER = ("--kv-cache-memory-bytes", "600000", "--kv-host-memory-bytes", "4MiB")
QUESTION = f"{STORY}\nThe code of the day is 4711.\n{STORY[:1500]}\nWhat is the code of the day?"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that a container's root has not.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    flags = (NSA_MODEL, "--kv-cache-memory-bytes", "512M", "--max-num-seqs", "8")
    with running(*flags) as server:
        yield server.url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose console stays clean and that asks nobody but its server."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(SECONDS)
    complaints: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(re.sub(r"(\w+://[^/]+).*", r"\1", request.url)))
    yield page
    origin = re.sub(r"(\w+://[^/]+).*", r"\1", page.url)
    page.close()
    # What the browser says of a refused key or a server that is gone is its own business.
    assert [text for text in complaints if "Failed to load resource" not in text] == []
    assert {host for host in hosts if not host.startswith("data:")} == {origin}


def opened(page: Page, url: str) -> None:
    page.goto(url)
    page.locator("#content").wait_for()


def ask(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def answered(page: Page) -> None:
    expect(page.locator("#chat-note")).to_contain_text("prompt tokens", timeout=SECONDS)


def test_the_page_tells_what_is_loaded_and_the_chat_streams(page: Page, url: str) -> None:
    opened(page, url)
    expect(page.locator("#model")).to_have_text(NSA_MODEL)
    expect(page.locator("#state")).to_have_text("serving")
    lengths = page.evaluate(
        """() => { window.lengths = [];
        new MutationObserver(() => window.lengths.push(
            document.querySelector("#log").textContent.length))
        .observe(document.querySelector("#log"), {subtree: true, childList: true}); }"""
    )
    ask(page, "What is the capital of France?")
    answered(page)
    expect(page.locator(".turn.assistant")).to_contain_text("Paris")
    lengths = page.evaluate("window.lengths")
    assert len(set(lengths)) > 4, "the answer came in one piece"
    expect(page.locator("#first-token")).not_to_have_text("–")
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile(r"free [\d,]+"))


def test_a_traced_answer_is_explored_with_the_keyboard(page: Page, url: str) -> None:
    opened(page, url)
    page.focus("#want-trace")
    page.keyboard.press("Space")
    ask(page, QUESTION)
    page.locator("#trace").wait_for()
    page.focus("#trace-map")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#trace-cell")).to_contain_text("Layer 0, KV head 0, block 0 (prompt")
    expect(page.locator("#trace-text")).to_contain_text("ferry to Bregenz")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#trace-cell")).to_contain_text("Layer 1, KV head 0, block 1")
    page.focus("#trace-token")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#trace-which")).to_contain_text("1:")
    expect(page.locator("#trace-cell")).to_contain_text("this token")
    expect(page.locator("#gates polyline")).to_have_count(3)


def test_pointing_at_a_block_shows_its_text(page: Page, url: str) -> None:
    opened(page, url)
    page.check("#want-trace")
    ask(page, QUESTION)
    page.locator("#trace").wait_for()
    box = page.locator("#trace-map").bounding_box()
    assert box is not None
    page.hover("#trace-map", position={"x": 35, "y": 20})
    expect(page.locator("#trace-cell")).to_contain_text("Layer 0, KV head 0, block 0")
    page.hover("#trace-map", position={"x": box["width"] - 6, "y": 20})
    expect(page.locator("#trace-cell")).to_contain_text("answer, from token")


def test_without_a_host_tier_nothing_is_said_of_it(page: Page, url: str) -> None:
    opened(page, url)
    expect(page.locator("#host-tier")).to_be_hidden()
    expect(page.locator("#map-legend .shared")).to_have_count(1)
    expect(page.locator("#map-legend .host")).to_have_count(0)


def test_a_host_tier_is_told_of_where_there_is_one(page: Page, tmp_path: Path) -> None:
    model = str(write_small_model(tmp_path))
    flags = ("--attention", "nsa", "--load-format", "dummy", "--max-num-seqs", "4")
    with running(model, *flags, *TIER, "--max-num-batched-tokens", "64") as server:
        opened(page, server.url)
        for story in range(4):
            body = {"prompt": f"{story} " * 900, "max_tokens": 4, "ignore_eos": True}
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)
        expect(page.locator("#host-facts")).to_contain_text(re.compile(r"there alone[1-9]"))
        expect(page.locator("#map-legend")).to_contain_text(re.compile(r"in host memory [1-9]"))


def test_gates_that_were_never_learned_are_told_and_not_drawn(page: Page, tmp_path: Path) -> None:
    flags = ("--attention", "nsa", "--load-format", "dummy", "--max-model-len", "128")
    with running(str(write_small_model(tmp_path)), *flags) as server:
        opened(page, server.url)
        page.check("#want-trace")
        ask(page, "What stands open?")
        page.locator("#trace").wait_for()
        expect(page.locator("#gates-note")).to_contain_text("no learned gates")


def test_learned_gates_are_drawn_by_layer(page: Page, tmp_path: Path) -> None:
    config = json.loads((write_small_model(tmp_path) / "config.json").read_text())
    gated = nsa_config_json(NSAConfig(gated=True))["nsa"]
    config |= {"model_type": "nsa_serve", "num_hidden_layers": 3, "nsa": gated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ("--load-format", "dummy", "--max-model-len", "128")
    with running(str(tmp_path), *flags) as server:
        opened(page, server.url)
        page.check("#want-trace")
        ask(page, "What stands open?")
        page.locator("#trace").wait_for()
        expect(page.locator("#gates polyline")).to_have_count(3)
        expect(page.locator("#gates-legend")).to_contain_text(re.compile(r"window 0\.\d\d"))
        assert len((page.get_attribute("#gates .cmp", "points") or "").split()) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_is_wider_than_the_window(
    browser: Browser, url: str, scheme: str, width: int, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(SECONDS)
    opened(page, url)
    page.check("#want-trace")
    ask(page, QUESTION)
    page.locator("#trace").wait_for()
    answered(page)
    page.focus("#trace-map")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", ground)[0])
    assert red > 200 if scheme == "light" else red < 60
    folder = Path(os.environ.get("NSA_SERVE_SCREENSHOTS", tmp_path))
    path = folder / f"status-page-{scheme}-{width}.png"
    page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 10_000
    page.close()


def test_the_tab_key_visits_everything_in_the_order_of_the_page(page: Page, url: str) -> None:
    opened(page, url)
    visited = []
    for _ in range(12):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(
            """() => { const e = document.activeElement;
            return [e.id || e.className, getComputedStyle(e).outlineStyle !== "none"]; }"""
        )
        if name in visited or not name:
            break
        visited.append(name)
        assert outlined, f"the focus is not seen on {name}"
    assert visited == ["skip", "log", "message", "want-trace", "temperature", "clear", "send"]


def test_an_answer_can_be_stopped(page: Page, url: str) -> None:
    opened(page, url)
    ask(page, "Write a very long story about a lighthouse, with many chapters.")
    expect(page.locator(".turn.assistant span:nth-child(2)")).not_to_be_empty(timeout=SECONDS)
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator(".turn.failed")).to_have_count(0)


def test_a_server_with_a_key_shows_nothing_before_it_is_given(page: Page) -> None:
    with running("--attention", "nsa", "--max-model-len", "1024", "--api-key", KEY) as server:
        page.goto(server.url)
        page.locator("#key").wait_for()
        assert page.locator("#facts").text_content() == ""
        page.fill("#key-input", "wrong")
        page.press("#key-input", "Enter")
        expect(page.locator("#key-hint")).to_contain_text("not valid")
        page.fill("#key-input", KEY)
        page.press("#key-input", "Enter")
        page.locator("#content").wait_for()
        assert KEY in page.evaluate("Object.values(sessionStorage)")
        assert page.evaluate("localStorage.length") == 0
        assert page.context.cookies() == []
        ask(page, "What is the capital of France?")
        answered(page)
        _stop_and_see(page, server)


def _stop_and_see(page: Page, server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/status").status_code == 401
    server.stop()
    expect(page.locator("#state")).to_have_text("not answering")
