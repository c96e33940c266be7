"""The page of the server, in a real browser: both answers, eta, keyboard, widths, colours, errors."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Request, Route, expect, sync_playwright

from cfvit import Predictor, eval_transform, load, open_image
from cfvit.deploy import Settings
from cfvit.deploy.server import create_app
from cfvit.plots.explain import Explanation, explain

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser: install Debian's package chromium")
expect.set_options(timeout=20_000)


@dataclasses.dataclass
class Served:
    """A server at an address, and what it should answer for two of its photos."""

    address: str
    service: Any
    predictor: Predictor
    easy: tuple[bytes, Explanation]
    hard: tuple[bytes, Explanation]


@pytest.fixture(scope="module")
def served(colour_model: Path, colours: Path) -> Iterator[Served]:
    predictor = Predictor(load(colour_model), compile=False)
    transform = eval_transform(predictor.model.data_config)
    photos = [path.read_bytes() for path in sorted((colours / "val").rglob("*.png"))]
    shown = explain(
        predictor.engine, torch.stack([transform(open_image(photo)) for photo in photos]), predictor.threshold
    )
    easy, hard = (
        next((p, e) for p, e in zip(photos, shown, strict=True) if e.stage == stage and e.answers[0] != e.answers[1])
        for stage in (0, 1)
    )
    app = create_app(predictor, Settings(name="colours"))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}/", app.state.service, predictor, easy, hard)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser.new_context()
        browser.close()


@pytest.fixture
def asked() -> list[Request]:
    """All that the page has asked for."""
    return []


@pytest.fixture
def page(served: Served, browser: BrowserContext, asked: list[Request]) -> Iterator[Page]:
    """The page, opened. At the end it has asked its own server alone, and no script of it has failed."""
    page = browser.new_page()
    failures: list[object] = []
    page.on("request", lambda request: asked.append(request))
    page.on("pageerror", lambda error: failures.append(error))
    page.goto(served.address)
    yield page
    page.close()
    assert failures == []
    assert {
        request.url for request in asked if not request.url.startswith((served.address, "data:image/png;"))
    } == set()


def choose(page: Page, photo: bytes) -> None:
    page.set_input_files("#file", [{"name": "photo.png", "mimeType": "image/png", "buffer": photo}])


def drop(page: Page, kind: str, photo: bytes) -> None:
    """Drops a photo, or pastes it."""
    page.evaluate(
        """([kind, photo]) => {
            const files = new DataTransfer();
            files.items.add(new File([Uint8Array.from(atob(photo), (c) => c.charCodeAt(0))], "photo.png"));
            const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: files, bubbles: true })
                : new ClipboardEvent("paste", { clipboardData: files, bubbles: true });
            document.body.dispatchEvent(event);
        }""",
        [kind, base64.b64encode(photo).decode()],
    )


def shows(page: Page, explanation: Explanation, stage: int) -> None:
    """Checks that one of the two answers counts."""
    label, _ = explanation.answers[stage]
    expect(page.locator("#summary em")).to_have_text(f"the {('coarse', 'fine')[stage]} stage answers")
    expect(page.locator("#label")).to_have_text(label)


def explained(page: Page, photo: tuple[bytes, Explanation]) -> None:
    choose(page, photo[0])
    shows(page, photo[1], photo[1].stage)


@needs_browser
def test_both_answers_of_a_photo_are_shown(served: Served, page: Page) -> None:
    for photo, explanation in (served.easy, served.hard):
        explained(page, (photo, explanation))
        for stage, (label, confidence) in zip(("coarse", "fine"), explanation.answers, strict=True):
            rows = page.locator(f"#{stage}-guesses li")
            expect(rows).to_have_count(3)
            expect(rows.first).to_contain_text(label)
            shown = float((rows.first.locator("span").last.text_content() or "").rstrip("%"))
            assert shown == pytest.approx(100 * confidence, abs=0.051)
        count = int(explanation.split.sum())
        expect(page.locator("#split")).to_have_attribute("aria-label", re.compile(f"{count} of 16 cells"))
        expect(page.locator("#reason")).to_contain_text(f"{explanation.answers[0][1]:.3f} sure")
        macs = served.predictor.macs
        spent = (macs.both if explanation.stage else macs.coarse) / macs.backbone
        expect(page.locator("#cost")).to_contain_text(f"{100 * spent:.0f}% of")


@needs_browser
def test_eta_answers_at_once_and_as_the_model_decides(served: Served, page: Page, asked: list[Request]) -> None:
    explained(page, served.hard)
    sent = sum(request.method == "POST" for request in asked)
    assert sent == 1
    sure = served.hard[1].answers[0][1]
    for eta in (0.0, np.floor(100 * sure) / 100, np.ceil(100 * sure) / 100, 1.0):
        page.locator("#eta").fill(f"{eta:.2f}")
        shows(page, served.hard[1], int(eta > sure or eta == 1))
    page.locator("#reset").click()
    shows(page, served.hard[1], 1)
    assert sum(request.method == "POST" for request in asked) == sent


@needs_browser
@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_photo_is_dropped_or_pasted(served: Served, page: Page, kind: str) -> None:
    drop(page, kind, served.easy[0])
    shows(page, served.easy[1], 0)


@needs_browser
def test_the_keyboard_alone_is_enough(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.locator("#file")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    expect(page.locator("[data-sample]").first).to_have_attribute("aria-pressed", "true")
    for _ in range(3):
        page.keyboard.press("Tab")
    expect(page.get_by_label("how sure the glance must be")).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator("#summary")).to_contain_text("the coarse stage answers")
    page.keyboard.press("End")
    expect(page.locator("#summary")).to_contain_text("the fine stage answers")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#eta-value")).to_have_text("0.990")
    page.keyboard.press("Tab")
    expect(page.locator("#reset")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#eta")).to_be_focused()
    expect(page.locator("#reset")).to_be_hidden()


@needs_browser
def test_a_phone_needs_no_scrolling_to_the_side(served: Served, page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    explained(page, served.hard)
    for eta in ("0", "0.5", "1"):
        page.locator("#eta").fill(eta)
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Page, scheme: Any) -> None:
    def luminance(colour: str) -> float:
        values = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    page.emulate_media(color_scheme=scheme)
    style = "getComputedStyle(document.querySelector('{}'))['{}']".format
    ground = luminance(page.evaluate(style("body", "background-color")))
    assert (ground > 0.5) == (scheme == "light")
    for place in ("body", "#model", "#coarse h3", "#fine h3", "#failure", "footer dt"):
        text = luminance(page.evaluate(style(place, "color")))
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5, place  # WCAG 2.2, level AA


@needs_browser
def test_an_error_is_the_servers_line_until_the_next_photo(served: Served, page: Page) -> None:
    choose(page, b"no image")
    line = httpx.post(f"{served.address}explain", content=b"no image").json()["error"]
    expect(page.get_by_role("alert")).to_have_text(line)
    expect(page.locator("#answer")).to_be_hidden()
    explained(page, served.easy)
    expect(page.locator("#failure")).to_be_hidden()


@needs_browser
def test_a_key_is_asked_for_and_used(served: Served, page: Page) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer quite secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": "no key, or a wrong one"})

    page.route("**/explain", guard)
    choose(page, served.easy[0])
    expect(page.get_by_role("alert")).to_have_text("no key, or a wrong one")
    page.get_by_label("This server asks for its key").fill("quite secret")
    page.keyboard.press("Enter")
    expect(page.locator("#access")).to_be_hidden()
    explained(page, served.easy)


@needs_browser
def test_the_servers_figures_are_live_and_quiet_once_it_has_gone(served: Served, page: Page) -> None:
    expect(page.locator("#model")).to_have_text("colours")
    expect(page.locator("#server-eta")).to_have_text(f"{served.predictor.threshold:.3f}")
    page.route("**/stats", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("does not answer")
    expect(page.locator("#failure")).to_be_hidden()


@needs_browser
def test_a_browser_prepares_photos_as_the_server_does(served: Served, page: Page) -> None:
    photo = httpx.get(f"{served.address}samples/palace.jpg").content
    view = httpx.post(f"{served.address}explain", content=photo).raise_for_status().json()["view"]
    model = served.predictor.model
    configs = [{**model.data_config, "crop_mode": mode} for mode in ("center", "squash", "border")]
    about = {"image_size": model.image_size, "data_config": model.data_config}
    own, images = page.evaluate(
        """async ([about, configs, view, photo]) => {
            const { answer, cropped } = await import("./browser.js");
            const read = (text) => createImageBitmap(new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]));
            const given = [];
            const graph = { inputNames: [], run: async (inputs) => given.push(inputs) };
            const runtime = { Tensor: function (type, data, shape) { Object.assign(this, { data, shape }); } };
            const pixels = (canvas) => [...canvas.getContext("2d").getImageData(0, 0, 32, 32).data];
            const same = Object.assign(document.createElement("canvas"), { width: 32, height: 32 });
            same.getContext("2d").drawImage(await read(view), 0, 0);
            await answer({ about, runtime, coarse: graph, fine: graph }, same);
            const bitmap = await read(photo);
            const views = configs.map((data_config) => pixels(cropped({ ...about, data_config }, bitmap)));
            return [views, [...given[0].images.data]];
        }""",
        [about, configs, view, base64.b64encode(photo).decode()],
    )
    expected = eval_transform(model.data_config)(open_image(photo))
    assert np.array(images).reshape(expected.shape) == pytest.approx(expected.numpy(), abs=1e-5)
    mean, std = (torch.tensor(model.data_config[name]).view(3, 1, 1) for name in ("mean", "std"))
    for config, pixels in zip(configs, own, strict=True):
        right = 255 * (eval_transform(config)(open_image(photo)) * std + mean).permute(1, 2, 0).numpy()
        difference = np.array(pixels).reshape(32, 32, 4)[..., :3] - right
        assert np.abs(difference).mean() < 5  # of 255: browsers resize otherwise; shifted by one pixel it is 10 or more


def test_the_page_may_load_nothing_from_elsewhere(served: Served) -> None:
    for name in ("", "app.js", "style.css", "samples/cat.jpg"):
        policy = httpx.get(served.address + name).raise_for_status().headers["Content-Security-Policy"]
        sources = {source for part in policy.split(";") for source in part.split()[1:]}
        assert "default-src 'none'" in policy
        assert sources <= {"'none'", "'self'", "data:", "'wasm-unsafe-eval'"}


def test_the_view_is_what_the_model_saw(served: Served) -> None:
    photo, explanation = served.easy
    view = httpx.post(f"{served.address}explain", content=photo).raise_for_status().json()["view"]
    with Image.open(io.BytesIO(base64.b64decode(view))) as image:
        assert np.asarray(image) / 255 == pytest.approx(explanation.image, abs=1e-6)
