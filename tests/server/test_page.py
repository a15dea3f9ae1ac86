"""The page at `/`: used as a person does, in headless Chromium, and its parts without one."""

from __future__ import annotations

import html.parser
import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers_browser import CHROMIUM, Browser, browsing
from helpers_server import TOKEN, Shop, ask, png
from PIL import Image

from pipeline.reports.overlay_figure import colours_of, overlaid
from pipeline.server.engine import Engine
from pipeline.serving.predictor import Predictor

Served = tuple[str, Engine]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    path.write_bytes(png(1))
    return path


def enter(browser: Browser, url: str) -> None:
    """Open the page and give the token, by keyboard."""
    browser.events.clear()
    browser.call("Page.navigate", url=url)
    browser.wait("document.activeElement?.id === 'token'")
    assert browser.run("document.getElementById('status').textContent").endswith("needs a token.")
    browser.call("Input.insertText", text=TOKEN)
    browser.press("Enter", "\r")
    browser.wait("document.querySelectorAll('#tasks input').length >= 3")


def answers(browser: Browser) -> list[list[str]]:
    """The rows of the table, once the last request is answered."""
    browser.wait("/ in [0-9]+ ms, of which the server took/.test(document.body.innerText)")
    rows = "[...document.querySelectorAll('#answers tbody tr')]"
    found: list[list[str]] = browser.run(
        f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return found


def expected(shop: Shop, tasks: list[str], image: Path) -> list[list[str]]:
    rows = []
    for task in tasks:
        [row] = Predictor(shop.packs[task], shop.backbone, "cpu").predict([image])
        size = next(pack.size_bytes for pack in shop.registry.search(task))
        rows.append([task, row["label"], f"{100 * row['probability']:.1f} %", f"{size:,}"])
    return rows


@needs_chromium
def test_a_person_with_a_keyboard_gets_answers(
    shop: Shop, served: Served, browser: Browser, image: Path, tmp_path: Path
) -> None:
    enter(browser, served[0])
    browser.run("document.getElementById('image').focus()")
    browser.choose_file("#image", image)
    browser.wait("document.getElementById('preview').naturalWidth === 40")
    reached = []
    while "predict" not in reached:
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.id || document.activeElement.value"))
        if reached[-1] in ("birds", "tools"):
            browser.press(" ", " ")
        assert len(reached) < 20, reached
    assert {"filter", "all", "none", *shop.packs} <= set(reached)
    browser.press("Enter", "\r")
    found = answers(browser)
    browser.screenshot(tmp_path / "page.png")
    assert sorted(found) == expected(shop, ["birds", "tools"], image)
    refused = [event for event in browser.events if "Content Security Policy" in json.dumps(event)]
    assert refused == []


@needs_chromium
def test_a_mask_is_drawn_over_the_image(
    shop: Shop, served: Served, browser: Browser, image: Path, tmp_path: Path
) -> None:
    enter(browser, served[0])
    browser.choose_file("#image", image)
    browser.wait("document.getElementById('preview').naturalWidth === 40")
    choose = "document.querySelector('#tasks input[value=%s]').click()"
    for name in ("regions", "birds"):
        browser.run(choose % name)
    browser.run("document.getElementById('predict').click()")
    rows = answers(browser)
    browser.screenshot(tmp_path / "masks.png")
    [right] = Predictor(shop.masks["regions"], shop.maps, "cpu").predict([image])
    areas = sorted(right["areas"].items(), key=lambda each: -each[1])
    [found] = [row for row in rows if row[0] == "regions"]
    assert found[1] == ", ".join(name for name, share in areas if share)
    assert found[2] == ", ".join(f"{100 * share:.1f} %" for _, share in areas if share)
    assert [row for row in rows if row[0] == "birds"] == expected(shop, ["birds"], image)
    canvas = "document.querySelector('#masks canvas')"
    assert browser.run(f"[{canvas}.width, {canvas}.height]") == [40, 32]
    assert (
        browser.run(f"{canvas}.getAttribute('aria-label')") == "The mask of regions over the image"
    )
    data = browser.run(f"[...{canvas}.getContext('2d').getImageData(0, 0, 40, 32).data]")
    drawn = np.array(data, np.uint8).reshape(32, 40, 4)[..., :3]
    mask, pixels = (np.asarray(Image.open(each)) for each in (io.BytesIO(right["mask"]), image))
    whole = overlaid(pixels, mask, colours_of(len(right["areas"])))
    assert np.abs(drawn.astype(int) - whole).max() <= 1
    legend = "[...document.querySelectorAll('#masks li')].map((item) => item.innerText.trim())"
    names = list(right["areas"])
    assert browser.run(legend) == [names[number] for number in np.unique(mask) if number]
    refused = [event for event in browser.events if "Content Security Policy" in json.dumps(event)]
    assert refused == []


@needs_chromium
def test_images_are_dropped_and_what_is_none_is_said(
    shop: Shop, served: Served, browser: Browser, image: Path
) -> None:
    enter(browser, served[0])
    browser.run("document.getElementById('filter').value = 'FLOW'")
    browser.run("document.getElementById('filter').dispatchEvent(new Event('input'))")
    browser.run("document.getElementById('all').click()")

    def drop(content: bytes) -> None:
        browser.run(
            f"""{{
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array({list(content)})], "dropped.png"));
            const event = {{ bubbles: true, cancelable: true, dataTransfer: files }};
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", event));
            document.getElementById("predict").click();
            }}"""
        )

    drop(image.read_bytes())
    assert answers(browser) == expected(shop, ["flowers"], image)
    drop(b"<img src=x onerror=alert(1)>")
    browser.wait("document.getElementById('status').className === 'error'")
    assert "no image" in browser.run("document.getElementById('status').textContent")


@needs_chromium
def test_every_control_has_a_name_and_nothing_foreign_runs(
    served: Served, browser: Browser
) -> None:
    enter(browser, served[0])
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    seen = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in ("button", "checkbox", "searchbox", "textbox", "group", "status", "heading"):
            seen.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert {"button", "checkbox", "searchbox", "status", "heading"} <= seen.keys()
    assert all(name for role, names in seen.items() if role != "status" for name in names), seen
    assert len(seen["checkbox"]) >= 3
    browser.run(
        """{
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        const image = document.createElement("img");
        image.src = "http://127.0.0.1:9/x.png";
        image.setAttribute("onerror", "window.ran = true");
        document.body.append(image);
        }"""
    )
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("window.ran") is None
    blocked = [event for event in browser.events if "Content Security Policy" in json.dumps(event)]
    assert len(blocked) >= 2
    script = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'blocked')"
    assert browser.run(script) == "blocked"


class Parts(html.parser.HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_parts_of_the_page_need_no_token_and_agree(served: Served) -> None:
    url, _ = served
    with urllib.request.urlopen(url, timeout=30) as response:
        policy, text = response.headers["Content-Security-Policy"], response.read().decode()
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy
    tags = Parts(text).tags
    assert not [
        attrs for _, attrs in tags if any(name.startswith(("on", "style")) for name in attrs)
    ]
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    labelled = {attrs.get("for") for tag, attrs in tags if tag == "label"}
    assert {attrs["id"] for tag, attrs in tags if tag == "input"} <= labelled
    status, script = ask(f"{url}/page.js", token=None)
    assert status == 200
    assert set(re.findall(r'\bat\("(\w+)"\)', script)) <= ids
    status, masks = ask(f"{url}/masks.js", token=None)
    assert status == 200
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b"
    assert not re.search(unsafe, script + masks)
    status, style = ask(f"{url}/page.css", token=None)
    assert status == 200
    assert "url(" not in style
    assert ask(f"{url}/page.py", token=None)[0] == 401
    assert ask(f"{url}/page.py")[0] == 404


def test_the_interface_is_described_on_a_page_without_scripts(served: Served) -> None:
    url, _ = served
    status, text = ask(f"{url}/docs", token=None)
    tags = [tag for tag, _ in Parts(text).tags]
    assert (status, "script" in tags) == (200, False)
    status, described = ask(f"{url}/openapi.json")
    assert tags.count("section") == sum(map(len, described["paths"].values())) >= 7
    for part in (
        "<h2><code>POST /v1/tasks/{name}:predict</code></h2>",
        "<tr><td>limit</td><td>query</td><td>integer</td></tr>",
        "<tr><td>image</td><td>multipart/form-data</td><td>list of: string</td></tr>",
        "<td>string (An image file as base64) or {url: string} (Where the image is, if the",
        "<tr><td>429</td><td>Too much is under way; Retry-After",
    ):
        assert part in text, part
