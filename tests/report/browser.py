"""A headless Chromium (Debian's `chromium` and `chromium-driver`), driven by Selenium."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)
AXE = Path(__file__).with_name("axe") / "axe.min.js.gz"
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"  # 4.14.1


def programs() -> tuple[str, str] | None:
    """Paths of the browser and its driver; None where one is missing."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    return (found[0], found[1]) if found[0] and found[1] else None


class Browser:
    """What the tests need of a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def show(
        self,
        page: Path,
        *,
        width: int = 1200,
        height: int = 900,
        scheme: str = "light",
        media: str = "",
    ) -> None:
        """Open a file from disk at this width, colour scheme and medium (`print` or screen)."""
        self._command(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self.driver.get(page.resolve().as_uri())

    def run(self, script: str, *args: Any) -> Any:
        """The value of a function body of JavaScript."""
        return self.driver.execute_script(script, *args)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """The page as PNG: all of it, or what fits the window."""
        shot = self._command("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it would be printed on A4."""
        sheet = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        path.write_bytes(base64.b64decode(self._command("Page.printToPDF", sheet)["data"]))

    def axe(self) -> list[dict[str, Any]]:
        """What axe finds wrong on the page that is open."""
        source = gzip.decompress(AXE.read_bytes())
        if hashlib.sha256(source).hexdigest() != AXE_SHA256:
            raise ValueError(f"{AXE} is not the axe-core that was reviewed")
        self.run(source.decode())
        result = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then(done, e => done({violations: [String(e)]}))"
        )
        found: list[dict[str, Any]] = result["violations"]
        return found

    def _command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(name, parameters)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, closed at the end."""
    from selenium import webdriver

    found = programs()
    if found is None:
        raise FileNotFoundError(
            "chromium and chromedriver: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=found[1], log_output=os.devnull)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
