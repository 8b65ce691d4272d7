"""`attnres bench`: every question is asked and told, in the time that there is. No test asserts a time."""

import json
import re
import time

import pytest
import torch

from attnres.bench import Machine, bench, clock, measure
from attnres.bench.words import sentence, table
from attnres.commands import bench as command
from attnres.errors import UsageError

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--dtype", "float32", "--width", "64", "--layers", "1", "--tokens", "16"]


def ratio(median, least, most):
    return {"milliseconds": {"median": 1.0, "min": 1.0, "max": 1.0},
            "ratio": {"median": median, "min": least, "max": most}, "turns": [1.0]}  # fmt: skip


@pytest.fixture
def found():
    rows = {"PreNorm": ratio(1, 1, 1), "Block AttnRes": ratio(1.024, 1.01, 1.04), "Full AttnRes": ratio(1.1, 1.0, 1.2)}
    tokens = {**rows, "Block AttnRes": ratio(0.996, 0.99, 1.001)}
    return {"copy_gbs": 10.0, "left_out": {},
            "tables": {"training step, 12 Transformer blocks": rows, "decoded token": tokens,
                       "training step, 12 Transformer blocks, compiled": {"PreNorm": ratio(1, 1, 1)}}}  # fmt: skip


def test_the_command_asks_everything_and_writes_it_down(tmp_path, capsys):
    assert (
        command.run(
            [*TINY, "--quick", "--rivals", "--json", str(tmp_path / "b.json"), "--page", str(tmp_path / "b.html")]
        )
        == 0
    )
    shown, saved = capsys.readouterr(), json.loads((tmp_path / "b.json").read_text())
    assert [*saved["tables"]] == [
        "read of 9 sources, forward and backward", "training step, 1 Transformer blocks", "decoded token",
    ]  # fmt: skip
    for name, rows in saved["tables"].items():
        first = next(iter(rows))
        assert [*rows] == [*measure.RESIDUALS] or [*rows] == ["straightforward", "attnres"]
        for row in rows.values():
            own, base = row["turns"], rows[first]["turns"]
            assert clock.spread(own) == pytest.approx(row["milliseconds"], abs=1e-3), name
            wanted = clock.spread([a / b for a, b in zip(own, base, strict=True)])
            assert wanted == pytest.approx(row["ratio"], rel=0.05)
    assert {"fla Triton", "compiled"} <= {*saved["left_out"]} and saved["copy_gbs"] > 0
    assert saved["command"].startswith("attnres bench --device cpu") and saved["torch"] == torch.__version__
    assert (
        sentence(saved) in shown.out and "left out: compiled: --quick" in shown.out and "decoded token ..." in shown.err
    )
    page = (tmp_path / "b.html").read_text()
    assert "://" not in page and page.count('class="row"') == sum(map(len, saved["tables"].values()))
    assert re.search(r"aria-label=.Full AttnRes: [\d.,]+ ms \([\d.]+, ", page)


def test_the_sentence_says_what_is_added_and_when_it_cannot_be_trusted(found):
    assert sentence(found) == (
        "Here Block AttnRes adds 2 % (1 to 4 %) to a training step and 0 % (-1 to 0 %) to a decoded token; "
        "Full AttnRes adds 10 % (0 to 20 %) to a training step and 10 % (0 to 20 %) to a decoded token."
    )
    found["tables"]["decoded token"]["Full AttnRes"] = ratio(1.1, 0.9, 1.5)
    assert sentence(found).endswith("These ranges are wide, as where something else uses the machine; run it alone.")


def test_kernels_stand_beside_what_others_published(found):
    found["kernels"] = measure.kernels(CPU, {(2, 3): {"FlagGems": 2.51}}, width=64)
    assert found["kernels"][0]["microseconds"]["min"] > 0
    lines = table(found).splitlines()
    assert any("FlagGems, H100, published" in line for line in lines)
    assert any(line.startswith("2 x 3") and line.endswith("2.51") for line in lines)


def test_calls_take_turns_and_are_paired_by_round(monkeypatch):
    order, now = [], iter(range(100))
    monkeypatch.setattr(clock, "milliseconds", lambda call, device: (call(), float(next(now)))[1])
    times = clock.turns({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 60.0)
    assert order == [*"ab"] * (1 + clock.MOST) and len(times["a"]) == len(times["b"]) == clock.MOST
    assert clock.ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}, "a")["b"] == {
        "median": 1.0,
        "min": 0.5,
        "max": 2.0,
    }


def test_what_cannot_be_compiled_in_time_is_left_out(monkeypatch):
    def endless(machine, names):
        return {names[0]: lambda: time.sleep(0.2 if names[0] == "PreNorm" else 60)}

    monkeypatch.setattr(measure, "_steps", endless)
    found = {"tables": {}, "left_out": {}}
    machine = Machine(device="cpu", width=64, layers=1, tokens=16, minutes=0.1)
    measure._compiled(machine, "compiled", found, time.monotonic() + 16)
    assert not found["tables"] and "Block AttnRes, compiled" in found["left_out"]
    assert "give --minutes" in found["left_out"]["mHC, compiled"]


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    def broken(machine, names):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(measure, "_steps", broken)
    found = {"tables": {}, "left_out": {}}
    measure._compiled(Machine(device="cpu", width=64, layers=1, tokens=16), "compiled", found, time.monotonic() + 60)
    assert found["left_out"]["PreNorm, compiled"] == "torch.compile failed: RuntimeError"


def test_a_rival_that_fails_is_left_out_with_the_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(
        measure.rivals, "load", lambda device: ({"liger-kernel": measure.rivals.Rival("x", broken)}, {})
    )
    left_out = {}
    calls = measure._reads(Machine(device="cpu", width=64, layers=1, tokens=16, rivals=True), left_out)
    assert [*calls] == ["straightforward", "attnres"] and left_out == {"liger-kernel": "RuntimeError: no kernel image"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"device": "tpu:9"}, "device 'tpu:9' cannot be used here"),
        ({"dtype": "float16"}, "dtype must be auto, float32 or bfloat16; it is 'float16'"),
        ({"width": 100}, "width must be a multiple of 64, the size of an attention head; it is 100"),
        ({"width": -64}, "width must be a positive whole number"),
        ({"layers": 0}, "layers must be a positive whole number; it is 0"),
        ({"width": 0}, "width must be a positive whole number; it is 0"),
        ({"tokens": 0}, "tokens must be a positive whole number; it is 0"),
        ({"tokens": 1000}, "tokens beyond 512 must be a multiple of it, as sequences are; it is 1000"),
        ({"tokens": -1}, "tokens must be a positive whole number; it is -1"),
        ({"minutes": 0.0}, "minutes must be positive"),
        ({"minutes": float("nan")}, "minutes must be positive"),
    ],
)
def test_bad_input_is_named(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        Machine(**arguments)


def test_models_that_do_not_fit_are_refused_before_they_are_built():
    with pytest.raises(UsageError, match=r"width 640000, 12 layers and 1024 tokens take .* GiB at least and cpu has"):
        bench(Machine(device="cpu", width=640_000))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"--json .*b\.json: there is no folder"):
        command.run([*TINY, "--json", str(tmp_path / "none" / "b.json")])
