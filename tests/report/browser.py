"""A headless Chromium that shows report pages, for the tests and for the screenshots of `make report`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


class Tab:
    """A page that is open without a network, with what it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, "offline": True} | options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.chart svg').length == "
                                    "document.querySelectorAll('.chart').length")  # fmt: skip

    def tap(self, node: str) -> None:
        """Click a node where it is on the screen."""
        at = self.page.evaluate(
            """name => { const place = document.getElementById("graph"); place.scrollIntoView();
            place.cy.center(place.cy.getElementById(name)); const box = place.getBoundingClientRect();
            const { x, y } = place.cy.getElementById(name).renderedPosition(); return [box.x + x, box.y + y]; }""",
            node,
        )
        self.page.wait_for_timeout(100)
        self.page.mouse.click(*at)
        self.page.wait_for_timeout(300)
