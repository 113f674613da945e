"""The report in a real browser: it asks for nothing, fits a phone, and has two schemes of colour."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from server.history import History
from server.report.comparison import comparison_page
from server.report.page import write_report
from server.report.watching import watched
from tests.browser import DESKTOP, PHONE, chromium, seen
from tests.unit.fake_runs import write_large_run, write_results, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.integration

# Sideways, by a pixel or more, and by what; what scrolls in a box of its own is none.
_OVERFLOW = """() => document.documentElement.scrollWidth - document.documentElement.clientWidth"""
_PICTURES = """() => [...document.querySelectorAll('figure svg')].map(
    svg => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height])"""
_TEXT_HEIGHTS = """() => [...document.querySelectorAll('figure svg text')].map(
    text => text.getBoundingClientRect().height).filter(height => height > 0)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses: of a run with everything, of one of 200 rounds and 50 sites, of both compared."""
    root = tmp_path_factory.mktemp("reports")
    missing = {(2, "north"): "silent", (3, "st-anne"): "norm", (3, "harbour"): "absent"}
    full = write_results(write_run(root / "full", missing=missing))
    large = write_large_run(root / "large")
    both = root / "both.html"
    both.write_text(comparison_page([full, large]))
    return {
        "full": write_report(full).as_uri(),
        "large": write_report(large).as_uri(),
        "both": both.as_uri(),
    }


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["full", "large", "both"])
def test_it_asks_for_nothing_and_fits(
    browser: Browser, pages: dict[str, str], name: str, width: int
) -> None:
    with seen(browser, pages[name], width=width) as found:
        assert found.requests == [pages[name]]
        assert found.said == []
        assert found.page.evaluate(_OVERFLOW) == 0
        sizes = found.page.evaluate(_PICTURES)
        assert sizes
        assert all(wide > 250 and high > 100 for wide, high in sizes), sizes
        # Letters that can be read, in pixels.
        assert min(found.page.evaluate(_TEXT_HEIGHTS)) >= 9


def test_markup_in_a_question_stays_text(browser: Browser, pages: dict[str, str]) -> None:
    with seen(browser, pages["full"]) as found:
        assert found.page.title() == "full · Consilium"
        assert "<script>document.title" in found.page.inner_text(".question >> nth=0")


def test_light_and_dark_differ_in_paper_ink_and_pictures(
    browser: Browser, pages: dict[str, str]
) -> None:
    looks = {}
    for scheme in ("light", "dark"):
        with seen(browser, pages["full"], scheme=scheme) as found:
            looks[scheme] = [
                _style(found.page, "body", "background-color"),
                _style(found.page, "body", "color"),
                _style(found.page, "figure svg text", "fill"),
                found.page.locator("figure").first.screenshot(),
            ]
    assert all(light != dark for light, dark in zip(*looks.values(), strict=True))
    assert _lightness(looks["light"][0]) > 200 > 60 > _lightness(looks["dark"][0])
    assert _lightness(looks["light"][2]) < 120 < _lightness(looks["dark"][2])


def test_a_watched_run_shows_its_next_round_by_itself(browser: Browser, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1, planned=3, end="")
    with watched(folder) as address, seen(browser, address) as found:
        assert "1 of 3 rounds are done" in found.page.inner_text(".outcome")
        History(folder / "history.jsonl").record("round", round=2, loss=1.0, sites=["north"])
        found.page.wait_for_function(
            "() => document.querySelector('.outcome').textContent.includes('2 of 3 rounds')",
            timeout=60_000,
        )
        assert found.said == []
        assert all(request.startswith(address) for request in found.requests)


def _style(page: Page, selector: str, name: str) -> str:
    found: str = page.evaluate(
        "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]",
        [selector, name],
    )
    return found


def _lightness(color: object) -> float:
    """Mean of red, green and blue, 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", str(color))[:3])) / 3
