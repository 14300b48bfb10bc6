"""The status page in a browser, over a server with the reference model. Skipped where there is no Chromium.

`SPARSE_SERVE_STATUS_PNG=docs/assets/status.png` makes the picture of the documents anew, from longer prompts.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from tests.test_server import KEY, ROOT, SOON, Process

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURE = os.environ.get("SPARSE_SERVE_STATUS_PNG")
SECRET = "xylophone"  # in every prompt
PROMPT = f"The {SECRET} stands beside the quick brown fox. " * (90 if PICTURE else 8)
SETTINGS = (
  "cache.lanes=4",
  "cache.hbm_bytes=32MiB",
  "cache.dram_bytes=128MiB",
  "scheduler.max_context=2048",
  "sparse.token_budget=512",
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
LONG = 1000 * 4 * SOON  # milliseconds: programs are compiled meanwhile

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: chromium, chromium-browser or google-chrome"),
]


@pytest.fixture
def server():
  of = Process(ROOT / "models/reference", *(f"--set={of}" for of in SETTINGS if PICTURE))
  yield of
  of.close()


@pytest.fixture
def page(server):
  """The page with its key, and in `errors` what its console has said and what it has thrown."""
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
    of = browser.new_page(viewport={"width": 1400, "height": 900})
    of.errors = []
    of.on("console", lambda said: of.errors.append(said.text) if said.type in ("error", "warning") else None)
    of.on("pageerror", lambda error: of.errors.append(str(error)))
    of.on(
      "request", lambda asked: of.errors.append(asked.url) if not asked.url.startswith((server.url, "data:")) else 0
    )
    of.goto(server.url)
    of.get_by_label("API key").fill("another")
    of.keyboard.press("Enter")
    of.get_by_text("not the key").wait_for()
    of.locator("#key").fill(KEY)
    of.keyboard.press("Enter")
    of.locator("main").wait_for()
    yield of
    browser.close()


def ask(server: Process, n: int, max_tokens: int, n_requests: int, pool: ThreadPoolExecutor) -> list[Future[int]]:
  """Statuses, to come."""

  def one(i: int) -> int:
    body = {"prompt": f"{i} {PROMPT}", "max_tokens": max_tokens, "n": n, "ignore_eos": True, "seed": i}
    return server.http.post("/v1/completions", json=body, timeout=SOON * 10).status_code

  return [pool.submit(one, i) for i in range(n_requests)]


def until(page, true: str) -> None:
  """Waits for a condition of the page."""
  deadline = time.monotonic() + LONG / 1000
  while not page.evaluate(true):
    assert time.monotonic() < deadline, f"not {true}: {page.locator('main').inner_text()}"
    page.wait_for_timeout(100)


def fits(page, width: int, scheme: str) -> bytes:
  """Nothing is cut off or beside the page at this width. Returns a picture."""
  page.set_viewport_size({"width": width, "height": 900})
  page.emulate_media(color_scheme=scheme)
  assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
  wide = "[...document.querySelectorAll('section')].filter(s => s.scrollWidth > s.clientWidth + 1).length"
  assert page.evaluate(wide) == 0
  return page.screenshot(full_page=True)


def colors(page) -> list[str]:
  """Of the three phases."""
  of = (
    "['waiting', 'prefill', 'decode'].map(c => getComputedStyle(document.querySelector('.key .' + c)).backgroundColor)"
  )
  return page.evaluate(of)


def lightness(color: str) -> float:
  """0 to 1, as a grey picture has it."""
  red, green, blue = map(int, color.removeprefix("rgb(").removesuffix(")").split(","))
  return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def test_bars_and_numbers_under_load(server, page, tmp_path):
  assert page.locator("#left").inner_text() == "no request yet" and page.locator(".bar").count() == 0
  before = page.locator("#sums").inner_text()
  with ThreadPoolExecutor(8) as pool:
    asked = ask(server, 2, 80 if PICTURE else 40, 3, pool)
    until(page, "document.querySelectorAll('.bar .decode').length >= 2")
    until(page, "+document.querySelector('#n-decode').textContent > 0")
    until(page, "document.querySelectorAll('#tokens polyline').length > 0")
    assert server.http.post("/v1/completions", json={"prompt": SECRET, "n": 0}).status_code == 400
    body = {"prompt": f"gone {PROMPT}", "max_tokens": 300, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body, timeout=SOON * 10) as answer:
      next(answer.iter_lines())
    page.get_by_text("×").nth(1).wait_for(timeout=LONG)
    if PICTURE:
      asked += ask(server, 1, 100, 6, pool)
      until(page, "+document.querySelector('#n-waiting').textContent > 2")
      page.wait_for_timeout(4000)
      page.set_viewport_size({"width": 1000, "height": 900})
      page.screenshot(path=PICTURE, full_page=True)
    assert [of.result() for of in asked] == [200] * len(asked)
  until(page, "document.querySelector('#n-decode').textContent === '0'")
  until(page, "document.querySelector('#sums').innerText.includes('cancelled: 1')")
  after = page.locator("#sums").inner_text()
  assert "0 tokens made" in before and "400: 1" in after and "cancelled: 1" in after and "none" in before
  assert page.locator(".bar").count() == 7 + 6 * bool(PICTURE)
  for part in (".waiting", ".prefill", ".decode"):
    assert page.locator(f".bar {part}").count() >= 1
  page.locator("summary").click()
  assert "cancelled" in page.locator("#rows").inner_text()
  assert SECRET not in page.content() and SECRET not in server.http.get("/status").text

  for scheme in ("light", "dark"):
    for width in (360, 1400):
      (tmp_path / f"{scheme}-{width}.png").write_bytes(fits(page, width, scheme))
    tones = sorted(map(lightness, colors(page)))
    assert tones[1] - tones[0] > 0.15 and tones[2] - tones[1] > 0.15
  assert page.errors == []


def test_it_says_when_the_server_drains_and_when_it_is_gone(server, page):
  with ThreadPoolExecutor(1) as pool:
    asked = ask(server, 1, 60, 1, pool)
    until(page, "+document.querySelector('#n-decode').textContent > 0")
    assert page.locator("#banner").is_hidden() and page.locator("#state").inner_text() == "ok"
    assert page.locator("#down").is_hidden()
    told = "{0: {status: 'ok', counted: true}, 1: {status: 'starting'}, 2: {status: 'failed'}, 3: {status: 'ok'}}"
    says = page.evaluate(f"(replicas({told}), [at('down').hidden, at('down').textContent])")
    assert says[0] is False and says[1].startswith("Replica 1 is starting. Replica 2 has failed")
    assert says[1].endswith("Replica 3 does not answer.")
    assert page.evaluate("[named({id: 'a', replica: 0}), named({id: 'a', replica: null})]") == ["0: a", "a"]
    server.process.send_signal(signal.SIGTERM)
    page.get_by_text("takes no more requests").wait_for(timeout=LONG)
    assert page.errors == []
    assert [of.result() for of in asked] == [200]
  page.get_by_text("does not answer since").wait_for(timeout=LONG)
  assert page.locator("#state").inner_text() == "gone" and page.locator("main.stale").count() == 1
  refused = [said for said in page.errors if "ERR_CONNECTION" in said]  # the browser's own words, which none can stop
  assert page.errors == refused != []
