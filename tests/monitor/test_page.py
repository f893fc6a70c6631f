"""The page of `distrib compare` in a real browser, without a network: it draws, shows values, and asks for nothing.

Needs Debian's chromium, or another Chromium in PATH: apt-get install chromium
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, sync_playwright

from distrib import Config
from distrib.monitor.compare.comparison import Comparison, compare
from distrib.monitor.compare.page import POINTS, draw_curves, thin, write_page
from distrib.monitor.compare.runs import Curve, Digests, Run
from distrib.samples import Image, Table, Text, encode

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]  # one process makes what they share

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; to run these: apt-get install chromium")

NASTY = '</script><img src=x onerror=alert(1)><b>"{{ 7 * 7 }}" & \'$x$'
LONG = 20 * POINTS
BATCH = 16


def made_up(name: str, steps: int, level: float, lr: float) -> Run:
    """Return a run of so many steps, whose loss falls from `level` and has a spike."""
    config = Config.from_dict(
        {
            "train": {"steps": steps},
            "optim": {"lr": lr},
            "data": {"global_batch_size": BATCH, "micro_batch_size": BATCH},
        }
    )
    done = np.arange(1, steps + 1)
    loss = level / np.sqrt(done) + 0.01 * np.sin(done)
    loss[steps // 3] = 50 * level
    evaluated = done[steps // 10 - 1 :: steps // 10]
    curves = {
        "train/loss": Curve.of(list(done), list(loss)),
        "train/lr": Curve.of(list(done), [lr] * steps),
        "eval/accuracy": Curve.of(list(evaluated), list(1 - 1 / evaluated)),
    }
    seconds = Curve.of(list(done), list(done * 0.25))
    return Run(name, "finished", config.flat(), config.identity(), {}, {}, 0, curves, seconds, Digests.of([], []))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    named = made_up(NASTY, 40, 1.5, 0.2)
    named = dataclasses.replace(named, config=named.config | {"task.note": NASTY})
    return compare([made_up("base", 40, 1.0, 0.1), named, made_up("long", LONG, 2.0, 0.1)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open the page of a comparison. Any request, error or warning fails the test."""
    complaints: list[str] = []

    def open_page(comparison: Comparison, **options: Any) -> Page:
        path = tmp_path / "comparison.html"
        write_page(comparison, path)
        page = browser.new_page(viewport={"width": 1200, "height": 900}, offline=True, **options)
        own = (path.as_uri(), "blob:")  # the latter: what it made itself, in memory
        page.on("request", lambda request: request.url.startswith(own) or complaints.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(path.as_uri())
        page.wait_for_selector("#plot .scatterlayer .trace")
        return page

    yield open_page
    assert complaints == []
    for context in browser.contexts:
        context.close()


@in_browser
def test_samples_are_shown(opened: Open, comparison: Comparison, tmp_path: Path) -> None:
    """An image, a table and a text, by name and run; what a text says is never markup. One run lacks a name."""
    files = encode({"grey": Image(np.eye(5)), "rows": Table(["a", NASTY], [[1, NASTY]]), "said": Text(NASTY)})
    paths = {name: tmp_path / "samples" / "step-00001200" / name for name in [*files, "long.txt"]}
    paths["grey.png"].parent.mkdir(parents=True)
    for name, content in files.items():
        paths[name].write_bytes(content)
    paths["long.txt"].write_text("long" * 2**21)
    first, *others = comparison.runs
    runs = [dataclasses.replace(first, sample_files={name: (1200, path) for name, path in paths.items()}), *others]
    page = opened(dataclasses.replace(comparison, runs=runs))
    assert page.locator(".samples tbody th").all_text_contents() == [*files, "long.txt"]
    image = page.locator(".samples img")
    assert image.evaluate("one => [one.naturalWidth, one.naturalHeight, one.alt]") == [5, 5, "grey.png"]
    assert page.locator(".samples td table td").all_text_contents() == ["a", NASTY, "1", NASTY]
    said, long = page.locator(".samples pre").all_text_contents()
    assert said == NASTY
    assert long == f"{paths['long.txt']} has 8,388,608 bytes, too many for this page"
    assert page.locator(".samples td p").all_text_contents() == ["after 1,200 steps"] * 4


def traces(page: Page, key: str) -> list[Any]:
    found: list[Any] = page.evaluate(f"plot.data.map((trace) => trace.{key})")
    return found


def numbers(values: Any) -> list[float]:
    return [math.nan if value is None else value for value in values]


def move_to_point(page: Page, trace: int, point: int) -> None:
    where = page.evaluate(
        """([trace, point]) => {
            const { xaxis, yaxis } = plot._fullLayout, { x, y } = plot.data[trace];
            const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
            return [box.x + xaxis.d2p(x[point]), box.y + yaxis.d2p(y[point])];
        }""",
        [trace, point],
    )
    page.mouse.move(*where)


@in_browser
def test_curves_are_drawn(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison)
    assert page.locator("#plot .scatterlayer .trace path.js-line").count() == 3
    assert all(len(path) > 100 for path in page.eval_on_selector_all("path.js-line", "a => a.map(p => p.outerHTML)"))
    for run, x, y in zip(comparison.runs, traces(page, "x"), traces(page, "y"), strict=True):
        curve = run.curves["train/loss"]
        places, _ = thin(curve.values, POINTS)
        assert x == curve.steps[places].tolist()
        assert numbers(y) == pytest.approx(curve.values[places], rel=1e-8)
    options = page.locator("#metric option").all_text_contents()
    assert options == ["train/loss", "eval/accuracy", "train/lr"]


@in_browser
def test_hover_shows_run_place_and_value(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison)
    page.evaluate("Plotly.relayout(plot, {'xaxis.range': [0, 45], 'yaxis.range': [0, 2]})")
    hover = page.locator("#plot .hoverlayer .hovertext")
    for trace, run in ((0, "base"), (1, NASTY)):
        move_to_point(page, trace, 9)
        hover.filter(has_text=run).wait_for()
        value = comparison.runs[trace].curves["train/loss"].values[9]
        assert hover.text_content() == f"{run}steps 10train/loss {value:.6g}"


@in_browser
def test_x_is_steps_samples_or_wall_time(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison)
    for x, factor in (("samples", BATCH), ("seconds", 0.25), ("steps", 1)):
        page.select_option("#x", x)
        assert traces(page, "x")[0] == [step * factor for step in range(1, 41)]
    page.select_option("#x", "seconds")
    assert page.locator("#plot .xtitle").text_content() == "wall time [s]"


@in_browser
def test_log_scale(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison)
    before = page.locator("path.js-line").first.get_attribute("d")
    page.check("#log")
    assert page.evaluate("plot._fullLayout.yaxis.type") == "log"
    assert page.locator("path.js-line").first.get_attribute("d") != before


@in_browser
def test_smoothing(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison)
    page.fill("#smoothing", "0.9")
    assert traces(page, "opacity") == [0.25, None] * 3
    raw, smoothed = traces(page, "y")[:2]
    assert raw == pytest.approx(comparison.runs[0].curves["train/loss"].values, rel=1e-8)
    assert smoothed == pytest.approx(smooth(raw, 0.9))
    assert page.locator("#plot .legend .traces").count() == 3
    spiky, calm = traces(page, "y")[4:]
    assert max(spiky) == pytest.approx(100, rel=1e-3)  # the spike is there,
    assert max(calm[len(calm) // 10 :]) < 3  # and weighs as one step among its neighbours


def smooth(values: list[float | None], weight: float) -> list[float | None]:
    """Return the moving average by its definition: all earlier values, weighted by age."""
    result: list[float | None] = []
    for place, value in enumerate(values):
        seen = [v for v in values[: place + 1] if v is not None]
        weights = [weight**age for age in reversed(range(len(seen)))]
        mean = sum(w * v for w, v in zip(weights, seen, strict=True)) / sum(weights) if seen else None
        result.append(None if value is None else mean)
    return result


@in_browser
def test_smoothing_is_the_moving_average(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison)

    @settings(max_examples=50)
    @given(st.lists(st.floats(-1e6, 1e6) | st.none(), max_size=30), st.floats(0.01, 0.99))
    def check(values: list[float | None], weight: float) -> None:
        found = page.evaluate("([values, weight]) => smooth(values, weight)", [values, weight])
        assert numbers(found) == pytest.approx(numbers(smooth(values, weight)), rel=1e-9, abs=1e-6, nan_ok=True)

    check()


@in_browser
def test_hiding_a_run_and_zooming(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison)
    page.locator("#plot .legendtoggle").last.click()
    page.wait_for_function("() => plot._fullData[2].visible === 'legendonly'")
    page.select_option("#metric", "train/lr")
    assert page.evaluate("plot._fullData.map((trace) => trace.visible)") == [True, True, "legendonly"]
    first, last = page.evaluate("plot._fullLayout.xaxis.range")
    box = page.locator("#plot .nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 50, steps=4)
    page.mouse.up()
    page.wait_for_function(f"() => plot._fullLayout.xaxis.range[0] > {first}")
    assert page.evaluate("plot._fullLayout.xaxis.range[1]") < last


@in_browser
def test_the_buttons_stay_on_the_page(opened: Open, comparison: Comparison) -> None:
    """plotly has a button that sends the chart to its server."""
    page = opened(comparison)
    popups: list[Page] = []
    page.on("popup", lambda popup: popups.append(popup))
    page.hover("#plot")
    titles = page.eval_on_selector_all("#plot .modebar-btn", "buttons => buttons.map((button) => button.dataset.title)")
    assert "Zoom in" in titles
    for title in titles:
        page.click(f'#plot .modebar-btn[data-title="{title}"]')
    with page.expect_download() as download:
        page.click('#plot .modebar-btn[data-title="Download plot as a PNG"]')
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    assert popups == []


@in_browser
def test_names_are_no_markup(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison)
    assert page.locator("img").count() == 0
    assert page.locator("th", has_text=NASTY).count() >= 1
    assert page.locator("td", has_text=NASTY).count() == 1  # in the table of differences
    assert page.locator("#plot .legendtext").nth(1).text_content() == NASTY
    page.fill("#smoothing", "0.5")


@in_browser
def test_the_page_may_neither_connect_nor_run_another_script(
    browser: Browser, opened: Open, comparison: Comparison
) -> None:
    path = Path(opened(comparison).url.removeprefix("file://"))
    page = browser.new_page()
    page.goto(path.as_uri())
    refused = page.evaluate("fetch('https://example.com').then(() => 'connected', (error) => error.message)")
    assert refused == "Failed to fetch"
    page.evaluate(
        """() => {
            window.violations = [];
            document.addEventListener("securitypolicyviolation", (event) => violations.push(event.effectiveDirective));
            const image = "<img src='https://example.com/x.png' onerror='window.ran = 1'>";
            document.body.insertAdjacentHTML("beforeend", image);
            const script = document.createElement("script");
            script.textContent = "window.ran = 1";
            document.body.append(script);
        }"""
    )
    page.wait_for_function("() => violations.length >= 3")
    assert set(page.evaluate("violations")) == {"img-src", "script-src-attr", "script-src-elem"}
    assert page.evaluate("window.ran") is None


@in_browser
def test_dark(opened: Open, comparison: Comparison) -> None:
    page = opened(comparison, color_scheme="dark")
    text, background = page.evaluate(
        "[plot._fullLayout.font.color, getComputedStyle(document.body).backgroundColor]"
        ".map((colour) => colour.match(/[0-9]+/g).map(Number))"
    )
    assert min(text) - max(background) > 150


@in_browser
def test_fifty_runs(opened: Open, tmp_path: Path) -> None:
    runs = [made_up(f"run {number}", LONG, 1 + number / 10, number / 1000) for number in range(50)]
    page = opened(compare(runs))
    assert page.locator("#plot .scatterlayer path.js-line").count() == 50
    assert page.evaluate("new Set(plot.data.map(({ line }) => line.color + line.dash)).size") == 50
    assert (tmp_path / "comparison.html").stat().st_size < 40e6
    assert page.evaluate("document.body.scrollWidth <= window.innerWidth")


def test_the_picture(comparison: Comparison, tmp_path: Path) -> None:
    draw_curves(comparison, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.floats(width=32) | st.sampled_from([0.0, math.inf, math.nan]), max_size=120),
    st.integers(2, 40),
)
def test_thinning_keeps_what_stands_out(listed: list[float], points: int) -> None:
    values = np.array(listed, dtype=np.float64)
    places, means = thin(values, points)
    assert len(places) == len(means) <= max(len(values) if len(values) <= points else 0, 3 * points // 2 + 2)
    assert (np.diff(places) > 0).all()
    if len(values) <= points:
        assert len(places) == len(values)
        return
    assert places[0] == 0
    assert places[-1] == len(values) - 1
    kept, finite = values[places], values[np.isfinite(values)]
    assert np.isfinite(kept).all() == np.isfinite(values).all()  # a gap is not closed
    assert (np.isfinite(means) == np.isfinite(kept)).all()
    if len(finite):
        assert np.nanmin(np.where(np.isfinite(kept), kept, np.nan)) == finite.min()
        assert np.nanmax(np.where(np.isfinite(kept), kept, np.nan)) == finite.max()
        assert (means[np.isfinite(means)] >= finite.min() - 1e-3 * abs(finite.min())).all()
        assert (means[np.isfinite(means)] <= finite.max() + 1e-3 * abs(finite.max())).all()
