"""The page: escaped, self-contained, themed, and what it must show is on it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result
from typer.testing import CliRunner

from common.config import read_toml
from common.errors import ConfigError
from server.cli import app
from server.cli_report import try_report
from server.report.comparison import MOST_RUNS, comparison_page, distinct_names
from server.report.drawing import BLUE, INK, drawing
from server.report.markup import live_script, policy
from server.report.page import run_page
from server.report.reading import read_run
from tests.unit.fake_runs import BASE_LOSS, SITES, write_large_run, write_results, write_run


def _page(folder: Path) -> str:
    return run_page(read_run(folder))


def _report(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)], env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    missing = {(2, "north"): "silent", (3, "st-anne"): "norm", (3, "harbour"): "absent"}
    return _page(write_results(write_run(tmp_path_factory.mktemp("full") / "run", missing=missing)))


def test_it_is_one_file_without_script_that_asks_for_nothing(full: str) -> None:
    assert "<script" not in full
    assert not re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"', full)
    assert not re.findall(r"@import|url\((?!#)", full)
    assert "default-src 'none'" in html.unescape(full)
    assert "script-src" not in full


def test_what_people_and_models_wrote_is_escaped(full: str) -> None:
    assert "&lt;script&gt;document.title" in full
    assert "&lt;b&gt;oxygen&lt;/b&gt;" in full
    assert "Aspirin &amp; oxygen." in full


def test_a_metric_of_some_of_the_records_says_of_how_many(full: str) -> None:
    assert "test set, 240 records" in full
    assert "Token F1 (on 120 records)" in full
    assert "Macro F1 (on 120 records)" in full
    assert "Token accuracy (on" not in full


def test_training_whose_seconds_no_site_releases_is_not_said_to_take_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1)
    page = _page(folder)
    assert "train 7" in page
    for name in ("history.jsonl", "summary.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"train": 11.5', '"train": 0.0'))
    page = _page(folder)
    assert "train 0%" not in page
    assert "which train and release no seconds of it" in page


def test_the_page_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    assert str(tmp_path) not in _page(write_run(tmp_path / "run", rounds=1))


def test_a_report_that_cannot_be_drawn_does_not_spoil_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_font(run_dir: Path) -> Path:
        raise RuntimeError("no font is found")

    monkeypatch.setattr("server.report.page.write_report", no_font)
    assert try_report(tmp_path) is None
    assert "No report was written: RuntimeError: no font is found" in capsys.readouterr().err


def test_each_picture_has_a_title_a_caption_and_words_for_it(full: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", full, flags=re.DOTALL)
    assert len(figures) == 15
    for figure in figures:
        title, alt, caption = (
            re.search(pattern, figure, flags=re.DOTALL)
            for pattern in (r"<h3>(.+?)</h3>", r'id="([^"]+)-alt">(.+?)</p>', r"<figcaption>(.+?)<")
        )
        assert title is not None
        assert caption is not None
        assert alt is not None
        assert f'role="img" aria-labelledby="{alt[1]}-alt"' in figure
        assert re.search(r"\d", alt[2]), alt[2]


def test_ids_are_unique_and_every_reference_has_its_target(full: str) -> None:
    ids = re.findall(r'\sid="([^"]+)"', full)
    assert len(set(ids)) == len(ids)
    used = {*re.findall(r'href="#([^"]+)"', full), *re.findall(r"url\(#([^)]+)\)", full)}
    assert used <= set(ids)


def test_pictures_hold_no_colour_of_their_own(full: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL))
    assert "var(--blue)" in drawn
    assert "font-family" not in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000"}
    assert "<style" not in drawn


def test_a_name_with_markup_or_dollars_is_drawn_as_it_is() -> None:
    with drawing("odd") as canvas:
        canvas.axes.plot([1, 2], [1, 2], color=BLUE, label="a<b> $x$")
        canvas.axes.legend(labelcolor=INK)
    root = ElementTree.fromstring(canvas.svg)
    assert any(
        (text.text or "") == "a<b> $x$" for text in root.iter("{http://www.w3.org/2000/svg}text")
    )


def test_it_shows_what_a_report_must(full: str) -> None:
    for said in (
        "Four sites trained together for 4 rounds",
        "the loss is 78% lower than the untouched base",
        "with epsilon at most 8.00 for each record",
        "Epsilon spent",
        "Who took part",
        "Discarded energy",
        "Seconds by phase",
        "Data sent",
        "Learning rate",
        "Memory",
        "By site; st-anne is served worst",
        "Confusion",
        "outside epsilon",
        "Measured against promised",
        "on a twin, not of this release&#39;s data",
        "found at 1% false alarms",
        "Refused updates",
        "train.learning-rate",
    ):
        assert said in full, said


@pytest.mark.parametrize("end", ["stopped", ""])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_page_too(tmp_path: Path, end: str, rounds: int) -> None:
    page = _page(write_run(tmp_path / "run", rounds=rounds, planned=3, end=end))
    assert f"{rounds} of 3 rounds" in page


def test_losses_that_are_no_number_are_told_and_not_drawn(tmp_path: Path) -> None:
    page = _page(write_run(tmp_path / "run", rounds=2, losses=(2.0, float("nan"))))
    assert "no number" in page
    assert "The model diverged" in page


def test_200_rounds_of_50_sites_stay_below_5_mb(tmp_path: Path) -> None:
    page = _page(write_large_run(tmp_path / "run"))
    assert len(page.encode()) < 5e6
    assert page.count("hospital-50") >= 2
    assert "A site that lags" in page


def test_the_command_writes_into_the_runs_folder_and_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    result = _report(folder)
    assert result.exit_code == 0
    assert f"Wrote {folder}/report.html" in result.output
    assert "Four sites" in (folder / "report.html").read_text()


def test_a_folders_name_is_no_markup(tmp_path: Path) -> None:
    """Square brackets are a terminal's markup: "[/v2]" ended the command, "[red]" was left out."""
    folder = write_run(tmp_path / "run [red] [" / "v2]")
    result = _report(folder)
    assert result.exit_code == 0
    assert f"Wrote {folder}/report.html" in result.output


def test_several_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "run")
    second = write_run(
        tmp_path / "b" / "run",
        losses=(3.0, 2.0, 1.5, 1.4),
        protected=False,
        settings={"privacy.unit": "none"},
    )
    out = tmp_path / "both.html"
    result = _report(first, second, "--out", out)
    assert result.exit_code == 0
    # A small page: never "0.0 MB".
    assert re.search(r"both\.html: 0\.0[1-9]\d? MB, open it in a browser", result.output)
    page = out.read_text()
    assert "The lowest loss on the test set is 0.787, of a/run." in page
    assert "do not compare" not in page
    assert "b/run: No differential privacy" in page
    assert ">privacy.unit<" in page
    assert ">train.rounds<" not in page
    assert "<script" not in page


def test_runs_whose_bases_differ_are_not_called_comparable(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, rounds=2) for name in "ab"]
    history = folders[1] / "history.jsonl"
    told = history.read_text()
    assert f'"loss": {BASE_LOSS}' in told
    history.write_text(told.replace(f'"loss": {BASE_LOSS}', '"loss": 9.5'))
    summary = json.loads((folders[1] / "summary.json").read_text())
    summary["central"]["base"]["loss"] = 9.5
    (folders[1] / "summary.json").write_text(json.dumps(summary))
    page = comparison_page(folders)
    assert (
        f"the untouched bases had {BASE_LOSS:.3f} to 9.500: unless the runs share a test set"
        in page
    )


def test_a_run_whose_folder_begins_with_an_underscore_is_named_beside_its_line(
    tmp_path: Path,
) -> None:
    page = comparison_page([write_run(tmp_path / name, rounds=2) for name in ("_old", "new")])
    (loss, *_) = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert "_old<" in loss


def test_too_many_runs_and_the_same_one_twice_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"more than the {MOST_RUNS} whose lines"):
        comparison_page([folder] * (MOST_RUNS + 1))
    with pytest.raises(ConfigError, match="is named twice"):
        distinct_names([folder, folder])


def test_a_page_that_is_served_holds_its_version_and_the_one_script_it_may_run(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "server.report", str(folder), "v1"],
        capture_output=True,
        text=True,
        check=True,
    )
    (script,) = re.findall(r"<script>(.*?)</script>", done.stdout, flags=re.DOTALL)
    assert script == live_script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy(live=True)
    assert 'data-version="v1"' in done.stdout


def test_only_a_command_that_draws_loads_matplotlib() -> None:
    code = (
        "import sys, server.cli, server.up, server.report.serving, server.app, client.app\n"
        "sys.exit(' '.join({'matplotlib'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_pages_are_made_of_is_installed_with_them() -> None:
    checkout = Path(__file__).parents[2]
    patterns = read_toml(checkout / "pyproject.toml")["tool"]["setuptools"]["package-data"][
        "server"
    ]
    shipped = {path for pattern in patterns for path in (checkout / "server").glob(pattern)}
    made_of = set((checkout / "server" / "report" / "templates").iterdir())
    assert len(made_of) >= 5
    assert made_of <= shipped


def test_sites_are_told_in_the_order_of_their_names(full: str) -> None:
    (table,) = re.findall(r"What each site gave and spent</p>(.*?)</table>", full, flags=re.DOTALL)
    assert tuple(re.findall(r'<th scope="row">(.*?)</th>', table)) == SITES
