"""JSON that others wrote: one way in, which raises ValueError for all that cannot be used."""

import ast
import json
import shutil
from pathlib import Path

import pytest

import attnres
from attnres.json_text import DEEPEST, parse, parse_object


def nested(levels, brackets="[]"):
    return brackets[0] * levels + brackets[1] * levels


@pytest.mark.parametrize(
    "text", ["", "[", "{1: 2}", "[" * 100_000, '{"a":' * 100_000, b"\xff", "9" * 5000, nested(DEEPEST + 1)]
)
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse(text)


def test_nesting_counts_not_brackets():
    flat = [{"a": [i]} for i in range(1000)]
    assert parse(json.dumps(flat)) == flat
    assert parse(json.dumps("[{" * 1000)) == "[{" * 1000
    assert parse(nested(DEEPEST)) == json.loads(nested(DEEPEST))
    assert parse(nested(DEEPEST).encode("utf-16")) == json.loads(nested(DEEPEST))


def test_an_object_is_asked_for():
    assert parse_object(b'{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="it holds a list in the place of an object"):
        parse_object("[1]")


def test_nothing_else_reads_json():
    """Another way in would end with RecursionError on what this one refuses."""
    root = Path(attnres.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("loads", "load", "JSONDecodeError"):
                of_json = isinstance(node.value, ast.Name) and node.value.id == "json"
                assert not of_json or file.name == "json_text.py", f"{file}:{node.lineno}"


DEEP = '{"a":' * 100_000


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("config.json", "generate"),
        ("config.json", "train --resume --out"),
        ("config.json", "inspect --text words"),
        ("tokenizer_config.json", "generate"),
        ("tokenizer_config.json", "inspect --text words"),
        ("checkpoints/*/state.json", "generate"),
        ("corpus.jsonl", "train --steps 1 --data"),
    ],
)
def test_deep_json_ends_every_command_with_one_sentence(server, finished_run, tmp_path, name, command):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "corpus.jsonl").touch()
    files = list(run.glob(name))
    assert files
    for file in files:
        file.write_text(DEEP)
    argument = run / name if name == "corpus.jsonl" else run
    end = server.run(*command.split(), argument)
    assert end.status in (1, 2) and "unexpected" not in end.err and "Traceback" not in end.err
    assert str(tmp_path) in end.err.splitlines()[-1]


def test_deep_json_in_metrics_is_left_out_as_a_half_written_line_is(finished_run, tmp_path):
    from attnres.train.journal import read_metrics

    run = shutil.copytree(finished_run, tmp_path / "run")
    known = read_metrics(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(DEEP)
    assert read_metrics(run) == known
