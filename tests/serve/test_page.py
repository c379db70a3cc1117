"""The page in a real Chromium, by Playwright; accessibility by axe."""

import json

import pytest
from axe_playwright_python.sync_playwright import Axe

TOKEN = "a-token-of-24-characters"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture
def open_page(chromium):
    """Opens the page of a server; records its console messages and requests."""
    pages = []

    def open_page(server, viewport=DESKTOP, scheme="light"):
        page = chromium.new_context(viewport=viewport, color_scheme=scheme).new_page()
        page.messages, page.requests = [], []
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(server.url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.context.close()


def drop(page, files):
    """Drops files on the page, as a person does with the mouse."""
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of files)
                transfer.items.add(new File([new Uint8Array(bytes)], name));
            return transfer;
        }""",
        [[name, list(content)] for name, content in files],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "dark-phone"]
)
def test_dropped_files_become_probabilities_and_a_heat_map(
    served, open_page, encode, patches, predictor, tissue_pixels, viewport, scheme
):
    page = open_page(served, viewport, scheme)
    page.get_by_text("100 megapixels").wait_for()
    evil = "<img src=x onerror=alert(1)>.tif"
    region = tissue_pixels(448, 400, (96, 128, 160), border=64)
    drop(
        page,
        [(evil, encode(patches[3])), ("2.png", encode(patches[0], "PNG")),
         ("larger.png", encode(region, "PNG")), ("text.tif", b"x")],
    )  # fmt: skip
    heatmap = page.get_by_role("article", name="Heat map of larger.png")
    heatmap.wait_for()
    page.locator("#work").wait_for(state="hidden")
    rows = page.locator("li.patch")
    assert rows.count() == 2
    assert page.locator("#status").inner_text().startswith("2 patches computed. larger.png: ")
    probability = predictor(patches)[3]
    assert f"{probability:.3f}" in rows.first.inner_text()
    assert evil in rows.first.inner_text()
    expected = "at or above" if probability >= 0.25 else "below the operating point"
    assert expected in rows.first.inner_text()
    assert "text.tif: is not a TIFF" in page.locator("#problems").inner_text()
    sizes = heatmap.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert sizes == [400, 13]
    shade = lambda: heatmap.locator(".map").evaluate("i => getComputedStyle(i).opacity")  # noqa: E731
    slider = heatmap.get_by_label("Opacity of the map")
    slider.focus()
    page.keyboard.press("End")
    assert shade() == "1"
    layers = heatmap.locator(".layers")
    before = layers.bounding_box()["width"]
    heatmap.get_by_role("button", name="Zoom in").click()
    assert layers.bounding_box()["width"] == pytest.approx(1.5 * before, rel=0.02)
    rows.first.get_by_role("button", name="Attribution").click()
    rows.first.locator(".attribution img").nth(1).wait_for()
    header = page.locator("header").inner_text()
    for text in ("Not a medical device", "AUC 0.934", "0.912 to 0.951", "slide-disjoint"):
        assert text in header
    page.mouse.wheel(0, 2000)
    assert page.locator("header").bounding_box()["y"] == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert json.dumps(Axe().run(page).response["violations"], indent=1) == "[]"
    assert page.messages == []
    assert all(url.startswith((served.url, "blob:", "data:")) for url in page.requests)


def test_the_keyboard_alone_suffices(start, open_page, slide_folder, encode, patches, tmp_path):
    path = tmp_path / "p.tif"
    path.write_bytes(encode(patches[4]))
    with start(token=TOKEN, slides=str(slide_folder)) as server:
        page = open_page(server)
        # Playwright starts to take file choosers here, in the background; later may be too late.
        page.on("filechooser", lambda chooser: None)
        page.get_by_role("dialog").wait_for()
        assert json.dumps(Axe().run(page).response["violations"]) == "[]"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("That token is not right").wait_for()
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        page.get_by_text("100 megapixels").wait_for()

        def tab_to(name):
            for _ in range(40):
                page.keyboard.press("Tab")
                focused = page.locator("button:focus, [tabindex]:focus")
                if focused.count():
                    text = focused.evaluate("element => element.ariaLabel || element.textContent")
                    if name in text:
                        return
            raise AssertionError(f"Tab does not lead to {name}")

        tab_to("Choose files")
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files(path)
        page.locator("li.patch").wait_for()
        page.locator("#work").wait_for(state="hidden")
        assert page.get_by_role("status").inner_text() == "1 patch computed."
        tab_to("Make its heat map")
        page.keyboard.press("Enter")
        page.get_by_role("article", name="Heat map of case_1").wait_for()
        page.locator("#work").wait_for(state="hidden")
        tab_to("keys + and - zoom")
        before = page.locator(".layers").bounding_box()["width"]
        page.keyboard.press("+")
        assert page.locator(".layers").bounding_box()["width"] > before
        tab_to("Attribution of p.tif")
        page.keyboard.press("Enter")
        page.locator(".attribution img").nth(1).wait_for()
        page.reload()  # the token is kept in the tab
        page.get_by_text("100 megapixels").wait_for()
    # Of the answers 401, which browsers log.
    assert all("401" in message for message in page.messages)
