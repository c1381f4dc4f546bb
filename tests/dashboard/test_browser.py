"""The dashboard in Debian's chromium, by clicks, on a run that is going on."""

import shutil
import subprocess
import sys
import time

import pytest

from tests.dashboard.conftest import Run, served

HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
RECIPE = """
name: going
model: embedded
data: {source: office, office: {clients: 3, rows: 60, test_rows: 12, client_test_rows: 4}}
method: fedavg
space: {name: lora, rank: 4}
local: {optimizer: sgd, lr: 0.1, steps: 2, batch_size: 4, max_length: 64}
rounds: 60
evaluate: {every: 20, clients: false}
"""


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
def test_a_run_is_watched_stopped_and_resumed_by_clicks(root, browser, tmp_path):
    Run(root, "hostile", method={"name": HOSTILE}).round(0, [HOSTILE, "b"]).test(1, **{HOSTILE: 0.5}).log.close()
    (tmp_path / "going.yaml").write_text(RECIPE)
    words = [sys.executable, "-m", "fedllm.cli.main", "run", str(tmp_path / "going.yaml"), "--root", str(root)]
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with served(root) as address:
            watch(browser.new_page(viewport={"width": 1400, "height": 900}), address, run)
    finally:
        run.kill()
    assert (root / "going" / "result.json").is_file()


def watch(page, address, run):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(address)
    page.get_by_role("link", name="going").click(timeout=120_000)
    done = page.locator(".figure", has_text="rounds done").locator("strong")
    page.wait_for_function("document.querySelector('.figure strong').textContent.startsWith('3 of 60')"
                           " || Number(document.querySelector('.figure strong').textContent.split(' ')[0]) > 3",
                           timeout=180_000)
    first = int(done.inner_text().split()[0])
    assert page.locator(".js-plotly-plot .scatterlayer .point").count() > 3  # curves are drawn under the policy
    assert page.locator("tbody tr", has_text="office-00").count() == 1
    page.get_by_role("button", name="Stop").click()
    page.locator("header .badge", has_text="stopped").wait_for(timeout=60_000)
    assert run.wait(60) == 130 and "by hand" in page.locator("header").inner_text()
    page.get_by_role("button", name="Resume").click()
    page.locator("header .badge", has_text="running").wait_for(timeout=120_000)
    page.locator("header .badge", has_text="finished").wait_for(timeout=240_000)
    assert done.inner_text() == "60 of 60" and first < 60
    page.get_by_role("link", name="fedllm dashboard").click()
    for box in page.get_by_role("checkbox").all():
        box.check()
    page.get_by_role("button", name="Side by side").click()
    page.get_by_role("link", name="hostile").click()
    page.get_by_text("<img src=x").first.wait_for()
    time.sleep(1)
    assert page.title() == "hostile - fedllm dashboard" and page.locator("img").count() == 0 and not errors, errors
    for width in (400, 900, 1400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width


@pytest.mark.slow
def test_long_names_many_clients_and_the_keyboard(root, browser):
    """Nothing runs out of its place at any width, and what the keyboard is at stays while the record grows."""
    names = [f"a_sweep_over_rates_with_a_rather_long_name_number_{i}" for i in range(6)]
    going = Run(root, "going", rounds=9).round(0, [f"hospital-{i}" for i in range(200)])
    for name in names:
        Run(root, name).round(0).test(1).round(1).test(2).log.close()
    going.log.flush()
    with going.folder.held(), served(root) as address:
        page, errors = browser.new_page(viewport={"width": 1400, "height": 900}), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        box = page.get_by_label(f"side by side: {names[2]}")
        box.focus()
        for n in (1, 2, 3):
            going.round(n).log.flush()
            page.get_by_text(f"{n + 1} of 9").wait_for()
        assert page.evaluate("document.activeElement.ariaLabel") == f"side by side: {names[2]}"
        for other in page.get_by_role("checkbox").all():
            other.check()
        page.get_by_role("button", name="Side by side").click()
        page.get_by_text("Figures").wait_for()
        for width in (1400, 400, 800):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function("[...document.querySelectorAll('.chart')].every(c => c.wide === c.clientWidth)")
            legend, label = page.evaluate("""['.legend', '.side tbody th'].map((at) => {
                const box = document.querySelector(at).getBoundingClientRect();
                return [box.right, box.bottom, box.width];
            })""")
            top = page.evaluate("document.querySelector('.nsewdrag').getBoundingClientRect().top")
            assert legend[0] <= width and legend[1] <= top + 2, (width, legend, top)  # it lies over no curve
            assert label[2] >= 100 and page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        page.goto(f"{address}#/run/{page.evaluate('list.runs[1].id')}")
        page.locator("h1", has_text=names[1]).wait_for()
        page.set_viewport_size({"width": 400, "height": 900})
        assert page.title() == f"{names[1]} - fedllm dashboard" and not errors, errors
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
