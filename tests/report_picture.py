"""The README's picture of a report: `python -m tests.report_picture RUN_DIR FILE.png`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from server.report.page import write_report
from tests.browser import chromium, seen

WIDTH = 1200


def take(run_dir: Path, out: Path) -> None:
    """Write what a person sees of a run's report, down to its sites."""
    address = write_report(run_dir).resolve().as_uri()
    out.parent.mkdir(parents=True, exist_ok=True)
    with chromium() as browser, seen(browser, address, width=WIDTH) as found:
        cost = found.page.get_by_role("heading", name="Cost", exact=True).bounding_box()
        assert cost is not None
        clip = {"x": 0.0, "y": 0.0, "width": float(WIDTH), "height": cost["y"] - 24}
        found.page.screenshot(path=out, clip=clip, full_page=True)
    # A page has few colours: a palette takes a third of the bytes.
    Image.open(out).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(out, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"Wrote {sys.argv[2]}")  # noqa: T201
