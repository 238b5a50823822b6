"""What everyone needs to be able to use it: names, focus, contrast, any width."""

import pytest

from tests.workers_ai.server.page.visitor import QUESTION, press

pytestmark = pytest.mark.browser


def test_tab_reaches_every_control_and_each_shows_that_it_has_the_focus(page, driver):
    from selenium.webdriver.common.keys import Keys

    page.set(temperature=0)
    page.chat()
    page.send(QUESTION)
    page.tokens()[0].click()
    page("document.querySelector('#code summary').click()")
    controls = (
        "[...document.querySelectorAll("
        "'button, input, select, textarea, summary, pre, .scroll, .token[tabindex=\"0\"]')]"
        ".filter(e => e.checkVisibility() && !e.disabled && !(e.type === 'radio' && !e.checked))"
    )
    outline = "(s => [s.outlineStyle, parseFloat(s.outlineWidth)])(getComputedStyle(document.activeElement))"
    count = page(f"{controls}.length")
    assert count > 30
    for _ in range(count + 9):  # once around, through the browser's own controls, where the page has no focus
        press(driver, Keys.TAB)
        if page("document.activeElement !== document.body"):
            style, width = page(outline)
            assert style == "auto" or (style == "solid" and width >= 2), page("document.activeElement.outerHTML")
            driver.execute_script("document.activeElement.dataset.reached = ''")
    assert page(f"{controls}.filter(e => !('reached' in e.dataset)).map(e => e.outerHTML)") == []


def test_every_control_has_a_name(page):
    page.chat()
    unnamed = page(
        "[...document.querySelectorAll('input, select, textarea, button')].filter(e =>"
        " !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim()).map(e => e.outerHTML)"
    )
    assert unnamed == []


# Contrast of every text that is not disabled with what is behind it, as WCAG 2.2 defines it (1.4.3: 4.5 at least).
CONTRAST = """
const channels = color => color.match(/[\\d.]+/g).map(Number);
const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = channels(getComputedStyle(e).backgroundColor);
    if (color.length < 4 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const found = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.matches('input, textarea, select');
  if (!own || !e.checkVisibility() || e.disabled) continue;
  const colors = [getComputedStyle(e).color];
  if (e.placeholder) colors.push(getComputedStyle(e, '::placeholder').color);
  for (const color of colors) {
    const [more, less] = [light(channels(color)), light(behind(e))].sort((x, y) => y - x);
    found.push([(more + 0.05) / (less + 0.05), e.outerHTML.slice(0, 80)]);
  }
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(page, driver, scheme):
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.set(temperature=3, seed=3, max_tokens=40, top_k=40)
    page.send("Tell me a story.")
    page.tokens()[1].click()
    page("fail('An error.')")
    page("document.querySelector('#code summary').click()")
    assert (
        page("new Set([...document.querySelectorAll('.token')].map(t => getComputedStyle(t).backgroundColor)).size")
        >= 4
    )
    found = driver.execute_script(CONTRAST)
    assert len(found) > 100
    assert [text for ratio, text in found if ratio < 4.5] == []
    ink, paper = page(
        "['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n].match(/\\d+/g).map(Number)[0])"
    )
    assert (ink < paper) == (scheme == "light")
    driver.execute_script("document.documentElement.style.setProperty('--faint', '#888')")
    assert [text for ratio, text in driver.execute_script(CONTRAST) if ratio < 4.5] != []  # the check can fail


@pytest.mark.parametrize("width", [360, 640, 900, 1215, 1216, 1440])
def test_nothing_is_cut_off_at_any_width(visit, address, driver, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page = visit(address)
    page("document.getElementById('more').open = true")
    page.set(temperature=1, top_k=40, repetition_penalty=1.1)
    page.chat()
    page("document.getElementById('text').value = arguments[0]", "w" * 200)
    page["send"].click()
    page.settle()
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", page.tokens()[0])
    page.tokens()[0].click()
    page("document.querySelector('#code summary').click()")
    assert page("document.documentElement.scrollWidth") <= width
    wide = page(
        "[...document.querySelectorAll('#settings *, section *, aside > * > *')].filter(e => e.checkVisibility()"
        " && !e.closest('.scroll, .unseen, option') && e.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map(e => e.outerHTML)"
    )
    assert wide == []
    columns = page(
        "['settings', 'log', 'decision'].map(id => document.getElementById(id)).map(e => e.scrollWidth - e.clientWidth)"
    )
    assert max(columns) <= 0
    # The token on show stays in sight, beside or above its decision.
    top = page("document.getElementById('decision').getBoundingClientRect().top")
    bottom = page("document.querySelector('[aria-selected=true]').getBoundingClientRect().bottom")
    assert bottom <= (top if width < 1216 else 800) + 1
