"""The page: what it says without a browser, and what a real one makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report import make_run
from test_report_imports import hostile_csv

from benchmark import report
from benchmark.report import drawings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Run before the page's own script: what goes wrong, and whatever leaves the page, is written into the document.
PROBE = """<script>
const found = { errors: [], requests: [] };
addEventListener("error", (event) => found.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => found.requests.push(event.blockedURI));
addEventListener("load", () => {
  const heads = [...document.querySelectorAll("#summary th button")];
  const column = heads.findIndex((head) => head.textContent === "IQM");
  const read = () => [...document.querySelectorAll("#summary tbody")][0].rows;
  heads[column].focus();
  found.focused = document.activeElement === heads[column];
  heads[column].click();
  found.sorted = [...read()].map((row) => row.cells[column].textContent);
  found.direction = document.querySelector("#summary th[aria-sort]").getAttribute("aria-sort");
  const paper = () => getComputedStyle(document.body).backgroundColor;
  found.light = paper();
  document.getElementById("theme").click();
  found.dark = paper();
  found.ink = getComputedStyle(document.querySelector("figure svg text")).fill;
  found.figures = [...document.querySelectorAll("figure")].map((figure) => {
    const box = figure.querySelector("svg").getBoundingClientRect();
    return [figure.id, box.width > 100 && box.height > 60];
  });
  found.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
  const link = document.querySelector("#figure-curves a[download]");
  found.download = [link.download, atob(link.href.split(",")[1]).split("\\n")[0]];
  found.wide = document.documentElement.scrollWidth <= innerWidth;
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""


class Elements(HTMLParser):
    """Every start tag of a page, and the tags that are left open."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of figure: two tasks, several arms, times, a broken run, hostile imported names."""
    root = tmp_path_factory.mktemp("page")
    for task in ("hopper-local", "toy"):
        for method in ("otpr", "otpr-q", "otpr-u", "otpr-relaxed", "otpr-weighting", "dppo", "frozen"):
            for seed in range(3):
                run = make_run(root, task, method, seed, [0, 50, 100], score=0.3 + 0.05 * len(method))
                metrics = "iteration,time/collect,time/update,time/evaluate,time/transport\n1,2.0,5.0,1.0,0.5\n"
                (run / "metrics.csv").write_text(metrics)
                (run / "run.log").write_text("log\n")
    make_run(root, "toy", "dppo", 3, [0, 50], state="failed", error="<b>broken</b>")
    return report.write_report(root, report.Options((hostile_csv(root / "theirs.csv", ("hopper-local", "toy"), 50),)))


def test_the_page_is_whole_and_points_nowhere_outside(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    page = Elements(text)
    assert page.open == []
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    stems = {attributes["id"] for tag, attributes in page.tags if tag == "figure"}
    assert stems == {f"figure-{stem}" for stem in drawings.STEMS}
    for tag, attributes in page.tags:
        target = attributes.get("href") or attributes.get("src") or ""
        if target.startswith("#"):
            assert target[1:] in ids, target
        elif not target.startswith("data:") and target:
            assert tag == "a" and "://" not in target
            assert (folder / target.replace("%20", " ")).exists(), target
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http://" not in outside and "https://" not in outside
    assert "toy/dppo/seed-3/run.log" not in text and "../toy/dppo/seed-2/run.log" in text


def test_the_page_says_what_lacks(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    assert text.index('id="summary"') < text.index('id="warnings"') < text.index('id="figures"')
    assert "<b>broken" not in text and "&lt;b&gt;broken&lt;/b&gt;" in text
    assert "1 failed" in text and "3 of 4 (1 failed)" in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")
def test_a_browser_opens_it_from_disk(folder: Path, tmp_path: Path) -> None:
    text = (folder / "index.html").read_text()
    probed = tmp_path / "page.html"
    probed.write_text(text.replace("<style>", PROBE + "<style>", 1))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900"]
    done = subprocess.run([*command, "--virtual-time-budget=5000", "--dump-dom", probed.as_uri()],
                          capture_output=True, text=True, check=True, timeout=180)  # fmt: skip
    assert ":CONSOLE" not in done.stderr, done.stderr
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-2000:]
    found = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["errors"] == found["requests"] == found["resources"] == []
    assert found["focused"] and found["direction"] == "ascending"
    values = [float(cell.split(" ")[0]) for cell in found["sorted"]]
    assert values == sorted(values) and len(values) > 3
    assert found["light"] == "rgb(255, 255, 255)" and found["dark"] == "rgb(20, 23, 26)"
    assert found["ink"] == "rgb(228, 231, 234)"
    assert len(found["figures"]) == len(drawings.STEMS) and all(shown for _, shown in found["figures"])
    assert found["download"] == ["curves.csv", "panel,method,env_steps,value,low,high,seeds,quantity,source"]
    assert found["wide"]
