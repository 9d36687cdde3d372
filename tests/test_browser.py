"""The page in a real browser: no errors, nothing wider than the window, both themes, a script that works, and print."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from coconut.report.page import write_report
from fake_outputs import THOUGHT_ROWS, fake_params, fake_question, write_entry, write_outputs, write_thoughts

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
    pytest.mark.slow,
]
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 26)"

# Runs when the page has been laid out, and leaves what it found where `--dump-dom` prints it.
PROBE = """
<script>
window.addEventListener("load", () => {
  const chart = document.querySelector(".chart");
  chart.focus();
  for (let press = 0; press < 3; press++) chart.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  const said = chart.parentElement.querySelector("output").textContent;
  const box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));
  const hovered = chart.parentElement.querySelector("output").textContent;
  const button = document.querySelector(".legend button");
  button.click();
  const off = document.querySelectorAll(".series.off").length;
  const table = document.querySelector("#results table"), column = 3;
  const cells = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[column].textContent));
  const own = cells(), head = table.tHead.rows[0].cells[column].querySelector("button");
  const sorted = [1, 2, 3].map(() => { head.click(); return cells(); });
  const input = document.querySelector(".questions input"), select = document.querySelector(".questions select");
  const count = () => document.querySelector(".questions output").textContent;
  const counts = [count()];
  input.value = "alert 5";
  input.dispatchEvent(new Event("input"));
  counts.push(count(), document.querySelectorAll(".questions .card").length);
  input.value = "";
  select.value = "2";
  select.dispatchEvent(new Event("change"));
  counts.push(count());
  const small = [...document.querySelectorAll(".chart text")].map(text => text.getBoundingClientRect().height);
  document.body.dataset.found = JSON.stringify({
    own, sorted, counts, said, hovered, off, pressed: button.getAttribute("aria-pressed"), smallest: Math.min(...small),
    inner: window.innerWidth, wide: document.documentElement.scrollWidth,
    outside: [...document.querySelectorAll("body *")].filter(one =>
      one.getBoundingClientRect().right > window.innerWidth + 1 && !one.closest(".wide, summary ~ *")
    ).map(one => one.outerHTML.slice(0, 80)),
    back: getComputedStyle(document.body).backgroundColor, text: getComputedStyle(document.body).color,
    unnamed: document.querySelectorAll("svg[role=img]:not([aria-label]), section:not([aria-labelledby])").length,
    headings: [...document.querySelectorAll("h1, h2")].map(one => one.textContent),
  });
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with every part that a page can have, and hostile texts in it."""
    outputs_dir = tmp_path_factory.mktemp("page") / "outputs"
    write_outputs(outputs_dir)
    write_entry(outputs_dir, "base", right="----------")
    hostile = {"question": "</script><script>throw 1</script> " + "a" * 300, "text": "<img src=x onerror=throw>"}
    questions = [fake_question(3, right=True), fake_question(5, right=False, **hostile)]
    write_thoughts(outputs_dir, "latent_2", questions=questions, rows=THOUGHT_ROWS)
    examples = [{"question": f"<img onerror=alert(1)> {n} ?", "steps": [], "answer": str(n)} for n in range(10)]
    (outputs_dir / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in examples))
    write_report(fake_params(), outputs_dir, outputs_dir / "report", examples_dir=outputs_dir)
    return outputs_dir / "report" / "report.html"


def browse(page: Path, *arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}"),
    ]
    done = subprocess.run(
        [*command, *arguments, page.as_uri()], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def look(page: Path, tmp_path: Path, *, width: int, is_dark: bool) -> tuple[dict, list[str]]:
    """Open the page; return what the script above found, and the messages of the browser's console."""
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    theme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    done = browse(copy, f"--window-size={width},900", theme, "--dump-dom", tmp_path=tmp_path)
    (found,) = re.findall(r'<body data-found="(.*?)">', done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(
        found.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    ), console


@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("is_dark", [False, True])
def test_the_page_fits_works_and_is_silent(page, tmp_path, width, is_dark):
    found, console = look(page, tmp_path, width=width, is_dark=is_dark)
    assert console == []
    assert found["inner"] == width
    assert found["wide"] <= width
    assert found["outside"] == []
    assert found["back"] == (DARK if is_dark else LIGHT)
    assert found["text"] != found["back"]
    assert found["unnamed"] == 0
    assert found["smallest"] >= 8, "letters of a chart, in pixels"
    assert found["said"].startswith("at ")
    assert "latent_2: " in found["said"] + found["hovered"]
    assert found["pressed"] == "false"
    assert found["off"] >= 1
    rows = sorted(found["own"])
    assert found["sorted"] == [rows, rows[::-1], found["own"]]
    assert found["counts"] == ["10 of 10", "1 of 10", 1, "5 of 10"], "all, by words, and what the third entry got wrong"
    assert found["headings"][:5] == [
        "models/two-layers, seed 0",
        "The task",
        "Curriculum",
        "Results",
        "Do answers need the thoughts?",
    ]


def test_on_a_telephone_nothing_is_cut_off(page, tmp_path):
    """A browser's own window is 500 pixels wide at least, so the page stands in a frame of 400."""
    (tmp_path / "inner.html").write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        """<body><iframe src="inner.html" width="400" height="800" style="border:0"></iframe><script>
        window.addEventListener("load", () => setTimeout(() => {
          document.body.dataset.found = document.querySelector("iframe").contentDocument.body.dataset.found;
        }, 500));</script></body>""",
        encoding="utf-8",
    )
    done = browse(frame, "--allow-file-access-from-files", "--dump-dom", tmp_path=tmp_path)
    (text,) = re.findall(r'data-found="(.*?)">', done.stdout)
    found = json.loads(text.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["inner"] == 400
    assert found["wide"] <= 400
    assert found["outside"] == []
    assert found["smallest"] >= 8


def test_the_printed_page_has_all_parts_on_some_pages(page, tmp_path):
    pdf = tmp_path / "page.pdf"
    browse(page, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", tmp_path=tmp_path)
    num_pages = len(re.findall(rb"/Type\s*/Page[^s]", pdf.read_bytes()))
    assert 2 <= num_pages <= 8
