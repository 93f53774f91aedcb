"""The built site, walked in a headless Chromium: ``nox -s docs -- walk``.

Every page of ``docs/built`` is opened at the width of a desk and of a phone: its links lead to pages and places that
exist, its pictures load, its formulas have an extent, nothing is wider than the screen, and the console says nothing.
Search finds "lattice". Pictures of three pages at both widths go to ``runs/walk``. Wants Debian's packages ``chromium``
and ``chromium-driver``.
"""

import functools
import http.server
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

from selenium import webdriver
from selenium.webdriver.common.by import By

BUILT = Path(__file__).parent / "built"
PICTURES = Path("runs/walk")
SHOWN = ("index.html", "made/mixers/lattice.html", "performance.html")
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}

# What a page says of itself: its links, ids, pictures that did not load, formulas without an extent, and its width.
LOOK = """
const all = (what) => [...document.querySelectorAll(what)];
return {
  links: all('a[href]').map(a => a.href),
  ids: all('[id]').map(e => e.id),
  broken: all('img').filter(i => i.complete && !i.naturalWidth).map(i => i.src),
  formulas: all('math').length,
  flat: all('article math').filter(m => !m.getBoundingClientRect().width || !m.getBoundingClientRect().height).length,
  overflow: document.scrollingElement.scrollWidth - document.documentElement.clientWidth,
};
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves and says nothing."""

    def log_message(self, *words: Any) -> None:
        """Nothing."""


def serve(folder: Path) -> str:
    """The folder on a port of its own; its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def browser() -> webdriver.Chrome:
    """A headless one that keeps what its console says."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        sys.exit("chromium or chromedriver is not there: apt-get install chromium chromium-driver")
    options.binary_location, driver = map(str, found)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def resize(chrome: webdriver.Chrome, size: str) -> None:
    """A screen of a size of ``SIZES``."""
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def walk(chrome: webdriver.Chrome, home: str, pages: list[str]) -> Iterator[str]:
    """What is wrong, in words."""
    seen: dict[str, dict[str, Any]] = {}
    for size in SIZES:
        resize(chrome, size)
        for page in pages:
            chrome.get(home + page)
            seen[page] = chrome.execute_script(LOOK)
            yield from (f"{page} ({size}): the console says {entry['message']}" for entry in chrome.get_log("browser"))
            yield from (f"{page}: {source} does not load" for source in seen[page]["broken"])
            if seen[page]["flat"]:
                yield f"{page} ({size}): {seen[page]['flat']} formulas have no extent"
            if seen[page]["overflow"] > 0:
                yield f"{page} ({size}): {seen[page]['overflow']} pixels wider than the screen"
    yield from links(home, seen)
    if not any(found["formulas"] for found in seen.values()):
        yield "no page has a formula"


def links(home: str, seen: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Links inside of the site that lead nowhere."""
    for page, found in seen.items():
        for link in sorted(set(found["links"])):
            address, place = urldefrag(link)
            if not address.startswith(home):
                continue
            path = unquote(urlsplit(address).path).lstrip("/") or "index.html"
            if not (BUILT / path).is_file():
                yield f"{page}: {path} is not there"
            elif place and path in seen and unquote(place) not in seen[path]["ids"]:
                yield f"{page}: {path} has no #{place}"


def search(chrome: webdriver.Chrome, home: str, word: str) -> Iterator[str]:
    """The page of a mixer is among what its name finds."""
    chrome.get(f"{home}search.html?q={word}")
    for _ in range(100):
        found = [a.get_attribute("href") or "" for a in chrome.find_elements(By.CSS_SELECTOR, "#search-results li a")]
        if any(f"/{word}.html" in address for address in found):
            print(f"search finds {word} in {len(found)} places")
            return
        time.sleep(0.1)
    yield f"search for {word} finds {found}"


def photograph(chrome: webdriver.Chrome, home: str) -> None:
    """Three pages, whole, at both sizes."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        resize(chrome, size)
        for page in SHOWN:
            chrome.get(home + page)
            chrome.save_screenshot(str(PICTURES / f"{Path(page).stem}-{size}.png"))


def main() -> None:
    """Walk, search, photograph; the exit status says whether all was well."""
    pages = sorted(str(path.relative_to(BUILT)) for path in BUILT.rglob("*.html") if "_static" not in path.parts)
    home, chrome = serve(BUILT), browser()
    try:
        photograph(chrome, home)
        wrong = [*walk(chrome, home, pages), *search(chrome, home, "lattice")]
    finally:
        chrome.quit()
    print(f"{len(pages)} pages at {len(SIZES)} widths: {len(wrong)} faults", *wrong, sep="\n  ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
