"""How long a browser takes to open the HTML report of a model of 1,000 layers.

Headless Chromium loads the page from disk; the page's own clock says when the DOM stands, when
everything is loaded, when it is laid out, and how long the first sort and the first search take
(layout included). Painting is not timed. Without Chromium it says so and ends.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, command, parse, write_results
from torch import nn

from rewriter import Report, explain
from rewriter.passes import Monarch, Quantize

LIMIT_MS = 2000
PROBE = """
<script>
addEventListener("load", () => {
  const now = () => performance.now();
  const laid = () => document.body.offsetHeight;
  const [entry] = performance.getEntriesByType("navigation");
  const said = { "DOM ready": entry.domContentLoadedEventEnd, "loaded": now() };
  laid();
  said["loaded and laid out"] = now();
  const timed = (name, act) => { const start = now(); act(); laid(); said[name] = now() - start; };
  const button = [...document.querySelectorAll("#decisions th button")].at(-1);
  timed("first sort", () => button.click());
  const search = document.getElementById("search");
  timed("first search", () => { search.value = "77"; search.dispatchEvent(new Event("input")); });
  said.rows = document.querySelectorAll("#decisions tbody tr").length;
  document.documentElement.setAttribute("data-times", JSON.stringify(said));
});
</script>
"""


def report_of(layers: int) -> Report:
    """A real ledger: `layers` linear layers, each seen by two passes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers))).eval()
    passes = [Monarch(nblocks=4), Quantize("int8-dynamic")]
    return explain(model, passes, torch.randn(8, 32), device="h100")


def opened(chromium: str, page: Path) -> dict[str, float]:
    """Milliseconds since navigation began, in a fresh profile."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-sync",
                "--disable-component-update", f"--user-data-dir={profile}",
                "--window-size=1200,1600", "--dump-dom", page.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    found = re.search(r'data-times="([^"]*)"', done.stdout)
    if found is None:
        raise RuntimeError(f"the page did not finish loading: {done.stderr[-500:]}")
    times: dict[str, float] = json.loads(found[1].replace("&quot;", '"'))
    return times


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="of the model (default 1000, quick 50)")
    args = parse(parser)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("Chromium is not installed, so nothing was measured: apt-get install chromium")
        return
    layers = args.layers or (50 if args.quick else 1000)
    report = report_of(layers)
    start = time.perf_counter()
    html = report.to_html()
    written = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(html.replace("</body>", PROBE + "</body>"), encoding="utf-8")
        runs = [opened(chromium, page) for _ in range(2 if args.quick else 7)]
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "median ms": round(statistics.median(r[name] for r in runs), 1),
            "slowest ms": round(max(r[name] for r in runs), 1),
        }
        for name in runs[0]
        if name != "rows"
    ]
    median = {row["what"]: row["median ms"] for row in rows}
    verdict = "yes" if median["loaded and laid out"] <= LIMIT_MS else "no"
    page_rows = [
        {"what": "layers of the model", "figure": layers},
        {"what": "rows of the layer table", "figure": int(runs[0]["rows"])},
        {"what": "size of the page, kB", "figure": round(len(html.encode()) / 1e3)},
        {"what": "seconds to write it", "figure": round(written, 2)},
        {"what": f"open within {LIMIT_MS / 1e3:.0f} s", "figure": verdict},
    ]
    shown = subprocess.run([chromium, "--version"], capture_output=True, text=True, check=True)
    write_results(
        "report_open",
        "Opening the HTML report of a large model",
        {"Page": page_rows, f"In the browser, {len(runs)} runs": rows},
        command=command(),
        notes=f"{shown.stdout.strip()}, headless, a fresh profile every run, the page read from "
        "disk. The first three rows count from the start of navigation; sort and search are one "
        "action each, the layout after it included. Painting is not timed.",
        out=args.out,
    )


if __name__ == "__main__":
    main()
