"""The experiment on how often depth is read: its forms are what they say, its grid goes on, its table is right."""

import json
import sys
from pathlib import Path

import pytest
import torch

from attnres import residual
from attnres.residual import registry

from ..residual.loop import layers_of, randomised, run

DIM, LAYERS = 6, 8


@pytest.fixture(autouse=True)
def forms(benchmarks: Path, monkeypatch: pytest.MonkeyPatch):
    """The experimental forms, registered for one test."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.delitem(sys.modules, "reads_forms", raising=False)
    import reads_forms

    yield reads_forms
    del sys.modules["reads_forms"]


def build(**options):
    return residual.build("sparse_reads", DIM, LAYERS, stream_scale=True, **options)


def inputs_of(res):
    torch.manual_seed(1)
    return run(res.double(), torch.randn(3, DIM, dtype=torch.float64), layers_of(LAYERS, DIM))


@pytest.mark.parametrize("num_blocks", [2, 3, LAYERS])
def test_a_read_in_front_of_every_layer_is_the_papers(num_blocks):
    paper = randomised(residual.build("block_attnres", DIM, LAYERS, num_blocks=num_blocks, stream_scale=True))
    got = inputs_of(randomised(build(num_blocks=num_blocks, every=1)))
    torch.testing.assert_close(got, inputs_of(paper), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("reads", "options"),
    [
        ("transformer_block", {"every": 2}),
        ("block", {"every": 4}),
        ("mlp", {"every": 2, "offset": 1, "others": "sum"}),
    ],
)
def test_what_was_measured_is_what_the_library_has(reads, options):
    """The runs were made with this form of each."""
    built = residual.build("block_attnres", DIM, LAYERS, num_blocks=2, reads=reads, stream_scale=True)
    got = inputs_of(randomised(build(num_blocks=2, **options)))
    torch.testing.assert_close(got, inputs_of(randomised(built)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("others", ["last_read", "sum"])
@pytest.mark.parametrize(("every", "offset"), [(1, 0), (2, 0), (2, 1), (4, 0)])
def test_zero_queries_are_prenorm(every, offset, others):
    res = build(num_blocks=2, every=every, offset=offset, others=others)
    want = inputs_of(residual.build("prenorm", DIM, LAYERS))
    torch.testing.assert_close(inputs_of(res), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("others", ["last_read", "sum"])
@pytest.mark.parametrize(
    ("num_blocks", "every", "offset"), [(2, 2, 0), (2, 2, 1), (2, 4, 0), (LAYERS, 2, 0), (3, 2, 1)]
)
def test_reads_are_the_formula(num_blocks, every, offset, others):
    res = randomised(build(num_blocks=num_blocks, every=every, offset=offset, others=others))
    layers, size = layers_of(LAYERS, DIM), LAYERS // num_blocks
    torch.manual_seed(1)
    v = [torch.randn(3, DIM, dtype=torch.float64)]
    want, stream = [], v[0]
    for layer in range(LAYERS + 1):
        # the layers' outputs v[1], v[2], .. in blocks, those of the last block with what is left over
        begins = [size * n for n in range(num_blocks)]
        ends = [*begins[1:], LAYERS]
        blocks = [v[0], *(sum(v[1 + a : 1 + min(b, layer)]) for a, b in zip(begins, ends, strict=True) if a < layer)]
        if layer in (0, LAYERS) or layer % every == offset:
            keys = [b / (b.square().mean(-1, keepdim=True) + 1e-6).sqrt() * res.key_norm[layer] for b in blocks]
            weights = torch.stack([(k * res.pseudo_query[layer]).sum(-1) for k in keys]).softmax(0)
            h = len(blocks) * sum(w.unsqueeze(-1) * b for w, b in zip(weights, blocks, strict=True))
            seen = h
            stream = h if others == "last_read" else sum(v)
        else:
            seen = stream
        want.append(seen)
        if layer < LAYERS:
            v.append(layers[layer](seen))
            stream = stream + v[-1]
    torch.testing.assert_close(inputs_of(res), want, rtol=1e-10, atol=1e-10)


def losses_of(form, length, losses, blocks=12, num_blocks=6):
    import reads_grid

    return {reads_grid.Run(form, blocks, num_blocks, length, 3e-3, seed): loss for seed, loss in enumerate(losses)}


def test_worth_is_the_length_of_a_prenorm_run_with_the_same_loss():
    import reads_table

    losses = losses_of("prenorm", 1, [2.0, 2.2]) | losses_of("prenorm", 2, [1.8, 2.0]) | losses_of("prenorm", 4, [1.7])
    assert reads_table.decrements(losses, 1) == [(1, 0), (2, pytest.approx(-0.2)), (4, pytest.approx(-0.3))]
    assert reads_table.decrements(losses, 2) == [(1, 0), (2, pytest.approx(-0.1))]
    losses |= losses_of("block, borders", 1, [1.9, 2.1]) | losses_of("block", 1, [1.75])
    halfway = reads_table.of_form(losses, "block, borders", 6, 1)
    assert halfway["worth"] == pytest.approx(2**0.5) and halfway["difference"] == pytest.approx(-0.1)
    assert reads_table.of_form(losses, "block", 6, 1)["worth"] == pytest.approx(2 * 2**0.5)  # its one seed's pair
    curve = reads_table.decrements(losses, 1)
    assert reads_table.worth(0.2, curve) == pytest.approx(0.5) and reads_table.worth(-0.4, curve) == pytest.approx(8)
    assert reads_table.of_form(losses, "full", 6, 1) is None and reads_table.of_form(losses, "block", 4, 1) is None
    lines = "\n".join(reads_table.page(losses, {"block": 1.25}))
    assert (
        "| block | 1 | 1.7500 (1.7500 .. 1.7500) | -0.2500 (-0.2500 .. -0.2500) | 1.00 | 2.83 (2.83 .. 2.83) | 1.25 |"
        in lines
    )


def test_the_queue_takes_the_rate_that_is_best_within_those_tried():
    import reads_grid

    asked = []

    def done(runs):
        asked.extend(runs)
        return {run: {8: abs(run.rate - 1.2e-2), 12: abs(run.rate - 3e-3)}.get(run.blocks, run.rate) for run in runs}

    lots = reads_grid.queue(done)
    first = next(lots)
    assert {run.rate for run in first} == {3e-3} and {run.form for run in first} == set(reads_grid.FORMS)
    assert [run.seed for run in first] == sorted(run.seed for run in first), "whole seeds, one after the other"
    next(lots)
    eight = next(lots)
    assert {run.rate for run in eight} == {1.2e-2} and max(run.rate for run in asked) == 2.4e-2
    names = [run.name for run in {*asked, *first, *eight}]
    assert len(set(names)) == len(names)


def test_runs_go_on_where_they_stopped_and_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    import reads
    import reads_grid
    import reads_table

    small = [reads_grid.Run(form, 2, 2, 0.02, 3e-3, 0) for form in ("prenorm", "block, Transformer blocks")]
    for module in (reads, reads_table):
        monkeypatch.setattr(module, "queue", lambda done: iter([small]))
    with pytest.raises(reads.UsageError, match="has no finished run"):
        reads.table(tmp_path, tmp_path)
    reads.train_all(tmp_path, 1)
    files = [run.cell(tmp_path).config.out / "result.json" for run in small]
    times = [file.stat().st_mtime_ns for file in files]
    result = json.loads(files[1].read_text())
    assert len(result["mixing"]) == 5 and all(len(result[name]) == 4 for name in ("input_rms", "gradient_rms"))
    files[0].unlink()
    reads.train_all(tmp_path, 1)
    assert files[0].exists() and files[1].stat().st_mtime_ns == times[1]
    reads.table(tmp_path, tmp_path)
    assert "0.02 times the tokens" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "reads_cpu.json").read_text())["runs"]) == 2


def test_the_figure_shows_what_the_layers_see(tmp_path: Path):
    import reads_figure

    prenorm = {"form": "prenorm", "length": 1, "mixing": torch.ones(5, 5).tril().tolist()}
    prenorm |= {"input_rms": [1.0, 2.0, 3.0, 4.0], "gradient_rms": [4.0, 3.0, 2.0, 1.0]}
    block = prenorm | {"form": "block", "mixing": (torch.arange(25.0).view(5, 5)).tolist()}
    panels = reads_figure.inside_figure([prenorm, block, block | {"length": 3}], 1).axes
    drawn = [[line.get_ydata().tolist() for line in panel.lines] for panel in panels]
    assert drawn[0] == [[1, 1, 1, 1], [0, 6, 12, 18]] and drawn[1] == [[1, 1, 1, 1], [0, 5, 10, 15]]
    assert drawn[2] == [[1, 2, 3, 4]] * 2 and drawn[3] == [[4, 3, 2, 1]] * 2


def test_every_form_has_a_cost(tmp_path: Path, capsys):
    import reads_cost
    import reads_grid

    assert set(reads_cost.PASSES) == set(reads_grid.FORMS)
    for L, S in reads_cost.SHAPES:
        total = {form: passes(L, S).total / L for form, passes in reads_cost.PASSES.items()}
        assert total["prenorm"] == 8 < total["block, borders"] < total["block, Transformer blocks"] < total["block"]
    reads_cost.measure(tmp_path, [32], 1)
    assert "| block, borders |" in capsys.readouterr().out and (tmp_path / "reads_cost_cpu.json").exists()
