"""The HTML report: self-contained, escaped, and honest about seeds."""

import base64
import copy
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest

from attnres.analysis.draw import figures
from attnres.analysis.draw import report as report_module
from attnres.analysis.draw.pictures import HEAT_LEVELS, heat_tables, inline_svg
from attnres.analysis.draw.report import write_report
from attnres.errors import Failure, UsageError

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Tree(HTMLParser):
    """Checks that tags nest; collects tags, attributes and visible text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


@pytest.fixture
def results(make_results):
    return copy.deepcopy(make_results(3))


@pytest.fixture(scope="module")
def html(make_results, tmp_path_factory):
    path = write_report(make_results(3), tmp_path_factory.mktemp("report") / "new")
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def words_only(monkeypatch):
    """Leaves the line figures out, which take a second to draw and say nothing about the words around them."""
    monkeypatch.setattr(report_module, "_curves", lambda results, named: "")


def report(results, tmp_path):
    return write_report(results, tmp_path).read_text(encoding="utf-8")


def set_losses(results, losses):
    """Final validation losses by mechanism, one a seed, in the runs and in the summary."""
    results["runs"] = [run for run in results["runs"] if run["residual"] in losses]
    results["summary"] = [row for row in results["summary"] if row["residual"] in losses]
    for row in results["summary"]:
        own = losses[row["residual"]]
        for run, loss in zip(figures.runs_of(results, row["residual"]), own, strict=True):
            run["val_loss"] = loss
        row["val_loss"] = sum(own) / len(own)
        row["difference"] = row["val_loss"] - results["summary"][0]["val_loss"]


def rows_of(html):
    """Cell texts of the summary table's rows, by first cell."""
    table = re.search(r'<table class="results".*?</table>', html, re.DOTALL)[0]
    rows = [[re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<t[hd] .*?</t[hd]>", row)]
            for row in re.findall(r"<tr.*?</tr>", table)]  # fmt: skip
    return {row[0]: row[1:] for row in rows}


def test_needs_nothing_but_itself(html):
    assert len(html) < 1_500_000
    assert "://" not in html and "@import" not in html and "url(" not in re.sub(r"url\(#", "", html)
    for tag, attributes in Tree(html).tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")


def test_policy_allows_the_script_and_nothing_to_load(html):
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for t, a in Tree(html).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_ids_are_unique_and_every_reference_resolves(html):
    ids = [attributes["id"] for _, attributes in Tree(html).tags if "id" in attributes]
    references = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert len(ids) == len(set(ids))
    assert references and set(references) == set(ids)


def test_inlined_figures_follow_the_page_and_leave_it_alone(html):
    svgs = re.findall(r"<svg viewBox.*?</svg>", html, re.DOTALL)
    figures_only = [svg for svg in svgs if 'role="img"' in svg]
    assert len(figures_only) == 3
    for svg in figures_only:
        assert "<style" not in svg and "<metadata" not in svg and "font-family" not in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg)  # a fixed colour would vanish on one of the two papers
        assert "<text" in svg and "var(--m2)" in svg
    assert "prefers-color-scheme: dark" in html
    for variable in set(re.findall(r"var\((--\w+)\)", html)):
        assert f"{variable}:" in html


def test_an_inlined_figure_rounds_its_drawing_and_not_its_numbers(results):
    small = copy.deepcopy(results)
    for run in small["runs"]:
        run["gradient_magnitude"] = [0.005 + 0.02 * i / len(run["gradient_magnitude"]) for i in range(4)]
    svg = inline_svg(figures.gradient_magnitude(small), "g", "gradients", {})
    texts = re.findall(r"<text[^>]*>([^<]*)", svg)
    ticks = [text for text in texts if text.startswith("0.0")]
    assert len(ticks) == len(set(ticks)) > 2 and any(len(tick) > 4 for tick in ticks)
    assert not re.search(r"\d\.\d{3}", re.sub(r">[^<]*<", "><", svg))


def test_text_from_the_results_is_escaped(results, tmp_path):
    evil = "<script>alert('x')</script>&\""
    results["corpus"]["name"] = results["command"] = results["device"] = results["version"] = results["commit"] = evil
    results["train"] = {evil: {evil: evil}}
    results["runs"].append(results["runs"][0] | {"residual": evil})
    results["summary"].append(results["summary"][0] | {"residual": evil, "val_loss": 0.5})
    html = report(results, tmp_path)
    assert html.count("<script>") == 1 and "<script>alert" not in html
    assert "".join(Tree(html).text).count(evil) >= 9


@pytest.mark.usefixtures("words_only")
def test_summary_shows_every_measure(results, tmp_path):
    set_losses(results, {"prenorm": [2.0, 2.0, 2.0], "full_attnres": [1.9, 1.9, 1.9]})
    results["summary"][1] |= {"val_loss_spread": 0.0126, "throughput_ratio": 0.934, "peak_memory_bytes": 3 * 2**29,
                              "parameters": 9_458_432, "tokens": 614_400}  # fmt: skip
    row = rows_of(report(results, tmp_path))["Full AttnRes"]
    loss, difference, throughput, memory, parameters, tokens = row
    assert loss.split() == ["1.900", "spread", "0.013"]
    assert difference.startswith("\N{MINUS SIGN}0.100")
    assert [throughput, memory, parameters, tokens] == ["0.93\N{MULTIPLICATION SIGN}", "1.50 GiB", "9.46 M", "614 k"]


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([1.9, 1.91, 1.89], "beyond the seed spread"),
        ([1.99, 2.03, 1.96], "within the seed spread"),
        ([2.2, 2.2, 2.21], "beyond the seed spread"),
    ],
)
def test_differences_are_judged_against_their_spread_over_seeds(results, tmp_path, losses, verdict):
    set_losses(results, {"prenorm": [2.0, 2.0, 2.0], "block_attnres": losses})
    assert verdict in rows_of(report(results, tmp_path))["Block AttnRes"][1]


@pytest.mark.usefixtures("words_only")
def test_what_a_seed_shifts_alike_does_not_count_as_spread(results, tmp_path):
    set_losses(results, {"prenorm": [2.0, 2.5, 3.0], "block_attnres": [1.9, 2.4, 2.91]})
    assert "beyond the seed spread" in rows_of(report(results, tmp_path))["Block AttnRes"][1]


@pytest.mark.usefixtures("words_only")
def test_the_finding_leads_with_the_lowest_loss_and_its_doubt(results, tmp_path):
    set_losses(results, {"prenorm": [2.0, 2.0, 2.0], "block_attnres": [1.99, 2.03, 1.96]})
    lede = "".join(Tree(re.search(r'<p class="lede">.*?</p>', report(results, tmp_path))[0]).text)
    assert lede == (
        "Block AttnRes reaches the lowest loss on held-out text, 1.993 nats per token, 0.007 below PreNorm, "
        "within the seed spread. It trains at 0.95 times the speed."
    )
    results["longer_baseline"] = {"times": 1.25, "runs": figures.runs_of(results, "prenorm")}
    for row, worth in zip(results["summary"], (3.0, 1.1875), strict=True):
        row["worth"] = worth
    html = report(results, tmp_path)
    lede = "".join(Tree(re.search(r'<p class="lede">.*?</p>', html)[0]).text)
    assert lede.endswith(" times the speed; PreNorm needs 1.19 times its tokens for that loss.")
    worths = [row[2].removesuffix("\N{MULTIPLICATION SIGN}") for row in rows_of(html).values()]
    assert worths == ["Worth, of the baseline's tokens", "over 1.25", "1.19"]


@pytest.mark.usefixtures("words_only")
def test_a_winning_baseline_is_said_to_win(results, tmp_path):
    set_losses(results, {"prenorm": [2.0, 2.0, 2.0], "block_attnres": [2.2, 2.2, 2.2]})
    html = report(results, tmp_path)
    assert re.search(r'<p class="lede">PreNorm reaches the lowest loss', html)
    assert "+0.200" in rows_of(html)["Block AttnRes"][1]


@pytest.mark.usefixtures("words_only")
def test_one_seed_is_called_one_seed(make_results, tmp_path):
    html = report(make_results(1), tmp_path)
    assert "one seed each, so chance is not ruled out" in html
    assert "There is one seed only" in html
    assert "the seed spread" not in html


@pytest.mark.usefixtures("words_only")
def test_smallness_is_admitted_only_where_true(results, html, tmp_path):
    assert "very small experiment" in html
    for run in results["runs"]:
        run["parameters"], run["tokens"] = 436_000_000, 87_900_000_000
    assert "very small experiment" not in report(results, tmp_path)


@pytest.mark.usefixtures("words_only")
def test_a_diverged_run_shows_a_dash_and_does_not_win(results, tmp_path):
    set_losses(results, {"prenorm": [2.0, 2.0, 2.0], "block_attnres": [math.nan] * 3})
    results["summary"][1]["peak_memory_bytes"] = None
    html = report(results, tmp_path)
    row = rows_of(html)["Block AttnRes"]
    assert row[0].split()[0] == row[1] == row[3] == "\N{EN DASH}"
    assert '<p class="lede">PreNorm reaches' in html and "nan" not in "".join(Tree(html).text)


def test_heat_cells_hold_weights_and_stronger_weights_stronger_colours(results):
    grid, partial = figures.weight_grid(results, "block_attnres")
    html = heat_tables(grid, partial)
    before_attention, before_mlp = re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", before_attention + before_mlp)
    order = [*range(0, 24, 2), 24, *range(1, 24, 2)]
    levels = {}
    for row, read in zip(rows, order, strict=True):
        assert re.search(r"<th scope=row>(\w+)<", row)[1] == ("output" if read == 24 else str(read + 1))
        cells = re.findall(r'<td(?: class="h(\d+)( p)?")?>([\d.]*)</td>', row)
        assert len(cells) == grid.shape[1]
        for column, (level, dot, text) in enumerate(cells):
            assert bool(dot) == partial[read, column]
            if math.isnan(grid[read, column]):
                assert not text and not level
            else:
                assert text == f"{grid[read, column]:.3f}"
                levels[grid[read, column]] = int(level)
    ordered = [levels[weight] for weight in sorted(levels)]
    assert ordered == sorted(ordered) and ordered[-1] == HEAT_LEVELS - 1 and len(set(ordered)) > 5


def test_each_heat_map_is_one_tab_stop_with_a_caption(html):
    maps = [attributes for tag, attributes in Tree(html).tags if tag == "table" and "tabindex" in attributes]
    assert len(maps) == 4
    assert html.count("<caption>Before attention</caption>") == html.count("<caption>Before MLP</caption>") == 2
    assert 'data-kind="block"' in html and 'data-kind="layer"' in html


def test_sections_without_data_are_left_out(results, tmp_path):
    results["runs"] = figures.runs_of(results, "prenorm")
    for run in results["runs"]:
        run["output_magnitude"] = run["gradient_magnitude"] = []
    html = report(results, tmp_path)
    assert "Where each layer looks" not in html and "The signal over depth" not in html
    assert "subtracts the baseline" not in html
    Tree(html)


def test_facts_of_the_run_are_told(html, make_results):
    text = "".join(Tree(html).text)
    results = make_results(3)
    for fact in (results["command"], results["device"], results["torch"], results["commit"], results["date"]):
        assert fact in text
    assert "0, 1, 2" in text and "11.2 M tokens to train on, 262 k held out" in text and "learning_rate 0.003" in text


@pytest.mark.usefixtures("words_only")
def test_scarce_facts_are_enough(results, tmp_path):
    bare = {"runs": results["runs"], "baseline": "prenorm", "commit": None}
    text = "".join(Tree(report(bare, tmp_path)).text)
    assert "None" not in text and "Commit" not in text


@pytest.mark.usefixtures("words_only")
def test_bad_input_and_a_bad_place(results, tmp_path):
    with pytest.raises(UsageError, match="no runs"):
        write_report({}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="cannot write the report"):
        write_report(results, tmp_path / "file")
