"""The experiments of the lab, tiny: what they write, that they go on, and what they refuse before any run."""

import json

import numpy as np
import pytest

from attnres.errors import UsageError
from attnres.lab.dynamics import read_dynamics
from attnres.lab.scaling import ScalingConfig, Size, analyse
from attnres.lab.sweep import SweepConfig, best
from attnres.run.config import TrainConfig

from .test_compare import FORK, in_run, said

SIZES = (Size(32, 4, 2, 5e-3), Size(48, 4, 2, 4e-3), Size(64, 5, 4, 3e-3))


@pytest.fixture(scope="module")
def small(corpus_file):
    """Flags of runs that take a second."""
    flags = f"""
        --data {corpus_file} --device cpu --precision float32 --context 32 --batch-size 2 --validation-tokens 64
        --optim.warmup-steps 1 --residuals prenorm,full_attnres
    """
    return flags.split()


def test_scaling_goes_on_after_a_kill_and_fits(server, small, tmp_path):
    sizes = "32x4x2@5e-3,48x4x2@4e-3,64x5x4@3e-3"
    command = ["lab", "scaling", *small, "--sizes", sizes, "--tokens-per-parameter", 0.004, "--seeds", 0,
               "--minutes", "1e400"]  # fmt: skip
    end = server.run(*command, "--out", tmp_path, patch=in_run("full_attnres", 2, "os.kill(os.getpid(), 9)"))
    assert (end.status, "failed" in said(end) and "ended with exit code -9" in said(end)) == (1, True)
    end = server.run(*command, "--out", tmp_path, patch=FORK)
    assert end.status == 0, end.err
    assert "prenorm" not in end.err, "finished runs are not repeated"
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["runs"]) == 6
    for size in ("32x4", "48x4", "64x5"):
        assert len({run["tokens"] for run in found["runs"] if run["size"] == size}) == 1
    assert [fit["residual"] for fit in found["fits"]["power_law"]] == ["prenorm", "full_attnres"]
    assert (tmp_path / "table.csv").read_text().count("\n") == 7
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png", ".svg"}
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert "compute advantage" in end.out


def test_dynamics_looks_inside_at_every_validation(server, small, tmp_path):
    shape = ["--model.hidden-size", 32, "--model.num-hidden-layers", 4, "--model.num-attention-heads", 2]
    flags = ["--steps", 4, "--validate-every", 2, "--out", tmp_path]
    end = server.run("lab", "dynamics", *small, *shape, *flags, patch=FORK)
    assert end.status == 0, end.err
    for run in json.loads((tmp_path / "results.json").read_text())["runs"]:
        assert run["dynamics"]["step"] == [0, 2, 4]
        assert (
            np.shape(run["dynamics"]["output_magnitude"]) == np.shape(run["dynamics"]["gradient_magnitude"]) == (3, 4)
        )
        assert run["dynamics"]["output_magnitude"][-1] == pytest.approx(run["output_magnitude"])
    page = (tmp_path / "dynamics.html").read_text()
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert (tmp_path / "figures" / "dynamics_gradient_magnitude.svg").exists()


def test_a_step_that_was_repeated_counts_once(tmp_path):
    file = tmp_path / "dynamics.jsonl"
    record = '{"step": %d, "output_magnitude": [%d], "gradient_magnitude": [1]}\n'
    file.write_text(record % (0, 1) + record % (2, 5) + record % (2, 7) + '{"step": 4, "out')
    assert read_dynamics(file)["output_magnitude"] == [[1], [7]]


def test_advantage_of_a_constructed_gain():
    """The rival has everywhere what the baseline has with 1.5 times the compute."""
    compute = {"a": 1.0, "b": 4.0, "c": 16.0, "d": 50.0}
    runs = [
        {"size": size, "residual": name, "seed": seed, "val_loss": (2 + 0.1 * seed) * (c * gain) ** -0.1}
        for size, c in compute.items()
        for name, gain in (("prenorm", 1.0), ("full_attnres", 1.5))
        for seed in (0, 1)
    ]
    base, rival = analyse(runs, compute, ("prenorm", "full_attnres"))["fits"]["power_law"]
    assert (base["advantage"], base["advantage_interval"]) == (pytest.approx(1), pytest.approx((1, 1)))
    assert rival["advantage"] == pytest.approx(1.5)
    low, high = rival["advantage_interval"]  # every draw of seeds has a slope of its own
    assert 1.3 < low < 1.5 < high < 1.7
    assert rival["alpha_interval"][0] < 0.1 < rival["alpha_interval"][1]
    assert np.allclose(base["band"]["difference_interval"], 0)
    for (low, high), own, of_base in zip(
        rival["band"]["difference_interval"], rival["band"]["loss"], base["band"]["loss"], strict=True
    ):
        assert low < own - of_base < high < 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": SIZES[:2]}, "a power law needs at least 3 sizes of different compute; there are 2"),
        ({"residuals": ("prenorm", "mhc")}, "cannot be compute-matched: a token costs mhc"),
        ({"tokens_per_parameter": 1e-4}, "would train for 0 steps"),
        ({"sizes": (*SIZES, SIZES[0])}, "sizes must name at least one, each once"),
        ({"tokens_per_parameter": 0}, "tokens_per_parameter must be positive"),
    ],
)
def test_scaling_refuses_before_any_run(changes, message):
    with pytest.raises(UsageError, match=message):
        ScalingConfig(**{"train": TrainConfig(), "sizes": SIZES, **changes}).check()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("lab nothing", "there is no experiment 'nothing'; there are"),
        ("lab scaling --sizes 64x4@3e-3", "--sizes must be WIDTHxBLOCKSxHEADS@LR, such as 64x5x4@3e-3"),
        ("lab scaling --preset huge", "--preset must be one of cpu, small-gpu; it is 'huge'"),
        ("lab sweep --seeds 0,a", "--seeds must be whole numbers separated by commas; it is '0,a'"),
        ("lab sweep --widths 1e400", "widths must be positive ratios, 1e-6 to 1e6; it is (inf,)"),
        ("lab sweep --compute 1e400", "parameters and compute must be positive"),
        (
            "lab scaling --sizes 0x4x2@1e-3,48x4x2@1e-3,64x5x4@1e-3",
            "hidden_size must be a positive whole number; it is 0",
        ),
        ("lab sweep --context=0", "context must be a positive whole number; it is 0"),
        ("lab scaling --tokens-per-parameter 1e400", "tokens_per_parameter must be positive, at most 1e9; it is inf"),
        ("lab dynamics --jobs 0", "jobs must be a positive whole number; it is 0"),
    ],
)
def test_bad_flags(server, small, tmp_path, argv, message):
    experiment, bad = argv.split()[:2], argv.split()[2:]
    end = server.run(*experiment, *(small if bad else []), *bad, "--out", tmp_path / "out")
    assert (end.status, message in said(end)) == (2, True), end.err


def test_default_sweep_is_matched():
    config = SweepConfig(train=TrainConfig())
    config.check()
    deep, wide = config.model(4, 0.5, "prenorm"), config.model(24, 0.5, "prenorm")
    assert deep.num_hidden_layers > 2 * wide.num_hidden_layers and wide.hidden_size >= 2 * deep.hidden_size
    for ratio in config.widths:
        model = config.model(ratio, 0.5, "prenorm")
        assert model.hidden_size / model.num_hidden_layers == pytest.approx(ratio, rel=0.1)
        assert model.num_attention_heads / model.num_hidden_layers == pytest.approx(0.5, abs=0.13)


def test_best_cell_is_that_of_the_lowest_mean():
    losses = {(4, 0.5): (2.0, 2.4), (8, 0.5): (2.1, 2.2)}
    runs = [
        {"residual": "prenorm", "width_ratio": width, "head_ratio": heads, "val_loss": loss}
        for (width, heads), seeds in losses.items()
        for loss in seeds
    ]
    assert best(runs, "prenorm") == {"width_ratio": 8, "head_ratio": 0.5, "val_loss": pytest.approx(2.15)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (0,)}, "widths must be positive ratios"),
        ({"parameters": 3000}, "the grid cannot be matched|leave no room for an MLP"),
        ({"compute": 1e9}, "FLOP is 0 steps"),
    ],
)
def test_sweep_refuses_before_any_run(changes, message):
    with pytest.raises(UsageError, match=message):
        SweepConfig(**{"train": TrainConfig(), **changes}).check()
