"""A real browser for tests of JupyterLab: Debian's Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

from cfiddle_cluster.packages import ensure_packages

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Return the path of a Chromium; install Debian's where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        ensure_packages(["chromium"])
        found = shutil.which("chromium")
        assert found, "apt-get installed no /usr/bin/chromium"
    return found


@contextmanager
def page(**options: Any) -> Iterator[Page]:
    """Give a page of a new browser that knows nobody."""
    with sync_playwright() as playwright:
        # Its own sandbox needs another user than root.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
        finally:
            browser.close()
