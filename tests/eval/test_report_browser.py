"""The page of a run in a real browser: it plays, sorts, answers, and asks nobody for anything."""

import shutil

import pytest

from dit_accel import presets
from dit_accel.eval import attention_maps, fields, report
from dit_accel.eval.looks import Choices
from dit_accel.eval.summary import summarise

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver, and there are none")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--autoplay-policy=no-user-gesture-required", "--force-prefers-reduced-motion",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=driver)
    )
    made.set_script_timeout(PATIENCE)
    yield made
    made.quit()


@pytest.fixture(scope="module")
def root(fake, tmp_path_factory):
    where = tmp_path_factory.mktemp("run") / "first run"
    store = fake.fake_run(where, fake.settings(frames=9))
    calls = list(fields.synthetic((2, 4, 6), heads=2, depth=12, steps=2))
    (where / "attention/maps").mkdir(parents=True)
    made = attention_maps.maps("pisa-0.15", presets.pisa(block_size=8), calls, {0, 1})
    attention_maps.save(made, where / "attention/maps")
    report.write(store, summarise(store, Choices("inception")))
    return where


@pytest.fixture
def page(browser, root):
    """The page, with its clips there; whatever the console said is looked at in the end."""
    browser.get((root / "report.html").as_uri())
    wait(browser, "[...document.querySelectorAll('video')].every((v) => v.readyState >= 2)")
    yield browser
    loud = [
        entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]
    assert not loud


def wait(browser, condition):
    """Until a condition of JavaScript holds."""
    told = browser.execute_async_script(
        f"""const done = arguments[0], end = Date.now() + {PATIENCE - 5} * 1000;
        const look = () => ({condition}) ? done(true)
            : Date.now() > end ? done(false) : setTimeout(look, 40);
        look();"""
    )
    assert told, condition


def press(browser, key):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(key).perform()


def test_the_players_play_together(page):
    videos = "[...document.querySelectorAll('#grid video')]"
    assert page.execute_script(f"return {videos}.length") == 5
    page.find_element("id", "play").click()
    wait(page, f"{videos}.every((v) => v.currentTime > 0.2 && !v.paused)")
    page.find_element("id", "play").click()
    wait(page, f"{videos}.every((v) => v.paused)")
    times = page.execute_script(f"return {videos}.map((v) => v.currentTime)")
    assert page.find_element("id", "play").text == "Play"
    assert max(times) - min(times) < 2 / 8, "within two frames"
    # past the end they begin again, all of them
    page.find_element("id", "seek").send_keys("")
    page.execute_script(f"{videos}.forEach((v) => {{ v.currentTime = v.duration - 0.05; }})")
    page.find_element("id", "play").click()
    wait(page, f"{videos}.every((v) => v.currentTime > 0.1 && v.currentTime < 0.9)")


def test_frames_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.getElementById('clips').scrollIntoView()")
    wait(page, "document.getElementById('clips').getBoundingClientRect().top < innerHeight / 2")
    page.execute_script("return new Promise((done) => setTimeout(done, 200))")
    assert page.find_element("id", "frame").text == "1 / 9"
    for expected in ("2 / 9", "3 / 9"):
        press(page, Keys.ARROW_RIGHT)
        assert page.find_element("id", "frame").text == expected
    press(page, Keys.ARROW_LEFT)
    wait(page, "[...document.querySelectorAll('#grid video')].every("
         "(v) => Math.floor(v.currentTime * 8) === 1)")  # fmt: skip
    press(page, " ")
    wait(page, "document.getElementById('play').getAttribute('aria-pressed') === 'true'")
    press(page, " ")
    wait(page, "document.getElementById('play').getAttribute('aria-pressed') === 'false'")


def test_the_difference_to_dense(page):
    page.execute_script("document.querySelector('input[value=difference]').click()")
    wait(page, "[...document.querySelectorAll('#grid video')].every((v) => v.readyState >= 2)")
    found = page.execute_script(
        """return [...document.querySelectorAll('#grid .card')].map((card) => [
            card.dataset.variant, card.querySelectorAll('video').length,
            [...card.querySelectorAll('.other')].map((v) => getComputedStyle(v).mixBlendMode),
            card.querySelector('.stage').style.filter])"""
    )
    assert found[0] == ["dense", 1, [], ""]
    assert found[2] == ["pisa-0.15", 2, ["difference"], "brightness(4)"]


def test_another_prompt(page):
    page.execute_script(
        "const s = document.getElementById('prompt'); s.value = '2';"
        "s.dispatchEvent(new Event('change'))"
    )
    wait(page, "[...document.querySelectorAll('#grid video')].every((v) => v.readyState >= 2)")
    names = page.execute_script(
        "return [...document.querySelectorAll('#grid video')].map((v) => v.getAttribute('src'))"
    )
    assert names[0] == "samples/dense/0002-2/clip.mp4"
    assert len(names) == 5


def test_tables_sort(page):
    table = "document.getElementById('table-fidelity')"
    read = f"return [...{table}.tBodies[0].rows].map((r) => r.cells[0].dataset.sort)"
    assert page.execute_script(read) == ["dense", "dense-math", "pisa-0.15", "pisa-0.25", "psa"]
    button = page.find_element("css selector", "#table-fidelity th:nth-child(2) button")
    button.click()
    # what is absent comes last, whichever way
    falling = ["dense-math", "pisa-0.25", "pisa-0.15", "psa", "dense"]
    assert page.execute_script(read) == falling
    sign = f"return {table}.tHead.rows[0].cells[1].getAttribute('aria-sort')"
    assert page.execute_script(sign) == "descending"
    button.click()
    assert page.execute_script(read) == ["psa", "pisa-0.15", "pisa-0.25", "dense-math", "dense"]
    assert page.execute_script(sign) == "ascending"


def test_the_slider_answers(page):
    told = page.execute_script(
        """const s = document.getElementById('least'), said = [];
        for (const value of [s.min, s.max]) {
            s.value = value; s.dispatchEvent(new Event('input'));
            said.push(document.getElementById('verdict').textContent);
        }
        return said;"""
    )
    assert told[0].startswith("psa")
    assert "the speed of dense" in told[0]
    assert told[1] == "Dense attention: no method here is near enough."


def test_maps_of_attention(page):
    def look():
        return page.execute_script(
            "const i = document.querySelector('#map-grid img'); return [i.src, i.naturalWidth]"
        )

    kind, width = look()
    assert kind.startswith("data:image/png")
    page.execute_script("document.querySelector('input[name=map][value=error]').click()")
    wait(page, "document.querySelector('#map-grid img').complete")
    error, wider = look()
    assert error != kind
    assert wider > width == 6
    page.execute_script(
        "const s = document.getElementById('map-head'); s.value = '1';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert look()[0] != error
    assert "approximated" in page.find_element("id", "map-grid").text


def test_nothing_is_loaded_from_outside(page, root):
    names = page.execute_script("return performance.getEntries().map((e) => e.name)")
    outside = [name for name in names if "://" in name and not name.startswith(root.as_uri())]
    assert not outside
    refused = page.execute_async_script(
        """const done = arguments[0];
        addEventListener('securitypolicyviolation', (e) => done(e.violatedDirective));
        const image = new Image(); image.src = 'http://127.0.0.1:9/x.png';"""
    )
    assert refused == "img-src"
    page.get_log("browser")  # the refusal was asked for


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        # the table of answers does not hide a part of itself behind a scroll bar either
        hidden = page.execute_script(
            """const box = document.querySelector('.answers').parentElement;
            return box.scrollWidth - box.clientWidth;"""
        )
        assert hidden <= 0
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
