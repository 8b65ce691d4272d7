"""The arithmetic of a verdict, by hand."""

import math

import pytest

from attnres.upgrade.config import UpgradeConfig
from attnres.upgrade.summary import HELPED, NOISE, NOT, finding, loss_at, summarise, verdict


def run(residual, seed, windows, pace, steps=4):
    loss = sum(s for s, _ in windows) / sum(n for _, n in windows)
    curve = {"step": [0, 2, 4], "tokens": [0, 20, 40], "val_loss": [3.0, 2.5, loss]}
    return dict(residual=residual, seed=seed, parameters=9, trained_parameters=9, tokens=40, val_loss=loss,
                seconds_per_step=pace, tokens_per_second=10 / pace, peak_memory_bytes=5, val_curve=curve,
                window_losses=windows)  # fmt: skip


PLAIN = [run("plain", 0, [[8.0, 4], [4.0, 2], [6.0, 2]], 1.0), run("plain", 1, [[8.0, 4], [4.0, 2], [6.0, 2]], 1.0)]
BLOCK = [run("block", 0, [[7.0, 4], [4.0, 2], [5.0, 2]], 2.0), run("block", 1, [[7.0, 4], [3.0, 2], [4.0, 2]], 2.0)]


def test_a_summary_by_hand():
    plain, block = summarise(PLAIN + BLOCK, ["plain", "block"])
    assert (plain["difference"], plain["standard_error"], plain["verdict"]) == (0, 0, None)
    assert (plain["val_loss"], plain["first_loss"], block["val_loss"]) == (18 / 8, 3.0, 15 / 8)
    # mean gaps of the rows -1, -0.5, -1.5: their sum is 8 tokens of -3/8, residues 0.5, 0.25, -0.75
    over_rows = math.sqrt((0.5**2 + 0.25**2 + 0.75**2) * 3 / 2) / 8
    over_seeds = math.sqrt(((-2 / 8 + 3 / 8) ** 2 * 2) / 1) / math.sqrt(2)
    assert block["difference"] == pytest.approx(-3 / 8)
    assert block["rows_error"] == pytest.approx(over_rows) and block["seeds_error"] == pytest.approx(over_seeds)
    assert block["standard_error"] == pytest.approx(math.hypot(over_rows, over_seeds))
    assert (block["difference_spread"], block["throughput_ratio"]) == (pytest.approx(0.25), 0.5)
    # 8 seconds are twice what the plain one took, whose loss fell by 0.25 from 2 to 4 seconds
    assert (plain["seconds"], block["seconds"], block["plain_at_equal_time"]) == (4, 8, pytest.approx(2.25 - 0.25))
    one = summarise([PLAIN[0], BLOCK[0]], ["plain", "block"])[1]
    assert one["seeds_error"] is None and one["standard_error"] == one["rows_error"]


def test_a_verdict_wants_two_standard_errors_and_seeds_that_agree():
    assert verdict([-0.3], 0.1) == HELPED and verdict([0.3], 0.1) == NOT
    assert verdict([-0.2], 0.1) == NOISE and verdict([0.0], 0.0) == NOISE
    assert verdict([-1.0, 0.1], 0.1) == NOISE and verdict([-0.5, -0.1], 0.1) == HELPED


def test_a_model_without_a_curve_has_no_equal_time():
    still = [
        run("plain", 0, [[8.0, 4], [4.0, 2], [6.0, 2]], 1.0) | {"seconds_per_step": None, "tokens_per_second": None}
    ]
    plain, block = summarise([*still, BLOCK[0]], ["plain", "block"])
    assert plain["seconds"] is block["plain_at_equal_time"] is block["throughput_ratio"] is None


def test_a_curve_goes_on_along_its_last_two_points():
    curve = [(0.0, 9.0), (1.0, 4.0), (2.0, 3.0), (4.0, 2.5)]
    assert loss_at(2.0, curve) == 3.0 and loss_at(math.sqrt(2), curve) == pytest.approx(3.5)
    assert loss_at(8.0, curve) == pytest.approx(2.0) and loss_at(0.5, curve) is None and loss_at(2.0, curve[:2]) is None


def test_the_sentence_says_what_the_numbers_say():
    config = UpgradeConfig("m", "d", residual=("block_attnres",))
    summary = summarise([PLAIN[0], BLOCK[0] | {"residual": "block"}], ["plain", "block"])
    told = finding(summary, config, 3)
    assert told.startswith(
        "block helped: held-out loss 2.0000 against 2.2500 of the unconverted model on the same data"
    )
    assert "difference -0.2500 +- " in told and "over 3 held-out rows; one seed" in told and told.count(".") > 3
    summary[1]["verdict"] = NOISE
    assert "made no difference beyond noise" in finding(summary, config, 3)
