"""The report as a reader sees it: a browser opens the page, offline, in light and dark, on wide and narrow screens."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

from calibration.fim.report import Findings, page
from calibration.fim.runs import Run, make_run
from calibration.planners.budget import plan_by_fisher
from calibration.planners.files import PlanFile, describe
from tests.calibration.test_plan import convex

LAYERS, HEADS, KV_HEADS = 5, 4, 2
PANELS = (
    *("Compression potential by layer and head", "Condition against trace"),
    *("Fisher spectrum of keys", "Fisher spectrum of values", "Fisher spectrum of attention"),
    *("Weights and activations", "Where the bits go", "Rate and distortion", "Memory of a sequence"),
    "Expected and measured",
)


@pytest.fixture(scope="module")
def run() -> Run:
    """Metrics with a critical head, a head of high potential, and names that are not HTML."""
    metrics, spectra = {}, {}
    for layer in range(LAYERS):
        for head in range(HEADS):
            trace, cond = {0: (0.97, 1e5), 1: (0.4, 5e7)}.get(layer * HEADS + head, (0.6, 1e4))
            place = f"fisher/layer{layer}/head{head}"
            values = {"trace": trace, "cond": cond, "eigmax": 0.1, "energy_r8": 0.9, "effective_rank": 9 + head}
            metrics |= {f"{place}/{name}": value for name, value in values.items()}
            spectra[f"{place}/spectrum"] = [0.5**i for i in range(12)]
        for head in range(KV_HEADS):
            for kind in ("key", "value"):
                spectra[f"fisher/layer{layer}/kvhead{head}/{kind}_spectrum"] = [1.0, 0.5, 0.1, 0.0]
        for kind, value in (("weight", 100.0), ("activation", 20.0)):
            metrics |= {f"fisher/layer{layer}/k_proj_{kind}_{m}": value for m in ("df", "compression")}
    return make_run("a <model> & its </script> heads", metrics, spectra)


@pytest.fixture(scope="module")
def plan() -> PlanFile:
    made = plan_by_fisher(convex((2, LAYERS, KV_HEADS, 4), 0), 320)
    return describe(made, range(LAYERS), "tiny <model>", 0, [(200, 0.3), (320, 0.04), (640, 0.001)])


@pytest.fixture(scope="module")
def findings(run: Run, plan: PlanFile) -> Findings:
    rows: list[dict[str, Any]] = [
        {"planner": name, "bytes_per_token": 320, "predicted_percent": expected, "change_percent": measured}
        for name, expected, measured in (("budget", 4.0, 3.5), ("uniform", 20.0, 18.0), ("tiers", 0.2, -0.1))
    ]
    return Findings(run, plan, 3.1, rows)


class Opened:
    """A page in the browser, what its console said, and what it asked the network for."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.route("**/*", self._pass_files_only)
        self.page.goto(file.as_uri())

    def _pass_files_only(self, route: Route) -> None:
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            self.requests.append(route.request.url)
            route.abort()

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()


@pytest.fixture(scope="module")
def file(findings: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(page(findings), encoding="utf-8")
    return file


@pytest.mark.browser
@pytest.mark.parametrize("width", [1400, 390], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_panel_is_drawn_without_a_word_in_the_console_or_the_network(chromium, file, scheme, width):
    opened = Opened(chromium, file, color_scheme=scheme, viewport={"width": width, "height": 900})
    assert opened.page.locator("h2").all_text_contents() == list(PANELS)
    assert opened.count(".plot .main-svg .xtick") + opened.count(".plot .heatmaplayer image") > len(PANELS)
    drawn = opened.page.evaluate(
        "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.trace, .hm').length)"
    )
    assert all(drawn)
    assert opened.said == []
    assert opened.requests == []
    # Nothing sticks out of the screen.
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.close()


@pytest.mark.browser
def test_colours_follow_the_reader_and_stay_legible(chromium, file):
    opened = Opened(chromium, file, color_scheme="light", viewport={"width": 1000, "height": 900})
    tick = "getComputedStyle(document.querySelector('.xtick text')).fill"
    light = opened.page.evaluate(tick)
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_function(f"{tick} != '{light}'")
    back = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert brightness(light) < 100 < brightness(opened.page.evaluate(tick))
    assert brightness(back) < 60
    opened.page.close()


def brightness(colour: str) -> float:
    """Mean of red, green and blue in ``rgb(r, g, b)``."""
    parts = colour.removeprefix("rgb(").removesuffix(")").split(",")
    return sum(map(float, parts)) / 3


@pytest.mark.browser
def test_decisions_open_with_their_reasons(chromium, file, plan):
    opened = Opened(chromium, file, viewport={"width": 1000, "height": 900})
    opened.page.get_by_text("Every decision").click()
    assert opened.page.get_by_text(plan.layers[0].heads[1].reason).first.is_visible()
    assert opened.page.locator("details table tr").count() == 1 + LAYERS * KV_HEADS
    assert opened.page.get_by_role("heading", level=1).text_content() == "Fisher information and plan: tiny <model>"
    opened.page.close()


def test_numbers_at_the_top_are_those_of_the_findings(findings):
    content = page(findings)
    for number in ("4.00x", "4.00", f"{findings.plan.expected_percent:+.2f} %", "+3.10 %", "1 of 20"):
        assert f"<b>{number}</b>" in content, number


def test_panels_without_data_are_left_out(run, plan):
    assert "Where the bits go" not in page(Findings(run=run))
    alone = page(Findings(plan=plan))
    assert "Where the bits go" in alone
    assert "Condition against trace" not in alone
    assert "Expected and measured" not in alone


def test_the_page_needs_nothing_but_itself(findings):
    content = page(findings)
    assert "<script src" not in content
    assert '<link rel="stylesheet"' not in content
    assert "</script> heads" not in content.split("const figures")[1].split("\n")[0]
