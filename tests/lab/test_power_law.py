"""Power laws: the paper's own table, exact curves, intervals, and what is refused."""

import math
import subprocess
import sys

import numpy as np
import pytest

from attnres.errors import UsageError
from attnres.lab import PowerLaw, bootstrap, compute_advantage, fit_power_law, interval

# "Attention Residuals", section 5.1: activated parameters, tokens, Transformer blocks, width, losses
PARAMETERS = np.array([194e6, 241e6, 296e6, 436e6, 528e6])
TOKENS = np.array([38.7e9, 45.4e9, 62.1e9, 87.9e9, 119.0e9])
BLOCKS = np.array([12, 13, 14, 16, 17])
WIDTHS = np.array([896, 960, 1024, 1168, 1264])
LOSSES = {
    "baseline": [1.931, 1.895, 1.829, 1.766, 1.719],
    "block": [1.909, 1.875, 1.809, 1.746, 1.693],
    "full": [1.899, 1.874, 1.804, 1.737, 1.692],
}
PUBLISHED = {"baseline": (1.891, 0.057), "block": (1.870, 0.058), "full": (1.865, 0.057)}
PFLOPS_DAY = 1e15 * 86400


def test_the_paper_s_table_gives_the_paper_s_fits():
    """The paper does not say how it counts compute. Counted here: 6 FLOP a parameter and token, and causal attention
    over a context of 8192 in each block, 12 L_b d (8192 / 2) a token."""
    compute = TOKENS * (6 * PARAMETERS + 12 * BLOCKS * WIDTHS * 8192 / 2) / PFLOPS_DAY
    fits = {name: fit_power_law(compute, losses) for name, losses in LOSSES.items()}
    for name, (a, alpha) in PUBLISHED.items():
        assert abs(fits[name].A / a - 1) < 0.005
        assert fits[name].alpha == pytest.approx(alpha, abs=0.0015)
    assert compute_advantage(fits["baseline"], fits["block"], 5.6) == pytest.approx(1.25, abs=0.03)
    published = {name: PowerLaw(*values) for name, values in PUBLISHED.items()}
    assert round(compute_advantage(published["baseline"], published["block"], 5.6), 2) == 1.25
    assert round(published["baseline"].loss(5.6), 3) == 1.714


def test_parameters_alone_give_lower_exponents():
    compute = 6 * PARAMETERS * TOKENS / PFLOPS_DAY
    found = [round(fit_power_law(compute, losses).alpha, 3) for losses in LOSSES.values()]
    assert found == [0.055, 0.056, 0.056]


def test_exact_curves_are_recovered():
    compute = np.geomspace(0.1, 30, 6)
    law = fit_power_law(compute, 2.5 * compute**-0.08)
    assert (law.A, law.alpha, law.irreducible) == (pytest.approx(2.5), pytest.approx(0.08), 0.0)
    law = fit_power_law(compute, 1.2 + 0.9 * compute**-0.3, irreducible=True)
    assert (law.A, law.alpha, law.irreducible) == (
        pytest.approx(0.9, rel=1e-2), pytest.approx(0.3, rel=1e-2), pytest.approx(1.2, rel=1e-2),
    )  # fmt: skip
    assert law.compute(law.loss(3.0)) == pytest.approx(3.0)
    assert law.compute(1.0) == math.inf


def test_advantage_is_the_baseline_s_compute_over_the_other_s():
    base = PowerLaw(2.0, 0.1)
    better = PowerLaw(2.0 * 1.5**-0.1, 0.1)  # what the baseline has with 1.5 times the compute
    assert compute_advantage(base, better, 7.0) == pytest.approx(1.5)
    assert compute_advantage(base, base, 7.0) == pytest.approx(1.0)


def test_intervals_hold_the_truth_and_pair_seeds():
    compute = np.geomspace(1, 50, 5)
    generator = np.random.default_rng(1)
    seeds = generator.normal(0, 0.02, (5, 4))  # a seed moves both alike
    base = 2.0 * compute[:, None] ** -0.1 * np.exp(seeds)
    fits = bootstrap(compute, {"a": base, "b": 0.98 * base}, draws=200)
    low, high = interval([fit.alpha for fit in fits["a"]])
    assert low < 0.1 < high and 0 < high - low < 0.05
    advantages = [compute_advantage(a, b, 50) for a, b in zip(fits["a"], fits["b"], strict=True)]
    assert min(advantages) > 1.15, "paired: the seeds' noise, five times the gain's size, cancels"
    one = bootstrap(compute, {"a": base[:, :1]}, draws=50)
    assert len({fit.alpha for fit in one["a"]}) > 10


@pytest.mark.parametrize(
    ("compute", "loss", "options", "message"),
    [
        ([1, 2], [3, 2], {}, "a power law needs at least 3 different computes; there are 2"),
        ([1, 1, 2, 2], [3, 3, 2, 2], {}, "there are 2"),
        ([1, 2, 3], [3, 2.5, 2], {"irreducible": True}, "irreducible loss needs at least 4"),
        ([1, 2, 0], [3, 2, 1], {}, "must be positive and finite"),
        ([1, 2, 3], [3, 2, math.nan], {}, "must be positive and finite"),
        ([1, 2, 3], [3, 2], {}, "equally long"),
    ],
)
def test_bad_points_are_refused(compute, loss, options, message):
    with pytest.raises(UsageError, match=message):
        fit_power_law(compute, loss, **options)


def test_the_library_does_not_import_the_lab():
    code = "import sys, attnres; assert not any(name.startswith('attnres.lab') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
