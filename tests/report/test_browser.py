"""The page in a browser: nothing fails, nothing is wider than the window, figures show what was logged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from lightning_namo.report.page import report
from tests.report.logged import optimizer, write

ARGUMENTS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
VAL = {0: 5.0, 40: 3.25, 90: 2.125}


def scalars(number: int) -> dict[str, dict[int, float]]:
    """Every curve that the page shows."""
    steps = range(0, 100, 10)
    quantiles = [f"sigma_{of}_{q}" for of in ("gradient", "momentum") for q in ("q0", "q25", "q50", "q75", "q100")]
    others = ("filter_ratio_top", "stable_rank_momentum", "alignment_momentum", "subspace_change_left", "at_cap")
    others += ("unlifted_share_momentum", "orthogonality_error")
    found = {
        f"{name}/median": {step: 0.1 + i + step / 100 for step in steps} for i, name in enumerate((*quantiles, *others))
    }
    for depth in range(3):
        found[f"step_scale/model.h.{depth}.attention.weight"] = {step: 1 / (step + 1 + depth) for step in steps}
        found[f"signal_fraction_at_most/model.h.{depth}.attention.weight"] = dict.fromkeys(steps, 0.1)
        found[f"noise_scale_at_least/model.h.{depth}.attention.weight"] = dict.fromkeys(steps, 144.0)
    train = {"train/loss": {step: 4.0 + number - step / 100 for step in steps}}
    lengths = {"train/lengths": {step: 512.0 * (step + 1) for step in steps}}
    return {**found, **train, **lengths, "val/loss": VAL, "skipped_steps/max": dict.fromkeys(steps, 0.0)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for number in range(3):
        name = f"a_run_with_a_rather_long_name_that_could_be_cut_{number}"
        write(folder / "runs" / name, scalars(number), optim=optimizer(lr=10.0**-number))
    return Path(report([str(folder / "runs")], str(folder / "report.html"))["page"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        assert "CI" not in os.environ, "Expected chromium and chromedriver, which .ci/run installs. Got none."
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in [*ARGUMENTS.split(), "--disable-component-update", "--disable-sync"]:
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as started:
        yield started


def opened(browser: webdriver.Chrome, page: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    emulate(browser, scheme)
    browser.get(page.as_uri())
    shown = browser.execute_script("return document.querySelectorAll('details[open]').length")
    assert shown > 10
    drawn = "return [...document.querySelectorAll('details[open] .figure')].every(f => f.querySelector('.main-svg'))"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(drawn))


def emulate(browser: webdriver.Chrome, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def log_of(browser: webdriver.Chrome) -> list[Any]:
    return browser.get_log("browser")  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, pytest.param(1280, marks=pytest.mark.slow)])
def test_the_page_is_drawn_in_every_window(browser: webdriver.Chrome, page: Path, width: int, scheme: str) -> None:
    opened(browser, page, width, scheme)
    assert log_of(browser) == []
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [
        width,
        True,
    ]
    wide = (
        "return [...document.querySelectorAll('.main-svg')].filter("
        "svg => svg.getBoundingClientRect().right > innerWidth || svg.getBoundingClientRect().width < 300).length"
    )
    assert browser.execute_script(wide) == 0
    text = browser.execute_script("return getComputedStyle(document.querySelector('.xtick text')).fill")
    assert (sum(map(int, text[4:-1].split(", "))) > 384) == (scheme == "dark"), text


def test_the_table_and_a_curve_show_what_was_logged(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page, 1280, "light")
    cell = "return document.querySelectorAll('tbody tr')[0].cells[1].textContent"
    assert float(browser.execute_script(cell)) == VAL[90]
    names = browser.execute_script("return document.querySelector('.figure').data.map(trace => trace.name)")
    numbers = browser.execute_script("return [...document.querySelector('.figure')._fullData[0].y]")
    assert numbers == pytest.approx([4.0 + int(names[0][-1]) - step / 100 for step in range(0, 100, 10)], rel=1e-6)


@pytest.mark.slow
def test_a_folded_figure_is_drawn_when_it_is_opened(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page, 390, "light")
    folded = "return document.querySelectorAll('details:not([open])').length"
    assert browser.execute_script(folded) == 6  # two of three runs, three readings
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    drawn = "return [...document.querySelectorAll('.figure')].every(f => f.querySelector('.main-svg'))"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(drawn))
    assert log_of(browser) == []


def test_a_box_hides_its_run_and_a_change_of_the_scheme_is_followed(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page, 1280, "light")
    lines = "return document.querySelector('.figure').querySelectorAll('.scatterlayer .trace').length"
    assert browser.execute_script(lines) == 6  # three runs, training and validation
    browser.execute_script("document.querySelector('input[data-run]').click()")
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(lines) == 4)
    fill = "return getComputedStyle(document.querySelector('.xtick text')).fill"
    before = browser.execute_script(fill)
    emulate(browser, "dark")
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(fill) != before)
    assert browser.execute_script(lines) == 4
    assert log_of(browser) == []
