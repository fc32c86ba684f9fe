"""Pages in a real browser, without network."""

import shutil
import subprocess

import pytest
from matplotlib.image import imread

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def chromium(page, *flags):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--hide-scrollbars",
        "--enable-logging=stderr", "--virtual-time-budget=20000", *flags, f"file://{page}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def photograph(page, photo, width=1100, height=2300):
    """Pixels of a page ``[height, width, 3]``, between 0 and 1; kept as a PNG."""
    chromium(page, f"--screenshot={photo}", f"--window-size={width},{height}")
    pixels = imread(photo)[..., :3]
    assert pixels.shape[:2] == (height, width)
    return pixels
