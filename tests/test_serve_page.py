"""The service's page in a real browser, by keyboard and on a phone."""

from __future__ import annotations

import base64
import shutil
import threading

import pytest
from playwright.sync_api import expect, sync_playwright

from arcflow_runtime import Bundle, Pipeline
from arcflow_serve import models
from tests.conftest import SHAPES_OPTIONS
from tests.serving import WAIT_S, alone, image_of, preview_alone, serve, wait_until, wrap
from tests.test_straight_runtime import Backend, make_straight

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
KEY = "a-key-of-the-service"


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles("shapes", **SHAPES_OPTIONS)


@pytest.fixture(scope="module")
def pipe(bundle):
    with Pipeline.load(bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def running(bundle):
    with serve([bundle]) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Root has no sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function (url, options) -> a page; at the end it must have had no error and asked nobody else."""
    contexts, faults = [], []

    def new(url: str, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_S * 1e3)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if "Content Security Policy" in m.text else None)
        host = url.partition("#")[0].rstrip("/")
        page.on("request", lambda r: None if r.url.startswith((host + "/", "data:", "blob:")) else faults.append(r.url))
        page.goto(url)
        expect(page.locator("#state")).not_to_have_text("connecting")
        return page

    yield new
    for context in contexts:
        context.close()
    assert faults == []


def sources(page) -> list[str]:
    return [x.get_attribute("src") for x in page.locator("#images img").all()]


def pixels(source: str) -> bytes:
    return image_of(source.partition(",")[2]).tobytes()


def finished(page, count: int) -> None:
    expect(page.locator("#images .again")).to_have_count(count, timeout=WAIT_S * 1e3)


def test_by_keyboard_alone(running, open_page, pipe):
    page = open_page(running.url)
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("a yellow heart")
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["width", "height", "n", "seed", "num_inference_steps"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    finished(page, 1)
    assert [pixels(x) for x in sources(page)] == [alone(pipe, "a yellow heart", 3)]
    assert page.locator("#images img").get_attribute("alt") == "a yellow heart"
    # The image opens in a dialog and closes again.
    page.locator("#images .frame button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#large")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#large")).not_to_be_visible()
    page.keyboard.press("Control+Enter")
    finished(page, 2)


def test_every_control_has_a_name(running, open_page):
    page = open_page(running.url)
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select')].filter(x => !x.labels.length).map(x => x.id)"
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"


def test_several_images_with_their_stages(running, open_page, pipe):
    page = open_page(running.url)
    page.fill("#n", "3")
    page.fill("#seed", "42")
    page.click("#go")
    finished(page, 3)
    prompt = page.input_value("#prompt")
    assert [pixels(x) for x in sources(page)] == [alone(pipe, prompt, seed) for seed in (42, 43, 44)]
    first = page.locator("article").first
    stages = [x.split()[0] for x in first.locator(".stages li").all_inner_texts()]
    assert stages[0] == "queue"
    assert {"encode", "backbone", "update", "decode", "compress"} <= set(stages)
    assert first.locator(".bar i").count() == len(stages)
    # The pieces fill the bar.
    widths = first.locator(".bar i").evaluate_all("pieces => pieces.map(x => x.getBoundingClientRect().width)")
    assert sum(widths) >= 0.95 * first.locator(".bar").evaluate("x => x.getBoundingClientRect().width")


@pytest.mark.slow
def test_a_link_makes_the_image_again(running, open_page):
    page = open_page(running.url)
    page.fill("#prompt", "50% of a red circle & a <b>blue</b> heart")
    page.fill("#width", "48")
    page.fill("#num_inference_steps", "3")
    page.click("#go")
    finished(page, 1)
    link = page.locator(".again").evaluate("x => x.href")
    other = open_page(link)
    finished(other, 1)
    assert sources(other) == sources(page)
    assert other.input_value("#prompt") == "50% of a red circle & a <b>blue</b> heart"
    page.click(".again")
    finished(page, 2)
    assert len(set(sources(page))) == 1


@pytest.mark.slow
def test_history(running, open_page):
    page = open_page(running.url)
    page.fill("#prompt", "<img src=x onerror=alert(1)>")
    page.fill("#seed", "5")
    page.click("#go")
    finished(page, 1)
    page.reload()
    entry = page.locator("#history button").first
    expect(entry).to_have_text("<img src=x onerror=alert(1)> - 64x64, seed 5")
    page.fill("#prompt", "")
    entry.click()
    assert page.input_value("#prompt") == "<img src=x onerror=alert(1)>"
    assert page.input_value("#seed") == "5"


@pytest.mark.parametrize(
    ("field", "value", "place", "message"),
    [
        ("width", "63", "size", "width must be a multiple of 16, got 63; the nearest is 64"),
        ("num_inference_steps", "99", "num_inference_steps", "num_inference_steps must be at most 50, got 99"),
        ("n", "11", "n", "n must be at most 10, got 11"),
        ("seed", "abc", "seed", "seed must be a valid integer, got 'abc'"),
        ("seed", "1.5", "seed", "seed must be a valid integer, got 1.5"),
        (
            "seed",
            "18446744073709551615",
            "seed",
            "seed must be at most 9007199254740991 on this page; larger ones need the API",
        ),
    ],
)
def test_errors_are_beside_their_field(running, open_page, field, value, place, message):
    page = open_page(running.url)
    page.fill("#" + field, value)
    page.click("#go")
    expect(page.locator(f"#{place}-error")).to_have_text(message)
    expect(page.locator("#" + field)).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#" + field)).to_be_focused()
    assert page.locator("#" + field).get_attribute("aria-describedby") == f"{place}-error"
    page.fill("#" + field, {"width": "64", "n": "1"}.get(field, ""))
    page.click("#go")
    finished(page, 1)
    expect(page.locator(f"#{place}-error")).to_be_empty()


class Slow:
    """A pipeline that waits after its preview."""

    def __init__(self, pipeline, go_on) -> None:
        self._pipeline, self._go_on = pipeline, go_on

    def __call__(self, prompts, callback_on_preview=None, **arguments):
        def show(step, images):
            callback_on_preview(step, images)
            assert self._go_on.wait(WAIT_S)

        return self._pipeline(prompts, callback_on_preview=show, **arguments)

    def __getattr__(self, name):
        return getattr(self._pipeline, name)


def test_a_partial_image_and_stop(bundle, open_page, pipe):
    go_on = threading.Event()

    def slow(service):
        for model in service.models.values():
            model._pipeline = Slow(model._pipeline, go_on)

    with serve([bundle], slow, lanes=1) as running:
        page = open_page(running.url)
        page.fill("#seed", "8")
        page.click("#go")
        expect(page.locator(".note")).to_have_text("partial image")
        prompt = page.input_value("#prompt")
        assert [pixels(x) for x in sources(page)] == [preview_alone(pipe, prompt, 8)]
        go_on.set()
        finished(page, 1)
        assert [pixels(x) for x in sources(page)] == [alone(pipe, prompt, 8)]
        expect(page.locator(".note")).to_have_count(0)
        go_on.clear()
        page.click("#go")
        expect(page.locator(".note")).to_have_count(1)
        page.keyboard.press("Escape")
        expect(page.locator("article .error").first).to_have_text("Stopped.")
        go_on.set()
        # The service noticed that its client left.
        wait_until(lambda: running.metric("arcflow_requests_running") == 0)
        page.click("#go")
        finished(page, 2)


@pytest.mark.slow
def test_an_error_while_an_image_is_made(bundle, open_page):
    calls = []

    def before(prompts):
        calls.append(prompts)
        if len(calls) == 2:
            raise MemoryError("not enough for this one")

    with serve([bundle], lambda s: wrap(s, before), lanes=1, max_batch=1) as running:
        page = open_page(running.url)
        page.fill("#n", "2")
        page.click("#go")
        why = "there is not enough memory for this image now (not enough for this one)"
        message = f"{why}; try again, or ask for a smaller one"
        expect(page.locator("article .error")).to_have_text(message)
        finished(page, 1)


@pytest.mark.slow
def test_a_service_with_keys(bundle, open_page):
    with serve([bundle], api_keys=(KEY,)) as running:
        page = open_page(running.url)
        message = "this service needs one of its API keys as 'Authorization: Bearer KEY', got none"
        expect(page.locator("#key-error")).to_have_text(message)
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Tab")
        expect(page.locator("#key-error")).to_be_empty()
        page.click("#go")
        finished(page, 1)


def test_on_a_phone(running, open_page):
    page = open_page(running.url, viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    page.fill("#prompt", "a" * 300)
    page.tap("#go")
    finished(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    small = page.evaluate(
        "[...document.querySelectorAll('form button, input, textarea')].filter(x => x.offsetParent && "
        "x.getBoundingClientRect().height < 32).map(x => x.id)"
    )
    assert small == [], "too small for a finger"


@pytest.mark.slow
def test_several_models(bundles, bundle, open_page, tmp_path):
    (tmp_path / "one").symlink_to(bundle)
    (tmp_path / "two").symlink_to(bundles("flux-tiny"))
    with serve([tmp_path / "one", tmp_path / "two"]) as running:
        page = open_page(running.url)
        expect(page.locator("#guidance-field")).to_be_hidden()
        page.select_option("#model", "two")
        # The tiny student of FLUX takes guidance, and larger images.
        expect(page.locator("#guidance-field")).to_be_visible()
        assert page.input_value("#width") == "1024"
        page.fill("#width", "32")
        page.fill("#height", "32")
        page.click("#go")
        finished(page, 1)
        assert "model=two" in page.locator(".again").get_attribute("href")


@pytest.mark.slow
def test_a_negative_prompt(open_page, tmp_path, monkeypatch):
    """The fields show for a bundle that is guided; the link makes the same image again."""
    root = make_straight(tmp_path / "teacher", "qwen-image")
    load = lambda path, *_, **__: Pipeline(Bundle.open(path), Backend())  # noqa: E731
    monkeypatch.setattr(models.Pipeline, "load", staticmethod(load))
    with serve([root]) as running:
        page = open_page(running.url)
        expect(page.locator("#negative-fields")).to_be_visible()
        for name, value in {"width": "48", "height": "32", "seed": "7"}.items():
            page.fill("#" + name, value)
        prompt, size = page.input_value("#prompt"), {"width": 48, "height": 32}
        page.click("#go")
        finished(page, 1)
        page.fill("#negative_prompt", "blurred")
        page.fill("#true_cfg_scale", "2.5")
        page.click("#go")
        finished(page, 2)
        page.fill("#true_cfg_scale", "1")
        page.click("#go")
        finished(page, 3)
        pipe = load(root)
        expected = [
            alone(pipe, prompt, 7, **size),
            alone(pipe, prompt, 7, negative_prompt="blurred", true_cfg_scale=2.5, **size),
            # Without a text it is a space.
            alone(pipe, prompt, 7, negative_prompt=" ", **size),
        ]
        assert [pixels(x) for x in sources(page)] == expected
        page.locator(".again").nth(1).click()
        finished(page, 4)
        assert pixels(sources(page)[0]) == expected[1]
        assert (page.input_value("#negative_prompt"), page.input_value("#true_cfg_scale")) == ("blurred", "2.5")
        page.fill("#true_cfg_scale", "66")
        page.click("#go")
        expect(page.locator("#true_cfg_scale-error")).to_have_text("true_cfg_scale must be between 0 and 65, got 66.0")


def test_the_page_is_one_file_that_asks_nobody(running):
    with running.client() as client:
        response = client.get("/")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "://" not in response.text
    assert len(base64.b64encode(response.content)) < 40_000
