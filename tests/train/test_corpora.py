"""Every kind of corpus is read as the same documents, and bad ones are refused in one clear sentence."""

import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest

from attnres.errors import UsageError
from attnres.train.data import load_corpus

from .texts import END, FILES, RECORDS, expected_split, held_out, make_folder, tokens_of


def test_default_corpus_is_the_standard_library(cache):
    stdlib = load_corpus(cache_dir=cache)
    root = Path(sysconfig.get_path("stdlib"))
    train, validation = (stdlib.tokenizer.decode(side) for side in (stdlib.train, stdlib.validation))
    for name in ("abc.py", "argparse.py", "asyncio/locks.py", "json/decoder.py"):
        text = (root / name).read_text(encoding="utf-8")
        assert (text in train, text in validation) == ((False, True) if held_out(name, 0.05) else (True, False)), name
    assert 0.01 < len(stdlib.validation) / len(stdlib.train) < 0.3
    assert re.fullmatch(r"python-3\.\d+\.\d+\S*-stdlib", stdlib.name)


def test_site_packages_and_tests_are_not_the_library(tmp_path, cache, monkeypatch):
    root = make_folder(
        tmp_path / "lib",
        {
            "os.py": "import abc\n",
            "json/tool.py": "import json\n",
            "notes.txt": "no source",
            **{f"{name}/x.py": "excluded" for name in ("site-packages", "dist-packages", "test", "json/tests")},
        },
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root) if name == "stdlib" else None)
    train, validation = tokens_of(load_corpus(None, cache_dir=cache, validation_fraction=0.5))
    assert len(train) + len(validation) == len("import abc\nimport json\n") + 2
    assert load_corpus("stdlib", cache_dir=cache).name.endswith("-stdlib")


def write_jsonl(path, column="text"):
    path.write_text("\n".join(json.dumps({"id": i, column: text}) for i, text in enumerate(RECORDS)) + "\n\n")
    return str(path)


def write_parquet(path, column="text"):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({column: RECORDS, "id": range(60)}), path)
    return str(path)


def write_dataset(path, column="text"):
    pytest.importorskip("datasets").Dataset.from_dict({"id": range(60), column: RECORDS}).save_to_disk(path)
    return str(path)


def write_dataset_dict(path, column="text"):
    datasets = pytest.importorskip("datasets")
    parts = {
        "train": datasets.Dataset.from_dict({column: RECORDS}),
        "test": datasets.Dataset.from_dict({column: ["t"]}),
    }
    datasets.DatasetDict(parts).save_to_disk(path)
    return str(path)


def write_shards(path, column="text"):
    path.mkdir()
    (path / "README.md").write_text("a dataset card, which is no document")
    for shard, start in enumerate(range(0, 60, 20)):
        lines = (json.dumps({column: text}) for text in RECORDS[start : start + 20])
        (path / f"shard-{shard}.jsonl").write_text("\n".join(lines))
    return str(path)


WRITERS = {
    "r.jsonl": write_jsonl,
    "r.parquet": write_parquet,
    "saved": write_dataset,
    "saved-splits": write_dataset_dict,
    "shards": write_shards,
}


@pytest.mark.parametrize("name", WRITERS)
def test_records_are_split_by_their_text_in_every_format(name, tmp_path, cache):
    source = WRITERS[name](tmp_path / name)
    corpus = load_corpus(source, cache_dir=cache, validation_fraction=0.3)
    assert tokens_of(corpus) == expected_split([(text, text) for text in RECORDS], 0.3)
    assert tokens_of(load_corpus(source, cache_dir=cache, validation_fraction=0.3)) == tokens_of(corpus)


@pytest.mark.parametrize("name", WRITERS)
def test_text_column(name, tmp_path, cache):
    source = WRITERS[name](tmp_path / name, column="body")
    corpus = load_corpus(source, cache_dir=cache, text_column="body")
    assert len(corpus.train) + len(corpus.validation) == sum(map(len, RECORDS)) + len(RECORDS)
    with pytest.raises(UsageError, match=r"has no column 'text', only \['body'.*text_column"):
        load_corpus(source, cache_dir=cache)


def test_hub_dataset_is_loaded_by_name_and_config(tmp_path, cache, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": RECORDS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("squad_v1.1", "org/name:config"):
        corpus = load_corpus(name, cache_dir=cache, validation_fraction=0.3)
        assert tokens_of(corpus) == expected_split([(text, text) for text in RECORDS], 0.3)
    assert asked == [("squad_v1.1", None, "train"), ("org/name", "config", "train")]


def test_empty_records_are_no_documents(tmp_path, cache):
    (tmp_path / "r.jsonl").write_text('{"text": "ab"}\n{"text": ""}\n\n{"text": null}\n{"text": "\\ud800"}\n')
    train, validation = tokens_of(load_corpus(str(tmp_path / "r.jsonl"), cache_dir=cache))
    assert sorted([*train, *validation]) == sorted([*b"ab", END, ord("?"), END])


# ---- bad input


def test_binary_files_in_a_folder_are_skipped_with_one_note(folder, cache, caplog):
    make_folder(
        folder, {"nul.txt": b"a\0b", "latin.py": "é".encode("latin-1"), "late.md": b"fine\n" * 300_000 + b"\xff"}
    )
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    make_folder(folder, {".git/hidden.txt": "hidden", ".hidden.txt": "hidden"})
    corpus = load_corpus(str(folder), cache_dir=cache, validation_fraction=0.3)
    assert tokens_of(corpus) == expected_split(sorted(FILES.items()), 0.3)
    (note,) = [record.getMessage() for record in caplog.records]
    assert "skipped 3 binary files" in note


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a\0b", "is binary"),
        ("a.txt", b"caf\xe9", "is binary"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.jsonl", b'{"text": ""}', "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": }', "line 2 .* is not JSON"),
        ("a.jsonl", b'["text"]', "line 1 .* is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a"}', r"line 2 .* has no column 'text', only \['body'\]"),
        ("a.jsonl", b'{"text": 3}', "column 'text' in line 1 .* holds int, not text"),
        ("a.parquet", b"not parquet", "is no readable Parquet"),
        ("a.xyz", b"text", r"unknown suffix; rename it to one of .*\.jsonl.*\.txt"),
    ],
)
def test_bad_file_is_one_clear_sentence(name, content, message, tmp_path, cache):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_corpus(str(tmp_path / name), cache_dir=cache)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("tokens/*.tokens")) and not list(cache.glob("tokens/.*"))


@pytest.mark.parametrize(
    "data", ["absent.txt", "./absent", "/absent/folder", "absent folder", "a/b/c", "", "x.parquet"]
)
def test_missing_data(data, cache):
    with pytest.raises(
        UsageError, match="does not exist; give a text, JSONL or Parquet file, a folder or a Hub dataset"
    ):
        load_corpus(data, cache_dir=cache)


def test_unreadable_hub_dataset(cache, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*arguments, **options):
        raise ConnectionError("offline\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UsageError, match=r"org/name is no file or folder of text, and datasets cannot load it: offline$"
    ):
        load_corpus("org/name", cache_dir=cache)


def test_dataset_without_train_split(tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "d")
    with pytest.raises(UsageError, match=r"no split 'train', only \['dev'\]"):
        load_corpus(str(tmp_path / "d"), cache_dir=cache)


def test_folders_without_text(tmp_path, cache):
    make_folder(tmp_path, {"pictures/a.png": b"\0", "binary/a.txt": b"\0"})
    with pytest.raises(UsageError, match="folder without a file that is read"):
        load_corpus(str(tmp_path / "pictures"), cache_dir=cache)
    with pytest.raises(UsageError, match="is binary"):
        load_corpus(str(tmp_path / "binary"), cache_dir=cache)


@pytest.mark.parametrize(
    ("name", "package"), [("saved", "datasets"), ("r.parquet", "pyarrow"), ("org/name", "datasets")]
)
def test_missing_package_names_the_extra(name, package, tmp_path, cache, monkeypatch):
    source = WRITERS[name](tmp_path / name) if name in WRITERS else name
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"needs the package datasets: pip install 'attnres\[train\]'"):
        load_corpus(source, cache_dir=cache)
