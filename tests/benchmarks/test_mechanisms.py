"""The table of costs: traffic is the paper's, a run goes on where the last one stopped, a slow process is listed."""

import json
import sys
from pathlib import Path

import pytest

from attnres import residual


def test_traffic_is_the_papers(benchmarks: Path) -> None:
    import mechanism_traffic as traffic

    num_layers, num_blocks, block_size, n, width = 128, 8, 16, 4, 7168
    assert traffic.standard(None) == (3, 0)
    assert traffic.full_attnres(num_layers, block_size).width == block_size + num_blocks == 24
    assert traffic.block_attnres(num_blocks, block_size).width == 5.5
    for name in ("mhc", "hyper_connections"):
        found = traffic.traffic(name, residual.build(name, 8, num_layers, num_streams=n))
        assert found == (34, 2 * n**2 + 4 * n)
        assert found.per_width(width) == pytest.approx(((8 * n + 2) * width + 2 * n**2 + 4 * n) / width)


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("block_attnres", {"num_blocks": 2}, 2 / 2 + 5),
        ("ancre", {}, (3 + 4 + 5 + 6) / 4),
        ("denseformer", {}, 3 + ((2 + 1) + (3 + 1)) / 4),
        ("denseformer", {"dilation": 2, "period": 2}, 3 + (2 + 1) / 4),
        ("muddformer", {}, 3 + ((1 + 2 + 2) + (1 + 3 + 1)) / 4),
        ("multihead_attnres", {}, (5 + 7 + 9 + 11) / 4),
        ("multihead_attnres", {"block_size": 2}, 3 + (5 + 5 + 7 + 7) / 4),
        ("lowrank_attnres", {"rank": 2}, (2 + 3 + 4 + 5) * 1.25 / 4 + 1),
        ("delta_attnres", {}, 3 + (6 + 8 + 10) / 4),
        ("laurel", {"previous": 2}, 4 + (0 + 1 + 2 + 2) / 4),
        ("gated_residual", {"num_streams": 3}, 6 * 3 + 2),
        ("hyper_connections", {"num_streams": 3, "dynamic": False}, 7 * 3 + 2),
    ],
)
def test_passes_counted_by_hand(benchmarks: Path, name: str, options: dict, passes: float) -> None:
    import mechanism_traffic as traffic

    assert traffic.traffic(name, residual.build(name, 8, 4, **options)).width == pytest.approx(passes)


def test_every_mechanism_has_a_formula(benchmarks: Path) -> None:
    import mechanism_traffic as traffic

    assert set(traffic.FORMULAS) == set(residual.names())
    assert all(traffic.traffic(name, residual.build(name, 16, 6)).width >= 3 for name in residual.names())


def test_runs_to_the_end_and_goes_on(benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mechanisms
    import timing

    for name, value in (("LAYERS", 6), ("WIDTH", 16), ("TOKENS", 8), ("MIDDLE", range(2, 4))):
        monkeypatch.setattr(mechanisms, name, value)
    monkeypatch.setattr(timing, "compiled", lambda net: net)  # that takes minutes
    asked = []

    def here(name: str, mode: str, repeats: int, seconds: float, cache: str) -> dict:
        asked.append((name, mode))
        if (name, mode) == ("mhc", "compiled") and len(asked) == 7:
            return {"failed": "not ready within 1 s"}
        return mechanisms.measure(name, mode, repeats)

    monkeypatch.setattr(mechanisms, "in_process", here)

    def run(*flags: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["mechanisms.py", "--repeats", "2", "--out", str(tmp_path), *flags])
        asked.clear()
        mechanisms.main()
        return json.loads((tmp_path / "mechanisms_cpu.json").read_text())

    names = ["prenorm", "block_attnres", "mhc", "delta_attnres"]
    rows = run("--only", *names)["rows"]
    assert asked == [(name, mode) for mode in ("eager", "compiled") for name in names]
    assert rows["mhc"]["compiled"] == {"failed": "not ready within 1 s"}
    assert "| not ready within 1 s |" in (tmp_path / "mechanisms_cpu.md").read_text()
    assert rows["block_attnres"]["parameters"] == 2 * 7 * 16
    for name in names:
        for mode in ("eager", "compiled") if name != "mhc" else ("eager",):
            part = rows[name][mode]
            assert 0 < part["ratio"]["min"] <= part["ratio"]["median"] <= part["ratio"]["max"]
            assert part["peak"] > 1
    assert rows["mhc"]["eager"]["peak"] > 2 * rows["prenorm"]["eager"]["peak"]

    monkeypatch.setattr(residual, "names", lambda: [*names, "rezero"])
    run()
    assert asked == [("rezero", "eager"), ("mhc", "compiled"), ("rezero", "compiled")]


def test_a_process_over_its_time_is_listed(benchmarks: Path, tmp_path: Path) -> None:
    import mechanisms

    assert mechanisms.in_process("prenorm", "eager", 1, 0.1, str(tmp_path)) == {"failed": "not ready within 0 s"}
