"""Pictures of pages for README and docs: `python -m tests.report.screenshot FOLDER docs/images/report.png`."""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.report.browser import browser

LARGEST = 300_000  # bytes


def shoot(page: Path, target: Path, width: int = 1100, height: int = 1180) -> int:
    """Write the first screen of a page as PNG and return its size in bytes."""
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as opened:
        opened.show(page, width=width, height=height)
        raw = Path(profile) / "raw.png"
        opened.picture(raw, whole=False)
        buffer = io.BytesIO()
        with Image.open(raw) as picture:
            picture.convert("RGB").save(buffer, "PNG", optimize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(buffer.getvalue())
    return len(buffer.getvalue())


def main() -> int:
    """Parse, shoot, print the size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="an HTML file, or a folder with report.html")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--height", type=int, default=1180)
    given = parser.parse_args()
    page = given.page / "report.html" if given.page.is_dir() else given.page
    size = shoot(page, given.picture, height=given.height)
    print(f"{given.picture}: {size:,} bytes")
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
