"""`fastgen eval report`: tables, plots and image grids, in a real browser where there is one."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.measures import Point, read_result, read_results
from fastgen.evaluation.plots import quality_plot
from fastgen.evaluation.report_page import _failures_first, grid_of, html_page, tables_of

pytest.importorskip("jinja2", reason="the HTML report needs jinja2 (extra: report)")

COMMITTED = Path(__file__).parents[2] / "docs/results"
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PROMPTS = (
    ("single_object", "a photo of a <b>cat</b> & 'dog'", ("cat", 1)),
    ("counting", "two dogs", ("dog", 2)),
    ("colors", 'a "red" car', ("car", 1)),
)


def verdict(tag: str, text: str, clause: tuple[str, int], correct: bool) -> dict:
    metadata = {"tag": tag, "include": [{"class": clause[0], "count": clause[1]}], "prompt": text}
    reason = "" if correct else f"expected {clause[0]}>={clause[1]}, found 0\n<script>alert(1)</script>"
    return {"tag": tag, "prompt": text, "correct": correct, "reason": reason, "metadata": json.dumps(metadata)}


def result_folder(folder: Path, offset: int = 0) -> Path:
    """A scored folder: 3 prompts with 4 images of several sizes; image i of prompt p is wrong when i + p is odd."""
    records = []
    for number, (tag, text, clause) in enumerate(PROMPTS):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        for image in range(4):
            size = (40, 30) if number else (400, 300)
            pixels = np.full((size[1], size[0], 3), 60 * number + 40, np.uint8)
            Image.fromarray(pixels).save(samples / f"{image:04d}.png")
            name = f"{number:05d}/samples/{image:04d}.png"
            records.append({"filename": name, **verdict(tag, text, clause, (image + number + offset) % 2 == 0)})
    score = 0.5 + offset / 10
    tasks = {tag: {"score": score, "stderr": 0.03 * 3**0.5, "n_images": 4, "n_prompts": 1} for tag, _, _ in PROMPTS}
    data = {"benchmark": "GenEval (HF-M2F)", "detector_name": "hf", "tasks": tasks, "overall": score}
    data |= {"overall_stderr": 0.03, "correct_images": score, "correct_prompts": 1.0, "n_images": 12, "n_prompts": 3}
    data |= {"images": str(folder), "seconds_per_image": 1.5 + offset, "partial": "550 of 553 prompts have no images"}
    (folder / "results.jsonl").write_text("".join(json.dumps({**r, "detector": "hf"}) + "\n" for r in records))
    (folder / "scores.json").write_text(json.dumps(data))
    return folder / "scores.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("results")
    metric = {
        "label": "fid[adm, 50k, inception-tf]",
        "better": "lower",
        "value": 3.25,
        "stderr": 0.1,
        "ci95": [3, 3.5],
    }
    (root / "fid.json").write_text(json.dumps({"benchmark": "FID family", "metrics": {"fid": metric}, "n_images": 50}))
    made = [result_folder(root / "first"), result_folder(root / "second", 1), root / "fid.json"]
    names = ("shapesworld-tiny", "shapesworld-tiny-janus", "bench-dc-latent")
    committed = [COMMITTED / f"{name}.json" for name in names]
    return [*made, *(path for path in committed if path.is_file())]


@pytest.fixture(scope="module")
def page(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_page(read_results(files), "A <title> & more", images=8))
    return path


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the browser; it starts faster on one that it knows."""
    return tmp_path_factory.mktemp("browser") / "profile"


def opened(page: Path, profile: Path, fragment: str = "", *options: str) -> tuple[str, str]:
    """(DOM after the script ran, what the browser's console said)."""
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    logging = ("--disable-dev-shm-usage", "--enable-logging=stderr", f"--user-data-dir={profile}")
    command = [str(CHROMIUM), *fixed, *logging, *options, "--dump-dom", f"{page.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


def figures(dom: str) -> list[tuple[str, str, bool]]:
    """(class, task, hidden) of every figure."""
    tags = re.findall(r"<figure ([^>]*)>", dom)
    return [(re.search(r'class="(\w+)"', t)[1], re.search(r'data-task="(\w+)"', t)[1], "hidden" in t) for t in tags]


@browser
def test_in_a_browser_with_all_its_content_and_no_script_errors(page: Path, profile: Path) -> None:
    dom, console = opened(page, profile)
    assert console == "" and 'data-ready="yes"' in dom
    assert len(figures(dom)) == 16 and not any(hidden for _, _, hidden in figures(dom))
    assert "16 of 16 images" in dom
    for words in ("GenEval (HF-M2F), detector=hf", "50.0 ± 3.0", "3.250 (3.000 … 3.500)", "Quality against time",
                  "expected dog&gt;=2, found 0", "partial: 550 of 553"):  # fmt: skip
        assert words in dom
    assert "<h1>A &lt;title&gt; &amp; more</h1>" in dom
    assert "a photo of a &lt;b&gt;cat&lt;/b&gt;" in dom and "<script>alert" not in dom
    assert dom.count("<svg") >= 1 and dom.count("<circle") >= 2


@browser
@pytest.mark.slow
def test_links_into_the_page_filter_its_images(page: Path, profile: Path) -> None:
    dom, console = opened(page, profile, "#verdict=wrong&task=counting&theme=dark")
    shown = [(kind, task) for kind, task, hidden in figures(dom) if not hidden]
    assert set(shown) == {("wrong", "counting")} and console == ""
    assert f"{len(shown)} of 16 images" in dom and 'data-theme="dark"' in dom


@browser
@pytest.mark.slow
def test_a_script_error_would_be_seen(page: Path, profile: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("const root =", "const root = nonsense.property; const other ="))
    dom, console = opened(broken, profile)
    assert "nonsense is not defined" in console and "data-ready" not in dom


@browser
def test_light_and_dark(page: Path, profile: Path, tmp_path: Path) -> None:
    """Three copies of the page in one picture, on a system that prefers dark: as chosen, and as the system."""
    frames = [f'<iframe src="{page.as_uri()}{part}"></iframe>' for part in ("#theme=light", "#theme=dark", "")]
    style = "<style>body{margin:0}iframe{display:block;border:0;width:900px;height:300px}</style>"
    (tmp_path / "frames.html").write_text(style + "".join(frames))
    shot = tmp_path / "shot.png"
    options = ("--window-size=900,1000", f"--screenshot={shot}", "--blink-settings=preferredColorScheme=0")
    opened(tmp_path / "frames.html", profile, "", *options)
    with Image.open(shot) as image:
        light, dark, system = (
            np.asarray(image.convert("L"), dtype=int)[top : top + 290, :880] for top in (5, 305, 605)
        )
    assert np.median(light) == 255 and light.min() < 60
    assert np.median(dark) < 20 and dark.max() > 220
    assert np.median(system) == np.median(dark) and abs(system.mean() - dark.mean()) < 2


# --- without a browser -------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    kinds = {source[:15] for source in sources}
    assert kinds == {"data:image/png;", "data:image/jpeg"[:15]}


def test_failures_come_first_and_tasks_take_turns(files: list[Path]) -> None:
    grid = grid_of(read_result(files[0]), 12)
    assert grid is not None and [item.correct for item in grid.items] == [False] * 6 + [True] * 6
    assert [item.tag for item in grid.items][:3] == ["single_object", "counting", "colors"]
    assert "6 of 12 images are wrong; 12 are shown, detector=hf" in grid.note
    assert len(grid_of(read_result(files[0]), 5).items) == 5 and grid_of(read_result(files[0]), 0) is None
    assert _failures_first([]) == []


def test_missing_or_damaged_images_are_reported(tmp_path: Path) -> None:
    file = result_folder(tmp_path / "run")
    (tmp_path / "run/00000/samples/0001.png").unlink()
    (tmp_path / "run/00001/samples/0000.png").write_bytes(b"nonsense")
    text = html_page([read_result(file)], images=12)
    assert "00000/samples/0001.png is gone" in text and "00001/samples/0000.png: not a readable image" in text
    assert text.count("<figure") == 12
    (tmp_path / "run/results.jsonl").write_text("{}\n")
    with pytest.raises(FastgenError, match="results.jsonl:1"):
        html_page([read_result(file)])


def test_a_moved_folder_finds_its_images(tmp_path: Path) -> None:
    file = result_folder(tmp_path / "run")
    data = json.loads(file.read_text()) | {"images": "somewhere/else"}
    file.write_text(json.dumps(data))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    grid = grid_of(read_result(moved / "scores.json"), 12)
    assert grid is not None and all(item.source for item in grid.items)


def test_budgets_of_a_policy_are_one_series() -> None:
    result = read_result(COMMITTED / "bench-search.json")
    rows = {(row["policy"], row["budget"]): row for row in result.data["rows"]}
    assert len(result.points) == len(rows)
    by_series: dict[str, set[str]] = {}
    for point in result.points:
        by_series.setdefault(point.series, set()).add(point.name)
    assert by_series["none"] == {"none"} and "rbf, 100 passes" in by_series["rbf"] and len(by_series["rbf"]) >= 5
    (point,) = (point for point in result.points if point.name == "rbf, 100 passes")
    row = rows["rbf", 100]
    assert (point.score, point.seconds) == (row["score"], row["seconds"])
    assert point.stderr == pytest.approx((row["score_ci"][1] - row["score_ci"][0]) / 3.92)
    assert 'class="point"' in html_page([result]) and "no numbers that this page knows" not in html_page([result])


def test_tables_mark_the_best(files: list[Path]) -> None:
    first, second = (table for table in tables_of(read_results(files[:3])))
    assert first.title == "GenEval (HF-M2F), detector=hf" and second.title == "FID family"
    assert [row[0].text for row in first.rows] == ["first", "second"]
    overall = [row[1] for row in first.rows]
    assert [(cell.text, cell.best) for cell in overall] == [("50.0 ± 3.0", False), ("60.0 ± 3.0", True)]
    assert first.header[-4:] == ["correct images", "correct prompts", "images", "s/image"]
    assert not any(cell.best for row in second.rows for cell in row)  # nothing to compare with


def test_plot_positions() -> None:
    """Twice as long lies at equal distances on the logarithmic axis; better lies higher; errors are drawn."""
    points = [Point("a", f"p{i}", 2.0**i, 0.2 + 0.1 * i, 0.05 * i) for i in range(5)]
    svg = quality_plot(points, "score")
    circles = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    steps = np.diff(np.array(circles), axis=0)
    assert np.allclose(steps, steps[0], atol=0.11) and steps[0][0] > 0 > steps[0][1]
    assert svg.count('class="error"') == 4 and "seconds a picture, logarithmic" in svg
    assert svg.count("<polyline") == 1 and html.escape("p4: 60.0 ± 20.0 %, 16 s") in svg
    one = quality_plot([Point("a & b", "x", 0.0, 0.0, None)], "score")
    assert one.count("<circle") == 1 and "nan" not in one
    many = quality_plot([Point(str(i), "x", 1.0 + i, 0.5, None) for i in range(10)], "score")
    assert (many.count("<circle"), many.count("<rect")) == (8, 2)
    with pytest.raises(ValueError, match="needs points"):
        quality_plot([], "score")


def test_command_writes_all_three(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = [str(tmp_path / "x" / f"report.{kind}") for kind in ("html", "md", "csv")]
    assert run(["eval", "report", *map(str, files), *(part for path in out for part in ("-o", path))]) == 0
    assert capsys.readouterr().out.split() == out
    rows = list(csv.DictReader(Path(out[2]).read_text().splitlines()))
    overall = [row for row in rows if row["result"] == "second" and row["measure"] == "overall"]
    assert len(overall) == 1 and float(overall[0]["value"]) == 0.6 and overall[0]["detector"] == "hf"
    (distance,) = (row for row in rows if row["benchmark"] == "FID family")
    assert (distance["better"], distance["ci95_low"], distance["value"]) == ("lower", "3.0", "3.25")
    text = Path(out[1]).read_text()
    assert "## GenEval (HF-M2F), detector=hf" in text and "| second | **60.0 ± 3.0** |" in text
    assert "| second | second | 2.500 | 60.0 | 3.0 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json", "-o", "r.pdf"], "r.pdf is not allowed"),
        (["a.json", "-o", "r.html", "--images", "-1"], "--images: -1"),
        (["none.json", "-o", "r.html"], "none.json"),
        (["bad.json", "-o", "r.html"], "bad.json: is no result"),
        (["empty.json", "-o", "r.html"], "no numbers to report"),
        (["a.json", "-o", "file/r.html"], "file"),
    ],
)
def test_bad_options(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result_folder(tmp_path / "a").rename(tmp_path / "a.json")
    Path("bad.json").write_text('{"rows": []}')
    Path("empty.json").write_text('{"benchmark": "x"}')
    Path("file").write_text("")
    assert run(["eval", "report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("r.html").exists()


def test_results_of_equal_names_get_different_labels(tmp_path: Path) -> None:
    for folder in ("a/run", "b/run"):
        result_folder(tmp_path / folder)
    names = [result.name for result in read_results([tmp_path / "a/run/scores.json", tmp_path / "b/run/scores.json"])]
    assert len(set(names)) == 2 and all(name.endswith("/run") for name in names)


# --- results from anybody ------------------------------------------------------------------------------------------


def _one_image(folder: Path, filename: str, **more: object) -> Path:
    """A result whose only picture has this name."""
    file = result_folder(folder)
    line = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    (folder / "results.jsonl").write_text(json.dumps({**line, "filename": filename}))
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    return file


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "private/secret.png")
    return tmp_path / "private/secret.png"


@pytest.mark.parametrize(
    "way", ["parent", "absolute", "link", "linked folder", "images", "images and verdicts", "deep"]
)
def test_no_picture_outside_the_folder_of_a_result_is_embedded(tmp_path: Path, secret: Path, way: str) -> None:
    run_folder = tmp_path / "run"
    names = {"parent": "../private/secret.png", "absolute": str(secret), "link": "link.png"}
    names |= {"linked folder": "place/secret.png", "images": "secret.png", "deep": "a/../../private/secret.png"}
    more = {"images": str(secret.parent)} if way.startswith("images") else {}
    file = _one_image(run_folder, names.get(way, "secret.png"), **more)
    (run_folder / "a").mkdir()
    (run_folder / "link.png").symlink_to(secret)
    (run_folder / "place").symlink_to(secret.parent)
    if way == "images and verdicts":
        (run_folder / "results.jsonl").rename(secret.parent / "results.jsonl")
        assert grid_of(read_result(file), 4) is None
    else:
        (item,) = grid_of(read_result(file), 4).items
        assert item.source == "" and "not below the folder of its result" in item.problem
    grid = grid_of(read_result(file), 4, [secret.parent])  # whom the user names is shown
    assert grid is not None and grid.items[0].source.startswith("data:image/png")


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    file = _one_image(tmp_path / "run", "inner.png")
    (tmp_path / "run/inner.png").symlink_to("00000/samples/0000.png")
    assert grid_of(read_result(file), 4).items[0].source


EVIL = "![x](http://e.vil/a.png) <img src=x onerror=alert(1)> [l](javascript:1) | `c` **b** www.e.vil a@e.vil\n# h"


def test_texts_of_others_stay_texts_in_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of tasks, detectors, files and notes come from prompts: a Markdown reader finds no markup in them."""
    markdown = pytest.importorskip("markdown_it")
    file = result_folder(tmp_path / "run")
    data = json.loads(file.read_text())
    data["tasks"] = {(EVIL if tag == "colors" else tag): task for tag, task in data["tasks"].items()}
    file.write_text(json.dumps({**data, "benchmark": EVIL, "detector_name": EVIL, "partial": EVIL}))
    assert run(["eval", "report", str(file), "--title", EVIL, "-o", str(tmp_path / "r.md")]) == 0
    assert run(["eval", "compare", str(file), str(file)]) == 0
    reader = markdown.MarkdownIt("commonmark").enable("table")
    for text in ((tmp_path / "r.md").read_text(), capsys.readouterr().out):
        page = reader.render(text)
        assert "onerror=alert" in html.unescape(page)
        assert not re.search(r"<(img|a|code|script|h1>\s*h)\b", page), page
        for table in page.split("<table>")[1:]:
            assert {row.count("<td") for row in table.split("<tr>")[2:]} == {table.count("<th>") + table.count("<th ")}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " ="])
def test_no_text_of_others_is_a_formula_in_a_spreadsheet(tmp_path: Path, start: str) -> None:
    file = result_folder(tmp_path / "run")
    data = json.loads(file.read_text())
    data["tasks"] = {(f"{start}cmd|'/c calc'!A0" if tag == "colors" else tag): t for tag, t in data["tasks"].items()}
    file.write_text(json.dumps({**data, "fd_shapes": {"value": 0.25, "protocol": "FD"}}))
    assert run(["eval", "report", str(file), "-o", str(tmp_path / "r.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [row["measure"] for row in rows if "calc" in row["measure"]] == [f"'{start}cmd|'/c calc'!A0"]
    assert {row["value"] for row in rows} == {"0.5", "0.25"}  # numbers stay numbers
