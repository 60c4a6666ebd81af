"""The page in a real browser: no error, every image decodes, every link leads somewhere, nothing overflows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.report.sample_study import write_study

from jacnorm.report.build import build

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH (Debian: apt install chromium)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
VIEWS = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("page") / "results" / "smoke"
    write_study(results)
    build(results, ["sample"], results / "report" / "index.html")
    return results / "report" / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def look(browser: sync_api.Browser, report: Path):
    """Open the page at a width and colour scheme; complaints of the page and requests beyond the disk are collected."""
    pages = []

    def open_page(width: int, scheme: str) -> tuple[sync_api.Page, list[str]]:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
        page.goto(report.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        return page, complaints

    yield open_page
    for page in pages:
        page.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_page_is_sound_at_every_width_and_scheme(look, width: int, scheme: str) -> None:
    page, complaints = look(width, scheme)
    assert complaints == []
    assert page.title() == "jacnorm: verdicts at scale smoke"  # the fixture's hostile statement would change it
    assert page.evaluate("document.images.length") == 2
    broken = "Array.from(document.images).filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
    assert page.evaluate(broken) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Whatever is wider than the window must lie in a container that scrolls.
    outside = """() => Array.from(document.querySelectorAll('body *')).filter(e => {
        const box = e.getBoundingClientRect();
        if (!box.width || box.right <= innerWidth + 1 || e.closest('.skip')) return false;
        for (let a = e; a; a = a.parentElement)
            if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(a).overflowX)) return false;
        return true; }).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []


def test_links_lead_somewhere(look, report: Path) -> None:
    page, _ = look(1440, "light")
    links = page.evaluate("Array.from(document.links).map(a => a.getAttribute('href'))")
    assert len(links) > 30
    for link in set(links):
        parts = urlsplit(link)
        if parts.scheme:
            assert link == "https://arxiv.org/abs/2506.08764"
        elif parts.path:
            assert (report.parent / unquote(parts.path)).is_file(), link
        else:
            assert page.evaluate("id => !!document.getElementById(id)", parts.fragment), link
    ids = page.evaluate("Array.from(document.querySelectorAll('[id]')).map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_text_has_contrast_in_both_schemes(look) -> None:
    """WCAG AA for the text of the page: 4.5 to 1 against the nearest painted background."""
    contrast = """() => {
        const parse = c => c.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b]
            .map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
        const bad = [];
        const texts = 'p, a, th, td, li, dt, dd, summary, figcaption, span, h1, h2, h3, h4, code';
        for (const e of document.querySelectorAll(texts)) {
            if (!e.textContent.trim()) continue;
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(e.className + ': ' + e.textContent.trim().slice(0, 40));
        }
        return bad; }"""
    for scheme in ("light", "dark"):
        page, _ = look(1440, scheme)
        assert page.evaluate(contrast) == [], scheme


def test_the_colours_follow_the_scheme(look) -> None:
    grounds = [look(390, s)[0].evaluate("getComputedStyle(document.body).backgroundColor") for s in ("light", "dark")]
    assert len(set(grounds)) == 2


def test_everything_is_reached_by_keyboard(look) -> None:
    page, _ = look(1440, "light")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the verdicts"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    unnamed = "Array.from(document.querySelectorAll('.scroll')).filter(e => e.tabIndex || !e.ariaLabel).length"
    assert page.evaluate(unnamed) == 0
    assert page.evaluate("Array.from(document.images).every(i => i.alt)")
    assert page.evaluate("Array.from(document.querySelectorAll('svg')).every(s => s.ariaLabel)")


def test_cards_on_a_phone_remain_a_table(look) -> None:
    page, _ = look(390, "light")
    kinds = page.evaluate(
        "Array.from(document.querySelectorAll('.stack td, .stack th')).map(e => e.getAttribute('role'))"
    )
    assert set(kinds) == {"cell", "rowheader", "columnheader"}
    assert page.evaluate("getComputedStyle(document.querySelector('.stack td')).display") == "block"


def test_paper_is_white_and_wide_enough(look) -> None:
    page, _ = look(720, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.badge')).backgroundColor") == "rgb(220, 239, 229)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
