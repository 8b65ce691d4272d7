"""Figures of a comparison: what is drawn, checked on the artists and not on pixels."""

import copy
import subprocess
import sys

import numpy as np
import pytest

import attnres
from attnres.analysis.draw import figures, style
from attnres.errors import Failure, UsageError

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def results(make_results):
    return copy.deepcopy(make_results(3))


def line(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def band(axes, index=0):
    """(lowest, highest) y of the band, at each x."""
    points = axes.collections[index].get_paths()[0].vertices
    x = np.unique(points[:, 0])
    return np.array([[points[points[:, 0] == at, 1].min(), points[points[:, 0] == at, 1].max()] for at in x]).T


def final_losses(results, residual):
    return np.array([run["val_curve"]["val_loss"][-1] for run in figures.runs_of(results, residual)])


def test_writes_every_figure_as_png_and_svg(results, tmp_path):
    for run in results["runs"]:  # few reads are drawn sooner and name the same files
        run["depth_weights"] = run["depth_weights"] and run["depth_weights"][:5]
    paths = figures.write_figures(results, tmp_path / "new" / "folder")
    names = ["loss", "output_magnitude", "gradient_magnitude"]
    names += ["depth_attention_block_attnres", "depth_attention_full_attnres"]
    assert [path.name for path in paths] == [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    for path in paths:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head


def test_svg_files_are_reproducible(results, tmp_path):
    first, second = (figures.save(figures.output_magnitude(results), tmp_path / n, "x")[1].read_text() for n in "ab")
    assert first == second


def test_validation_is_the_mean_over_seeds_and_the_band_their_range(results):
    top = figures.loss_curves(results).axes[0]
    losses = final_losses(results, "block_attnres")
    assert line(top, "Block AttnRes").get_ydata()[-1] == pytest.approx(losses.mean())
    assert line(top, "Block AttnRes").get_xdata()[-1] == pytest.approx(0.6144)  # millions of tokens
    low, high = band(top, index=1)
    assert (low[-1], high[-1]) == pytest.approx((losses.min(), losses.max()))


def test_one_seed_has_no_band(make_results):
    figure = figures.loss_curves(make_results(1))
    assert [len(axes.collections) for axes in figure.axes] == [0, 0]


def test_the_longer_baseline_is_a_thin_line_of_its_colour(results):
    longer = copy.deepcopy(figures.runs_of(results, "prenorm"))
    for run in longer:
        run["val_curve"]["tokens"] = [2 * tokens for tokens in run["val_curve"]["tokens"]]
    results["longer_baseline"] = {"times": 2, "runs": longer}
    (line,) = [line for line in figures.loss_curves(results).axes[0].lines if line.get_linestyle() == "--"]
    assert line.get_label() == "2\N{MULTIPLICATION SIGN}" and line.get_color() == style.looks(results)["prenorm"].colour
    assert max(line.get_xdata()) == max(longer[0]["val_curve"]["tokens"]) / 1e6


def test_training_loss_is_drawn_fainter_than_validation(results):
    top = figures.loss_curves(results).axes[0]
    training = [line for line in top.lines if len(line.get_xdata()) == 300]
    assert len(training) == 3
    assert all(line.get_alpha() < 0.5 and line.get_marker() == "None" for line in training)


def test_the_steep_start_does_not_flatten_the_rest(results):
    top = figures.loss_curves(results).axes[0]
    assert top.get_ylim()[1] < results["runs"][0]["val_curve"]["val_loss"][0]
    assert top.get_ylim()[0] < min(final_losses(results, "full_attnres"))


def test_differences_are_taken_seed_by_seed(results):
    for run in results["runs"]:  # what shifts a whole seed says nothing about the mechanisms
        run["val_curve"]["val_loss"] = [loss + 10 * run["seed"] for loss in run["val_curve"]["val_loss"]]
    bottom = figures.loss_curves(results).axes[1]
    pairs = final_losses(results, "full_attnres") - final_losses(results, "prenorm")
    assert line(bottom, "Full AttnRes").get_ydata()[-1] == pytest.approx(pairs.mean())
    low, high = band(bottom, index=1)
    assert (low[-1], high[-1]) == pytest.approx((pairs.min(), pairs.max()))
    assert high[-1] - low[-1] < 1
    assert "PreNorm" in bottom.get_ylabel()


def test_runs_pair_by_seed_and_not_by_position(results):
    expected = line(figures.loss_curves(results).axes[1], "Full AttnRes").get_ydata()
    results["runs"].reverse()
    results["runs"] = [run for run in results["runs"] if (run["residual"], run["seed"]) != ("prenorm", 0)]
    pairs = {run["seed"]: run["val_curve"]["val_loss"][-1] for run in figures.runs_of(results, "prenorm")}
    final = line(figures.loss_curves(results).axes[1], "Full AttnRes").get_ydata()[-1]
    own = [run for run in figures.runs_of(results, "full_attnres") if run["seed"] in pairs]
    assert final == pytest.approx(np.mean([run["val_curve"]["val_loss"][-1] - pairs[run["seed"]] for run in own]))
    assert final != pytest.approx(expected[-1], abs=1e-6)


def test_baseline_alone_has_no_difference_panel(results):
    results["runs"] = figures.runs_of(results, "prenorm")
    assert len(figures.loss_curves(results).axes) == 1


def test_a_run_that_ended_early_shortens_its_mechanism_only(results):
    short = figures.runs_of(results, "full_attnres")[0]["val_curve"]
    for key in short:
        short[key] = short[key][:4]
    top = figures.loss_curves(results).axes[0]
    assert len(line(top, "Full AttnRes").get_xdata()) == 4
    assert len(line(top, "PreNorm").get_xdata()) == 13


def test_profiles_count_blocks_from_one_and_average_seeds(results):
    axes = figures.output_magnitude(results).axes[0]
    expected = np.mean([run["output_magnitude"] for run in figures.runs_of(results, "prenorm")], axis=0)
    assert line(axes, "PreNorm").get_xdata().tolist() == list(range(1, 13))
    assert line(axes, "PreNorm").get_ydata() == pytest.approx(expected)


@pytest.mark.parametrize(("top", "scale"), [(9.0, "linear"), (11.0, "log")])
def test_logarithmic_axis_only_where_values_span_more_than_a_factor_of_ten(results, top, scale):
    for run in results["runs"]:
        run["gradient_magnitude"] = np.linspace(1.0, top, 12).tolist()
    assert figures.gradient_magnitude(results).axes[0].get_yscale() == scale


def test_values_that_are_not_numbers_leave_gaps(results):
    results["runs"][0]["output_magnitude"][3] = None
    results["runs"][0]["val_curve"]["val_loss"][-1] = float("nan")
    assert np.isnan(line(figures.output_magnitude(results).axes[0], "PreNorm").get_ydata()[3])
    assert np.isfinite(figures.loss_curves(results).axes[0].get_ylim()).all()


def test_looks_do_not_depend_on_which_mechanisms_run_together(results):
    every = style.looks(results)
    results["runs"] = figures.runs_of(results, "full_attnres")
    assert style.looks(results)["full_attnres"] == every["full_attnres"]
    assert len({look.colour for look in every.values()}) == len({look.marker for look in every.values()}) == 3


def test_other_mechanisms_get_looks_of_their_own(results):
    for name in ("one", "two"):
        results["runs"].append(results["runs"][0] | {"residual": name})
    looks = style.looks(results)
    assert looks["one"].label == "one"
    assert len({look.colour for look in looks.values()}) == 5


def reads(layers, size):
    """Per read of Block AttnRes, from its definition: finished blocks, and whether a partial sum follows them."""
    return [(1 + i // size, i % size != 0 and i < layers) for i in range(layers)] + [(1 + -(-layers // size), False)]


@pytest.mark.parametrize(("layers", "size"), [(24, 3), (24, 1), (24, 2), (10, 4), (6, 5), (8, 8)])
def test_weights_stand_in_the_column_of_their_block(results, layers, size):
    rows = [np.random.default_rng(i).dirichlet(np.ones(n + p)).tolist() for i, (n, p) in enumerate(reads(layers, size))]
    for run in figures.runs_of(results, "block_attnres"):
        run["depth_weights"] = rows
    grid, partial = figures.weight_grid(results, "block_attnres")
    assert grid.shape == (layers + 1, 1 + -(-layers // size))
    for i, (finished, is_partial) in enumerate(reads(layers, size)):
        count = finished + is_partial
        assert grid[i, :count] == pytest.approx(rows[i])
        assert np.isnan(grid[i, count:]).all()
        assert partial[i].nonzero()[0].tolist() == ([finished] if is_partial else [])


@pytest.mark.parametrize(
    ("reading", "lengths", "partial"),
    [
        ([0, 2, 4, 6, 8], [1, 2, 2, 3, 3], [None, 1, None, 2, None]),
        ([1, 3, 5, 7, 8], [2, 2, 3, 3, 3], [1, 1, 2, 2, None]),
        ([0, 4, 8], [1, 2, 3], [None, None, None]),
    ],
)
def test_layers_without_a_read_have_empty_rows(results, reading, lengths, partial):
    """Two blocks of four layers, read a Transformer block, in front of MLPs and at the borders."""
    for run in figures.runs_of(results, "block_attnres"):
        run["depth_weights"] = [[] for _ in range(9)]
        for layer, length in zip(reading, lengths, strict=True):
            run["depth_weights"][layer] = [1 / length] * length
    grid, marked = figures.weight_grid(results, "block_attnres")
    assert (~np.isnan(grid)).sum(1).tolist() == [dict(zip(reading, lengths, strict=True)).get(i, 0) for i in range(9)]
    wanted = [(layer, column) for layer, column in zip(reading, partial, strict=True) if column is not None]
    assert list(zip(*marked.nonzero(), strict=True)) == wanted
    figures.depth_attention(results, "block_attnres")


def test_weights_are_means_over_seeds(results):
    runs = figures.runs_of(results, "full_attnres")
    grid, partial = figures.weight_grid(results, "full_attnres")
    assert grid[7, :8] == pytest.approx(np.mean([run["depth_weights"][7] for run in runs], axis=0))
    assert grid.shape == (25, 25) and not partial.any()


@pytest.mark.parametrize("residual", ["full_attnres", "block_attnres"])
def test_heat_maps_split_reads_by_what_follows_and_end_with_the_output(results, residual):
    grid, _ = figures.weight_grid(results, residual)
    attention, mlp, bar = figures.depth_attention(results, residual).axes
    for axes, rows in ((attention, [*range(0, 24, 2), 24]), (mlp, range(1, 24, 2))):
        drawn = [mesh.get_array().filled(np.nan) for mesh in axes.collections]
        np.testing.assert_array_equal(np.vstack(drawn), grid[list(rows)])
        assert {(mesh.norm.vmin, mesh.norm.vmax) for mesh in axes.collections} == {(0, 1)}
    assert [label.get_text() for label in attention.get_yticklabels()] == [*map(str, range(1, 24, 2)), "output"]
    assert [label.get_text() for label in mlp.get_yticklabels()] == [*map(str, range(2, 25, 2))]
    assert attention.get_xticklabels()[0].get_text() == "emb"
    assert attention.yaxis_inverted() and mlp.get_ylim() == attention.get_ylim()
    assert bar.get_ylabel() == "Mean weight"


def test_axes_name_their_quantities(results):
    drawn = [figures.loss_curves(results), figures.output_magnitude(results), figures.gradient_magnitude(results)]
    assert [figure.axes[-1].get_xlabel() for figure in drawn] == ["Training tokens (millions)"] + 2 * [
        "Transformer block"
    ]
    assert all(axes.get_ylabel() for figure in drawn for axes in figure.axes)


def test_unknown_weights_name_the_mechanisms_that_have_some(results):
    with pytest.raises(UsageError, match=r"'prenorm' has no depth weights.*block_attnres"):
        figures.depth_attention(results, "prenorm")


@pytest.mark.parametrize("empty", [{}, {"runs": []}])
def test_no_runs_is_a_usage_error(empty, tmp_path):
    with pytest.raises(UsageError, match="no runs"):
        figures.write_figures(empty, tmp_path)


def test_missing_data_leaves_its_figure_out(results, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, out_dir, name: [name])
    for run in results["runs"]:
        run["output_magnitude"], run["depth_weights"] = [], None
    assert figures.write_figures(results, tmp_path) == ["loss", "gradient_magnitude"]


def test_missing_matplotlib_says_what_to_install(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'attnres\[train\]'"):
        figures.loss_curves(results)


def test_a_folder_that_cannot_be_made_is_a_failure(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="cannot write figure 'x'"):
        figures.save(figures.output_magnitude(results), tmp_path / "file", "x")


def test_the_callers_matplotlib_is_left_alone(results, tmp_path):
    before = dict(matplotlib.rcParams)
    figures.save(figures.loss_curves(results), tmp_path, "x")
    assert dict(matplotlib.rcParams) == before


def test_importing_loads_no_matplotlib_and_drawing_no_pyplot():
    # A package made by hand, since attnres/__init__.py imports torch, which takes seconds and plays no part here.
    code = (
        "import sys, types; package = sys.modules['attnres'] = types.ModuleType('attnres');"
        f"package.__path__ = {list(attnres.__path__)};"
        "from attnres.analysis.draw import figures, report; assert 'matplotlib' not in sys.modules;"
        "run = {'residual': 'prenorm', 'seed': 0, 'output_magnitude': [1.0, 2.0]};"
        "figures.output_magnitude({'runs': [run]}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
