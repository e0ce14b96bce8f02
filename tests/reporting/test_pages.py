"""The pages open from disk in a real browser, run their own scripts and nothing that a name or an answer holds."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from mtbench_data import CATEGORIES
from prefscan.reporting.pages import as_json, plain, printed
from prefscan.stages import report
from sweep_data import CATEGORY_OF, CELLS, write_sweep

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' & {{ 7 * 7 }} </script> \u2028"
CHARTS = 8


@pytest.fixture(scope="module")
def hostile_reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of a sweep whose model, data set, categories, answers and judgements hold markup."""
    root = tmp_path_factory.mktemp("hostile")
    categories = {question: HOSTILE + category for question, category in CATEGORY_OF.items()}
    params = {name: {"name": HOSTILE} for name in ("model", "data")}
    write_sweep(root, categories, HOSTILE, **params)
    with contextlib.chdir(root):
        report.main()
    return root / "reports"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or what the machine has of its family."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if "CI" in os.environ:
            pytest.fail("no Chromium: install Debian's package chromium")
        pytest.skip("no Chromium: install Debian's package chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found)
        yield started
        started.close()


class Opened:
    """A page opened from disk, with what it logged, asked for and popped up."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.noise: list[str] = []
        self.requests: list[str] = []
        self.page: Page = browser.new_page(**options)
        self.page.on("console", lambda message: self.noise.append(message.text))
        self.page.on("pageerror", lambda error: self.noise.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.noise.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def drawn(self) -> Page:
        """The report with its charts drawn and its details unfolded."""
        self.page.wait_for_selector(f'html[data-drawn="{CHARTS}"]', timeout=60_000)
        self.page.evaluate("document.querySelector('details.part').open = true")
        return self.page


@pytest.fixture
def opened(browser: Browser) -> Iterator[Any]:
    """Opens pages; when the test ends, none may have logged anything or asked for anything but itself."""
    pages: list[tuple[Opened, Path]] = []

    def open_page(path: Path, **options: Any) -> Opened:
        pages.append((Opened(browser, path, **options), path))
        return pages[-1][0]

    yield open_page
    for page, path in pages:
        page.page.close()
        assert page.noise == []
        assert [url for url in page.requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


def faded(page: Page, figure: str) -> dict[str, bool]:
    """Of each cell's point in a figure, whether it is faded."""
    found = {}
    for point in page.locator(f'#{figure} svg [aria-roledescription="point"]').all():
        label = point.get_attribute("aria-label") or ""
        cell = re.search(r"cell: ([^;]+)", label)
        if cell and cell[1] != "base":
            found[cell[1]] = float(point.get_attribute("opacity") or 1) < 0.5
    return found


def only(loss: str) -> dict[str, bool]:
    return {cell: not cell.startswith(f"{loss}-") for cell in CELLS}


NONE_FADED = dict.fromkeys(CELLS, False)


def test_the_report_draws_every_chart_in_a_browser(opened: Any, reported: Path) -> None:
    page = opened(reported / "reports/report.html").drawn()
    for figure in page.locator("figure").all():
        assert figure.locator("svg.marks").count() == 1
        assert figure.locator('svg.marks [role="graphics-symbol"]').count() >= len(CELLS)
        assert figure.locator("figcaption").inner_text()
    assert page.locator("figure").count() == CHARTS
    for figure in ("score", "differences", "length", "accuracy", "margin"):
        assert faded(page, figure) == NONE_FADED


def test_one_choice_of_a_loss_reaches_every_chart(opened: Any, reported: Path) -> None:
    page = opened(reported / "reports/report.html").drawn()
    charts = ("score", "differences", "length", "accuracy", "margin")
    page.select_option("#shown", "ipo")
    assert [faded(page, chart) for chart in charts] == [only("ipo")] * len(charts)
    lines = page.locator('#curves svg [aria-roledescription="line mark"]').all()
    assert sorted(float(line.get_attribute("opacity") or 1) for line in lines) == [0.06] * 4 + [1.0] * 4
    page.select_option("#shown", "all")
    assert faded(page, "score") == NONE_FADED


def test_a_click_in_a_legend_fades_the_other_losses_of_its_chart(opened: Any, reported: Path) -> None:
    page = opened(reported / "reports/report.html").drawn()
    entry = page.locator("#score svg .role-legend-label text").first
    entry.evaluate("element => element.scrollIntoView({block: 'center'})")
    box = entry.bounding_box()
    assert box
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # an entry lies above its label
    assert faded(page, "score") == only("sigmoid")
    assert faded(page, "margin") == NONE_FADED


def test_a_point_tells_its_numbers(opened: Any, reported: Path) -> None:
    page = opened(reported / "reports/report.html").drawn()
    page.locator('#margin svg [aria-roledescription="point"][aria-label*="sigmoid-0.5-8"]').hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    heldout = json.loads((reported / "metrics/train/sigmoid-0.5-8.json").read_text())["heldout"]
    assert "sigmoid-0.5-8" in tooltip.inner_text()
    assert f"{heldout['margin']:.3f}" in tooltip.inner_text()


def test_the_keyboard_is_enough(opened: Any, reported: Path) -> None:
    page = opened(reported / "reports/report.html").drawn()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "answers.html"
    page.keyboard.press("Tab")
    page.keyboard.type("ipo")
    assert faded(page, "score") == only("ipo")
    table = page.locator("#score > details").first
    table.locator("summary").focus()
    page.keyboard.press("Enter")
    assert table.locator("table").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_charts_follow_the_readers_colours(opened: Any, reported: Path, scheme: str) -> None:
    page = opened(reported / "reports/report.html", color_scheme=scheme).drawn()
    inks = {"light": "#222222", "dark": "#e6e6e6"}
    label = page.locator("#score svg .role-axis-label text").first
    assert label.get_attribute("fill") == inks[scheme]
    other = "dark" if scheme == "light" else "light"
    page.evaluate("delete document.documentElement.dataset.drawn")
    page.emulate_media(color_scheme=other)
    page.wait_for_selector(f'html[data-drawn="{CHARTS}"]')
    assert page.locator("#score svg .role-axis-label text").first.get_attribute("fill") == inks[other]


@pytest.mark.parametrize("name", ["report.html", "answers.html"])
def test_a_phone_scrolls_down_and_not_sideways(opened: Any, reported: Path, name: str) -> None:
    found = opened(reported / "reports" / name, viewport={"width": 390, "height": 844})
    page = found.drawn() if name == "report.html" else found.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_scripts_the_report_shows_its_pictures(browser: Browser, reported: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto((reported / "reports/report.html").as_uri())
    assert page.locator("figure svg").count() == CHARTS
    assert not page.locator("#shown").is_visible()
    page.close()


def articles(page: Page) -> list[Locator]:
    return page.locator("article").all()


def judged_difference(left: str, right: str) -> dict[int, float]:
    means = {key: json.loads(Path(f"metrics/mtbench/{key}.json").read_text())["questions"] for key in (left, right)}
    return {int(number): means[left][number] - means[right][number] for number in means[left]}


@pytest.mark.usefixtures("sweep")
def test_two_models_answers_side_by_side(opened: Any, reported: Path) -> None:
    page = opened(reported / "reports/answers.html").page
    assert len(articles(page)) == len(CATEGORY_OF)
    assert page.input_value("#left") == CELLS[0]
    assert page.input_value("#right") == "base"
    first = articles(page)[0]
    assert [turn.inner_text() for turn in first.locator(".answer").all()] == [f"{CELLS[0]} well", "base well"] + [
        "again"
    ] * 2
    assert not first.locator("details p").first.is_visible()
    first.locator("summary").first.click()
    assert first.locator("details p").first.inner_text() == f"Of {CELLS[0]}: well"

    page.select_option("#category", CATEGORIES[3])
    assert [a.locator("h2").inner_text() for a in articles(page)] == [
        f"Question 84, math: difference {judged_difference(CELLS[0], 'base')[84]:+.2f}".replace("-", "−", 1)
    ]
    assert page.inner_text("#count") == "1 of 8 questions"

    page.select_option("#category", "all")
    page.select_option("#left", "ipo-0.1-8")
    page.select_option("#right", "sigmoid-0.5-8")
    apart = judged_difference("ipo-0.1-8", "sigmoid-0.5-8")
    assert len(set(apart.values())) > 2
    orders = {"left": lambda d: -d, "right": lambda d: d, "size": lambda d: -abs(d), "number": lambda _: 0}
    for order, key in orders.items():
        page.select_option("#order", order)
        shown = [int(re.findall(r"\d+", a.locator("h2").inner_text())[0]) for a in articles(page)]
        assert shown == sorted(apart, key=lambda number: key(apart[number]))


@pytest.mark.parametrize("name", ["report.html", "answers.html"])
def test_markup_in_names_answers_and_judgements_is_text(opened: Any, hostile_reports: Path, name: str) -> None:
    """`opened` sees that no dialog, no request and no error comes of it."""
    found = opened(hostile_reports / name)
    page = found.drawn() if name == "report.html" else found.page
    assert page.locator("img, iframe, object, embed, link").count() == 0
    assert page.locator("script").count() == (3 if name == "report.html" else 2)
    assert HOSTILE.strip() in (page.locator("h1").text_content() or "")
    if name == "answers.html":
        assert page.locator(".answer").first.text_content() == f"{CELLS[0]} {HOSTILE}"
        assert page.locator("details p").first.text_content() == f"Of {CELLS[0]}: {HOSTILE}"
    else:
        figure = page.locator("#categories svg.marks")
        assert (figure.text_content() or "").count("<script>alert(1)") == len(CATEGORIES)


def test_markup_in_names_is_text_in_the_markdown_too(hostile_reports: Path) -> None:
    text = (hostile_reports / "report.md").read_text()
    assert text.startswith("# &lt;script>alert(1)&lt;/script>&lt;img src=x onerror=alert(2)>")
    assert "<" not in text


def test_a_script_of_another_hash_does_not_run(browser: Browser, reported: Path, tmp_path: Path) -> None:
    """The policy alone would stop markup that came past the escaping."""
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    injected = "<script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>x</a>"
    for name in ("report.html", "answers.html"):
        text = (reported / "reports" / name).read_text()
        (tmp_path / name).write_text(text.replace("<main", f"{injected}<main", 1))
        page.goto((tmp_path / name).as_uri())
        page.locator("a", has_text=re.compile("^x$")).click()
        page.wait_for_timeout(200)
    assert dialogs == []
    page.close()


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [(0.5, "{:+.2f}", "+0.50"), (None, "{:.2f}", "–"), (float("nan"), "{:.2f}", "–"), ("a", "{}", "a")],
)
def test_what_is_missing_is_printed_as_a_dash(value: Any, form: str, expected: str) -> None:
    assert printed(value, form) == expected


def test_a_charts_numbers_are_printed_to_four_digits() -> None:
    row = next(pd.DataFrame({"a": [0.123456], "b": [54], "c": ["ipo"]}).itertuples(index=False))
    assert [plain(value) for value in row] == ["0.1235", "54", "ipo"]


def test_json_within_a_script_element_cannot_end_it() -> None:
    text = as_json({"a": HOSTILE})
    assert "<" not in text
    assert json.loads(text) == {"a": HOSTILE}
    with pytest.raises(ValueError, match="JSON compliant"):
        as_json([float("nan")])
