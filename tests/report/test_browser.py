"""The page in a real Chromium, by Playwright; accessibility by axe.

Where the system has no Chromium these tests are skipped; under CI (`CI` is set) they fail.
"""

import json
import os
import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    if path is None:
        message = "needs Chromium on the PATH, as `apt install chromium` brings it"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with sync_playwright() as playwright:
        # Without a sandbox: containers and CI run as root, and the page is our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[PHONE, DESKTOP], ids=["phone", "desktop"])
def page(request, chromium, run):
    """The opened page; whatever it complains of or asks for is noted."""
    page = chromium.new_page(viewport=request.param)
    page.complaints, page.requests = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto((run / "report.html").as_uri())
    yield page
    page.close()


def test_it_opens_without_complaint_or_network_and_fits_the_screen(page, run):
    assert page.complaints == []
    assert page.requests == [(run / "report.html").as_uri()]
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"]


def test_the_slider_changes_the_table(page):
    counts = page.evaluate("counts")
    slider = page.get_by_label("Call it tumour from this probability on")
    slider.focus()
    before = page.locator("#tp").inner_text()
    page.keyboard.press("Home")
    assert page.locator("#percent").inner_text() == "0%"
    cells = {name: int(page.locator(f"#{name}").inner_text()) for name in ("tp", "fn", "fp", "tn")}
    positives, negatives = counts["positives"][0], counts["negatives"][0]
    assert cells == {"tp": positives, "fn": 0, "fp": negatives, "tn": 0}
    assert page.locator("#sensitivity").inner_text() == "100.0%"
    page.keyboard.press("End")
    assert page.locator("#tp").inner_text() == str(counts["positives"][100]) != before
    for _ in range(37):
        page.keyboard.press("ArrowLeft")
    assert page.locator("#percent").inner_text() == "63%"
    assert page.locator("#tn").inner_text() == str(negatives - counts["negatives"][63])


def opacity(patch):
    return patch.locator(".saliency").evaluate("picture => getComputedStyle(picture).opacity")


def test_pointing_and_the_keyboard_show_where_the_network_looked(page):
    patches = page.locator("button.patch")
    assert patches.count() == 36
    first, second = patches.nth(0), patches.nth(1)
    assert opacity(first) == "0"
    first.hover()
    assert opacity(first) == "1"
    page.mouse.move(0, 0)
    assert opacity(first) == "0"
    first.focus()
    page.keyboard.press("Tab")
    assert second.evaluate("patch => patch === document.activeElement")
    assert (opacity(first), opacity(second)) == ("0", "1")
    pictures = second.locator("img").evaluate_all(
        "all => all.map(picture => [picture.naturalWidth, picture.src])"
    )
    assert [width for width, _ in pictures] == [96, 96]
    assert pictures[0][1] != pictures[1][1]


def test_it_passes_the_rules_of_accessibility(page):
    for summary in page.locator("summary").all():
        summary.click()
    found = Axe().run(page)
    assert json.dumps(found.response["violations"], indent=1) == "[]"
    assert len(found.response["passes"]) > 10


def test_it_prints_whole(page, run):
    page.emulate_media(media="print")
    assert page.locator("input[type=range]").is_hidden()
    assert page.locator("#confusion").is_visible()
    assert page.locator("figure").count() == 5


def test_html_in_ids_slides_and_settings_is_shown_as_text(chromium, evil_page, tmp_path):
    path = tmp_path / "evil.html"
    path.write_text(evil_page)
    page = chromium.new_page()
    dialogs, requests = [], []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    text = page.inner_text("body")
    # Name, settings changed and all, records, audit, slides; ids are shown by their first letters.
    assert text.count('<script>alert("x")</script><img') >= 7
    assert "<script>aler" in page.locator(".gallery").inner_text()
    assert dialogs == []
    assert requests == [path.as_uri()]
    page.close()
