"""The page, the plots, the command and W&B of reports."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from invented_runs import report, shown, write_grid, write_run
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from reft_lightning import cli
from reft_lightning.reporting import plots, records, tables
from reft_lightning.reporting.command import main, write
from reft_lightning.reporting.page import markdown

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """The contents of a page: its elements, whether they nest, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def values(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def made(folder, out, **options):
    return write(report(folder, **options), out)


def pixels(word, size=14.4):
    """Return the width of a word in the page's widest font."""
    return TextPath((0, 0), word, size=size, prop=FontProperties(family="DejaVu Sans")).get_extents().width


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The report of two methods on two sets of data, written once; its folder, next to that of the runs."""
    folder = tmp_path_factory.mktemp("two")
    write_grid(folder / "runs" / "one", seeds=(42, 43))
    write_grid(folder / "runs" / "two", seeds=(42,), data="two")
    write_run(folder / "runs" / "stopped", status="stopped")
    made(folder / "runs", folder / "out")
    return folder / "out"


class TestPage:
    def test_it_holds_every_section_and_every_number(self, two):
        page = Page((two / "report.html").read_text())
        assert page.open == []
        sections = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
        assert sections == {
            "summary", "comparison-1", "comparison-2", "reads", "left-out", "configurations", "versions",
        }  # fmt: skip
        comparisons = report(two.parent / "runs").comparisons
        for table in (tables.score_table, tables.cost_table, tables.measure_table, tables.pair_table):
            for row in (row for comparison in comparisons for row in table(comparison).rows):
                assert all(cell.text in page.text for cell in row)
        assert sum(tag == "svg" for tag, _ in page.elements) == 8
        assert "intervention.rank: 8" in page.text

    def test_a_table_of_pairs_fits_into_1200_pixels(self, two):
        """Cells break between words; what must fit is the longest word of each column, with its padding."""
        text = (two / "report.html").read_text()
        assert ".wraps th, .wraps td { white-space: normal; padding: .32rem .5rem; }" in text
        shown = re.findall(r'<table class="wraps">(.*?)</table>', text, re.DOTALL)
        assert len(shown) >= 2
        for table in shown:
            rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
            assert "McNemar" in rows[0][-1]
            columns = zip(*rows, strict=True)
            widths = [max(pixels(w) for cell in column for w in cell.split()) + 16 for column in columns]
            assert sum(widths) < 1200 - 48

    def test_it_asks_for_nothing_from_outside(self, two):
        text = (two / "report.html").read_text()
        page = Page(text)
        assert page.values("src") == []
        assert all(link.startswith("#") for link in page.values("href") + page.values("xlink:href"))
        assert "@import" not in text
        assert set(re.findall(r"url\((.)", text)) <= {"#"}
        assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed"}
        (policy,) = (
            a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
        )
        assert policy.startswith("default-src 'none'")

    def test_ids_are_unique_and_links_lead_somewhere(self, two):
        page = Page((two / "report.html").read_text())
        ids = page.values("id")
        assert len(ids) == len(set(ids))
        links = page.values("href") + page.values("xlink:href")
        assert len(links) > 50
        assert {link[1:] for link in links} <= set(ids)

    def test_the_same_runs_give_the_same_bytes_in_place_of_earlier_plots(self, two, tmp_path):
        (tmp_path / "plots").mkdir()
        for name in ("mine.png", "17_of-another-report_intervals.png"):
            (tmp_path / "plots" / name).write_text("there before")
        made(two.parent / "runs", tmp_path)
        files = sorted(path.relative_to(two) for path in two.rglob("*.*"))
        assert len(files) == 5 + 16
        for name in files:
            assert (two / name).read_bytes() == (tmp_path / name).read_bytes(), name
        assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")} - {*files} == {
            Path("plots/mine.png")
        }

    @pytest.mark.parametrize(
        ("method", "settings", "used"),
        [
            ("peft/ia3", {"intervention.options": {"r": 4}}, {"method", "heads", "options"}),
            ("none", {}, {"method", "heads"}),
            ("bitfit", {}, {"method", "heads", "options"}),
            ("full", {"intervention.init_from": "a"}, {"method", "heads", "options", "init_from"}),
            ("loreft", {"intervention.dropout": 0.1},
             {"method", "layers", "positions", "tied", "component", "rank", "dropout", "dropout_on", "init", "clip",
              "weight_dtype", "heads", "options"}),
            ("red", {"intervention.rank": None},
             {"method", "layers", "positions", "tied", "component", "dropout", "clip", "heads", "options"}),
            ("loreft", {"intervention.beside": "peft/lora", "intervention.beside_options": {"r": 4}},
             {"method", "layers", "positions", "tied", "component", "rank", "dropout", "init", "clip",
              "weight_dtype", "heads", "options", "beside", "beside_options"}),
        ],
    )  # fmt: skip
    def test_configurations_hold_what_the_method_uses(self, tmp_path, method, settings, used):
        write_run(tmp_path / "runs" / "a", method, settings=settings)
        text = shown(report(tmp_path / "runs"))
        (block,) = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
        names = {line.partition(":")[0].split(".")[1] for line in block.split() if line.startswith("interv")}
        assert names - {"options"} == used - {"options"}
        assert "optimizer.lr: " in block
        assert "seed 42: runs/a<" in text

    def test_names_cannot_write_markup(self, tmp_path):
        method = 'x"><script>alert(1)</script>'
        write_run(tmp_path / "runs" / "a", method, device="<img src=x onerror=alert(1)>")
        page = Page(shown(report(tmp_path / "runs")))
        assert sum(tag == "script" for tag, _ in page.elements) == 1
        assert not any(tag == "img" for tag, _ in page.elements)
        assert method in page.text

    def test_an_unequal_budget_and_a_second_read_stand_out(self, tmp_path):
        write_run(tmp_path / "runs" / "a")
        read = {"task": "boolq", "rows": 60, "time": "2026", "model": "adapted"}
        write_run(tmp_path / "runs" / "b", "red", steps=80, test_reads=[read, read])
        found = report(tmp_path / "runs")
        warnings = re.findall(r'<p class="warn" role="note">(.*?)</p>', shown(found))
        # summary, comparison
        assert sum("unequal budget, steps: loreft 50, red 80" in line for line in warnings) == 2
        assert any("reads of a test split that repeat an earlier one: 1" in line for line in warnings)
        assert "unequal budget" in markdown(found)


class TestPlots:
    def drawn(self, folder):
        (comparison,) = report(folder).comparisons
        return comparison, plots.comparison_plots(comparison)

    def test_each_is_a_picture_in_both_formats(self, tmp_path):
        _, drawn = self.drawn(write_grid(tmp_path))
        assert list(drawn) == ["intervals", "score_parameters", "score_seconds", "learning_curves"]
        for plot in drawn.values():
            assert plot.png.startswith(b"\x89PNG")
            assert "<dc:date>" not in plot.svg
            assert "</svg>" in plot.svg

    def test_what_has_no_data_has_no_plot(self, tmp_path):
        write_run(tmp_path / "a", "frozen", trainable_parameters=0, steps=0, train_seconds=0.0)
        (tmp_path / "a" / "csv" / "metrics.csv").unlink()
        assert list(self.drawn(tmp_path)[1]) == ["intervals"]

    def test_dollars_in_a_name_are_dollars(self, tmp_path):
        for i, method in enumerate((r"lo$\foo$", "a $ b", r"\$x$", "$")):
            write_run(tmp_path / str(i), method)
        assert "intervals" in self.drawn(tmp_path)[1]  # as mathematics they would not parse

    def test_a_diverged_method_is_not_drawn(self, tmp_path):
        write_run(tmp_path / "a", "loreft")
        write_run(tmp_path / "b", "red", metrics={"test/boolq/accuracy": float("nan")})
        assert len(self.drawn(tmp_path)[1]) == 4

    def test_what_is_validated_after_training_is_no_point_of_a_curve(self, tmp_path):
        for seed in (42, 43):
            folder = write_run(tmp_path / str(seed), seed=seed, steps=50)
            # the checkpoint of another step, validated once more
            (folder / "csv" / "metrics.csv").write_text(
                "step,train/loss,val/accuracy\n9,1.0,\n49,0.5,\n49,,0.4\n50,,0.9\n"
            )
        (comparison,) = report(tmp_path).comparisons
        assert comparison.methods[0].runs[0].learning_curve("val/accuracy") == [(50, 0.4)]


class TestCommand:
    def run(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["reft-report", *map(str, arguments)])
        cli.report()

    def test_it_writes_all_files_and_prints_the_scores(self, tmp_path, monkeypatch, capsys):
        write_grid(tmp_path / "runs")
        self.run(monkeypatch, tmp_path / "runs", f"out={tmp_path / 'out'}", "resamples=1000")
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert files == {"report.html", "report.md", "report.tex", "scores.csv", "pairs.csv", "plots"}
        said = capsys.readouterr().out
        assert "tiny, boolq (test)" in said
        assert "loreft" in said
        assert "report.html" in said

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("nowhere",), "nowhere: no such folder; a run folder is"),
            ((), "reft-report FOLDER"),
            (("out=x",), "FOLDER is missing"),
            ((".", "split=train"), "split must be one of validation, test; got 'train'"),
            ((".", "resamples=999"), "must be at least 1000, as fewer give unstable"),
            ((".", "outt=x"), "unknown argument 'outt'"),
        ],
    )
    def test_mistakes_end_with_status_2_and_say_what_to_do(
        self, tmp_path, monkeypatch, capsys, arguments, words
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            self.run(monkeypatch, *arguments)
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert words in said.err + said.out

    def test_the_papers_report_is_still_there(self, tmp_path, monkeypatch, capsys):
        self.run(monkeypatch, "paper", f"folder={tmp_path}", "table=1")
        assert "0 runs in" in capsys.readouterr().out

    def test_without_matplotlib_the_extra_is_named(self, tmp_path, monkeypatch):
        write_run(tmp_path / "a")
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ValueError, match=r"pip install 'reft_lightning\[report\]'"):
            main([tmp_path])

    def test_tables_and_page_go_to_wandb(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setattr(plots, "comparison_plots", lambda comparison: {})  # which take long to draw
        write_grid(tmp_path / "runs")
        main([tmp_path / "runs"], tmp_path / "out", resamples=1000, wandb=True)
        (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
        found = {}
        for path in (folder / "files" / "media" / "table").rglob("*.table.json"):
            found[path.name.split("_")[0]] = json.loads(path.read_text())
        assert tuple(found["scores"]["columns"]) == records.CSV_COLUMNS
        method = records.CSV_COLUMNS.index("method")
        assert [row[method] for row in found["scores"]["data"]] == ["loreft", "red"]
        assert tuple(found["pairs"]["columns"]) == records.PAIR_COLUMNS
        (html,) = (folder / "files" / "media" / "html").rglob("*.html")
        assert html.read_text() == (tmp_path / "out" / "report.html").read_text()


@pytest.fixture
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    return found


def browse(browser, profile, page, *arguments):
    """Open a page in a browser without network access; return what it prints."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND", *arguments, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
class TestBrowser:
    def test_the_page_is_drawn_without_a_network(self, tmp_path, browser):
        from PIL import Image

        write_grid(tmp_path / "runs")
        made(tmp_path / "runs", tmp_path / "out")
        page = tmp_path / "out" / "report.html"
        pictures = {}
        for scheme in ("light", "dark"):
            path = tmp_path / f"{scheme}.png"
            dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
            browse(
                browser, tmp_path / "profile", page, "--window-size=1300,2400", f"--screenshot={path}", *dark
            )
            pictures[scheme] = np.asarray(Image.open(path).convert("RGB")).astype(int)
        light, dark = pictures["light"], pictures["dark"]
        assert light.shape[:2] == (2400, 1300)
        assert (light[0, 0] > 240).all()
        assert (dark[0, 0] < 40).all()
        # text, lines and the colours of both methods
        assert 0.01 < (light.sum(2) < 3 * 128).mean() < 0.3
        for colour in ((0, 114, 178), (213, 94, 0)):
            assert (np.abs(light - colour).sum(2) < 12).sum() > 100

    def test_a_click_on_a_heading_sorts_the_table(self, tmp_path, browser):
        write_grid(tmp_path / "runs")
        text = made(tmp_path / "runs", tmp_path / "out")
        click = "<script>const head = document.querySelector('thead th:nth-child(3)'); head.click();</script>"
        page = tmp_path / "clicked.html"
        page.write_text(text.replace("</body>", f"{click}</body>"))
        document = browse(browser, tmp_path / "profile", page, "--dump-dom")
        first = document[document.index("<tbody>") : document.index("</tbody>")]
        assert first.index(">red<") < first.index(">loreft<")  # the lower score first
        assert text.index(">loreft<") < text.index(">red<")
        assert 'aria-sort="ascending"' in document
