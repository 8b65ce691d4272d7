"""The page of `attnres inspect` in a real browser: Chromium, without a window."""

import shutil

import pytest
import torch

from attnres.analysis.draw.inspect_page import numbers, write_inspection
from attnres.analysis.measure.inspect import inspect
from attnres.data.tokenizer import ByteTokenizer
from attnres.model import Decoder, DecoderConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs a browser: apt-get install chromium chromium-driver", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'attnres[dev]'")
from selenium.webdriver.common.keys import Keys  # noqa: E402

TEXT = "def f(x):\n\treturn x  # \U0001f642 </script>\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    shape = dict(vocab_size=257, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    model = Decoder(DecoderConfig(**shape, residual="block_attnres", residual_options={"block_size": 2}), seed=2)
    torch.nn.init.normal_(model.residual.pseudo_query, generator=torch.Generator().manual_seed(3))
    ids = ByteTokenizer().encode(TEXT).astype(int).tolist()
    found = inspect(model, torch.tensor(ids))
    values = numbers(found, model, ids, ByteTokenizer(), residual="block_attnres", name=TEXT, command=TEXT)
    return write_inspection(values, tmp_path_factory.mktemp("page") / "page.html")[0], values


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, place):
    def look(width=1200, scheme="light"):
        metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(place[0].as_uri())
        return browser

    return look


def levels(browser):
    cells = "[...t.querySelectorAll('.c')].map(c => c.style.getPropertyValue('--t'))"
    script = f"return [...document.querySelectorAll('#maps .heat')].map(t => {cells})"
    return browser.execute_script(script)


def focused(browser):
    return browser.execute_script("return document.activeElement.getAttribute('aria-label')")


def test_it_draws_without_errors_and_without_requests(opened, place):
    browser = opened()
    said = browser.find_element("tag name", "main").text
    assert "Where each layer listens" in said and not any(
        word in said for word in ("undefined", "NaN", "false", "null")
    )
    tokens = browser.find_elements("css selector", ".token")
    assert len(tokens) == len(place[1]["tokens"]) and tokens[9].text == "\u21b5" and tokens[10].text == "\u2192"
    assert browser.get_log("browser") == []
    requests = [
        entry["message"] for entry in browser.get_log("performance") if 'requestWillBeSent"' in entry["message"]
    ]
    assert len(requests) == 1  # the page itself


def test_cells_have_the_weights_that_were_measured(opened, place):
    browser = opened()
    expected = [w for r in (0, 2, 4, 6) for w in place[1]["reads"][r]["mean"]]
    assert [float(t) ** 2 for t in levels(browser)[0]] == pytest.approx(expected, abs=2e-3)
    browser.find_elements("css selector", ".token")[5].click()
    at_token = [row[5] for r in (0, 2, 4, 6) for row in place[1]["weights"][r]]
    assert [float(t) ** 2 for t in levels(browser)[0]] == pytest.approx(at_token, abs=2e-3)
    assert at_token != pytest.approx(expected, abs=5e-3)


def test_the_strip_goes_by_arrow_keys_and_back_to_the_average(opened):
    browser = opened()
    before = levels(browser)
    browser.find_elements("css selector", ".token")[3].click()
    chosen = levels(browser)
    assert chosen[0] != before[0] and focused(browser).startswith("token 3")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert focused(browser).startswith("token 4") and levels(browser)[0] != chosen[0]
    browser.switch_to.active_element.send_keys(Keys.HOME)
    assert focused(browser).startswith("token 0")
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert not focused(browser).startswith("token 0")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert levels(browser) == before


def test_the_readout_covers_nothing_before_a_cell_is_chosen(opened):
    browser = opened()
    place = "return getComputedStyle(document.querySelector('output.read')).position"
    assert browser.execute_script(place) == "static"
    browser.find_elements("css selector", "#maps .c")[0].click()
    assert browser.execute_script(place) == "sticky"


def test_maps_go_by_arrow_keys_and_say_what_a_cell_is(opened, place):
    browser = opened()
    last = browser.find_elements("css selector", "#maps .heat")[0].find_elements("css selector", "tr.last .c")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", last)  # out from under the readout
    last.click()
    assert focused(browser).startswith("The output reads the embedding with weight")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    said = browser.find_element("css selector", "output.read").text
    assert said == focused(browser) and "reads block 1 (layers 1\u20132)" in said
    assert f"{place[1]['reads'][6]['mean'][1]:.3f}" in said and "the loss changes by" in said
    browser.switch_to.active_element.send_keys(Keys.ARROW_UP)
    assert focused(browser).startswith("Layer 5 ")
    assert len(browser.find_elements("css selector", "#maps .heat .on")) == 2  # the same cell, weight and influence


def test_tab_reaches_the_controls(opened):
    browser = opened()
    stops = []
    for _ in range(8):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        stops.append(browser.execute_script("return document.activeElement.className + document.activeElement.tagName"))
    assert "BUTTON" in stops[0] and any("token" in stop for stop in stops)
    assert sum(stop.endswith("TD") for stop in stops) == 4  # one stop a map


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(opened, scheme):
    browser = opened(390, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    words = "return [...document.querySelectorAll('.list thead th')].map(th => [th.scrollWidth, th.clientWidth])"
    assert all(needed <= has for needed, has in browser.execute_script(words))
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    cells = browser.find_elements("css selector", "#maps .c")
    colours = {c.value_of_css_property("background-color") for c in cells[:8]}
    assert len(colours) > 3 and not any(colour.startswith("rgba(0, 0, 0, 0") for colour in colours)
    assert browser.get_log("browser") == []
