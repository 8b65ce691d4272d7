"""Every kind of corpus is read as the same documents, and bad ones are refused in one clear sentence."""

import bz2
import gzip
import json
import lzma
import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest

from attnres.data.corpus import load_corpus
from attnres.errors import UsageError

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


COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def compress_zstd(content):
    return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_compressed_files_are_what_is_in_them(name, suffix, tmp_path, cache):
    content = b"".join(b'{"text": "line %d"}\n' % i for i in range(50))
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.{suffix}").write_bytes(COMPRESSED.get(suffix, compress_zstd)(content))
    plain, packed = (load_corpus(str(path), cache_dir=cache) for path in sorted(tmp_path.glob(f"{name}*")))
    assert tokens_of(packed) == tokens_of(plain)


def test_csv_and_json_hold_records(tmp_path, cache):
    texts = ["plain", 'with, comma and "quotes"', "two\nlines", "é" * 200_000, *map(str, range(9))]
    rows = "".join('{},"{}"\r\n'.format(i, text.replace('"', '""')) for i, text in enumerate(texts))
    records = [{"n": i, "text": text} for i, text in enumerate(texts)]
    (tmp_path / "a.csv").write_text("n,text\r\n" + rows, newline="")
    (tmp_path / "a.tsv").write_text("text\tn\n" + "".join(f"t{i}\t{i}\n" for i in range(4)))
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "one.json").write_text(json.dumps({"text": "one"}, indent=1))
    for name in ("a.csv", "list.json", "lines.json"):
        corpus = load_corpus(str(tmp_path / name), cache_dir=cache, validation_fraction=0.3)
        assert tokens_of(corpus) == expected_split([(text, text) for text in texts], 0.3), name
    for name, text in (("a.tsv", "".join(f"t{i}" for i in range(4))), ("one.json", "one")):
        corpus = load_corpus(str(tmp_path / name), cache_dir=cache)
        assert sorted(i for side in tokens_of(corpus) for i in side if i != END) == sorted(text.encode()), name


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_text(name, tmp_path, cache):
    content = {"a.txt": "word", "a.jsonl": '{"text": "word"}', "a.csv": "text\nword\n"}[name]
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    train, validation = tokens_of(load_corpus(str(tmp_path / name), cache_dir=cache))
    assert [*train, *validation] == [*b"word", END]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "saved"])
def test_a_column_inside_a_struct_is_named_with_a_dot(name, tmp_path, cache):
    records = [{"id": 0, "page": {"text": "in a struct", "url": "u"}}, {"id": 1, "page": None}]
    if name == "a.jsonl":
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
    elif name == "saved":
        pytest.importorskip("datasets").Dataset.from_list(records).save_to_disk(tmp_path / name)
    else:
        table = pytest.importorskip("pyarrow").Table.from_pylist(records)
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / name)
    train, validation = tokens_of(load_corpus(str(tmp_path / name), cache_dir=cache, text_column="page.text"))
    assert [*train, *validation] == [*b"in a struct", END]
    with pytest.raises(UsageError, match=r"holds an object of \['text', 'url'\], not text"):
        load_corpus(str(tmp_path / name), cache_dir=cache, text_column="page")
    with pytest.raises(UsageError, match=r"'page' in .* has no column 'body', only \['text', 'url'\]"):
        load_corpus(str(tmp_path / name), cache_dir=cache, text_column="page.body")


def test_text_in_parquet_is_utf8(tmp_path, cache):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, kind in (("text", pyarrow.string()), ("binary", pyarrow.binary())):
        for text, offset in ((b"caf\xc3\xa9", 5), (b"caf\xe9", 4)):
            buffers = [None, pyarrow.py_buffer(offset.to_bytes(4, "little").rjust(8, b"\0")), pyarrow.py_buffer(text)]
            column = pyarrow.Array.from_buffers(kind, 1, buffers)
            parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}{offset}.parquet")
        train, validation = tokens_of(load_corpus(str(tmp_path / f"{name}5.parquet"), cache_dir=cache))
        assert [*train, *validation] == [*"café".encode(), END]
        with pytest.raises(
            UsageError, match=r"column 'text' of .*4.parquet holds (text that is|bytes that are) not UTF-8"
        ):
            load_corpus(str(tmp_path / f"{name}4.parquet"), cache_dir=cache)


def test_texts_and_records_in_one_folder_are_not_guessed_between(folder, cache):
    (folder / "metadata.jsonl").write_text('{"text": "a caption"}\n')
    with pytest.raises(
        UsageError, match=r"holds both texts \(40, such as .*\) and records \(1, such as metadata.jsonl\)"
    ):
        load_corpus(str(folder), cache_dir=cache)
    (folder / "metadata.jsonl").rename(folder / "metadata.csv")  # beside text a table is no corpus
    corpus = load_corpus(str(folder), cache_dir=cache, validation_fraction=0.3)
    assert tokens_of(corpus) == expected_split(sorted(FILES.items()), 0.3)


def test_a_folder_of_tables_with_a_card(tmp_path, cache):
    make_folder(tmp_path / "d", {"README.md": "a card", "a.csv": "text\nin a table\n", "dataset_infos.json": "{}"})
    train, validation = tokens_of(load_corpus(str(tmp_path / "d"), cache_dir=cache))
    assert [*train, *validation] == [*b"in a table", END]


def test_linked_folders_are_read_once(tmp_path, cache, caplog):
    files = {f"{name}/{i}.txt": f"{name} {i}" for name in ("a", "b") for i in range(9)}
    make_folder(tmp_path / "whole", files)
    make_folder(tmp_path / "elsewhere", {name: text for name, text in files.items() if name.startswith("b")})
    make_folder(tmp_path / "linked", {name: text for name, text in files.items() if name.startswith("a")})
    (tmp_path / "linked/b").symlink_to(tmp_path / "elsewhere/b")
    (tmp_path / "linked/a/loop").symlink_to(tmp_path / "linked")
    (tmp_path / "linked/0-again").symlink_to(tmp_path / "linked/a")
    whole, linked = (load_corpus(str(tmp_path / name), cache_dir=cache) for name in ("whole", "linked"))
    assert linked.fingerprint == whole.fingerprint and not caplog.records
    (tmp_path / "linked/gone.txt").symlink_to(tmp_path / "gone.txt")
    load_corpus(str(tmp_path / "linked"), cache_dir=cache)
    assert "1 links lead nowhere, such as" in caplog.text


def test_a_folder_that_cannot_be_read_is_not_left_out(folder, cache, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("part1"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="part1 cannot be read: Permission denied; leave it out"):
        load_corpus(str(folder), cache_dir=cache)


# ---- bad input


def test_binary_files_in_a_folder_are_skipped_with_one_note(folder, cache, caplog):
    make_folder(
        folder, {"nul.txt": b"a\0b", "latin.py": "é".encode("latin-1"), "late.md": b"fine\n" * 300_000 + b"\xff"}
    )
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    make_folder(folder, {".git/hidden.txt": "hidden", ".hidden.txt": "hidden"})
    corpus = load_corpus(str(folder), cache_dir=cache, validation_fraction=0.3)
    assert tokens_of(corpus) == expected_split(sorted(FILES.items()), 0.3)
    left_out, skipped = [record.getMessage() for record in caplog.records]
    assert "1 of 44 files are no part of the corpus, such as" in left_out and "image.png" in left_out
    assert "skipped 3 files that are no UTF-8 text" in skipped


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a\0b", "is binary"),
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 \(byte 0xe9\); convert it, .*iconv -f LATIN1"),
        ("a.txt", "text".encode("utf-16"), "a.txt is UTF-16; convert it, .*iconv -f UTF-16"),
        ("a.csv", b"text,n\na,1,2\n", "line 2 of .*a.csv has more fields than the first line names"),
        ("a.csv", b"body\na\n", r"has no column 'text', only \['body'\]"),
        ("a.json", b'[{"text": "a"}, 3]', "record 2 of .* is not a JSON object"),
        ("a.json", b'[{"text": "a"}', "a.json is not JSON"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz is damaged"),
        ("a.txt.xz", b"no xz", "a.txt.xz is damaged"),
        ("a.txt.zst", b"no zstandard", "a.txt.zst cannot be read"),
        ("a.parquet.gz", b"", "unknown suffix"),
        ("a.jsonl", b'{"messages": []}', "has no column 'text' but 'messages', a conversation: .*apply_chat_template"),
        ("a.jsonl", b'{"text": [{"role": "user", "content": "a"}]}', "holds a conversation, not text; .*chat_template"),
        ("a.jsonl", b'{"text": {"en": "a"}}', r"holds an object of \['en'\], not text; name .* text_column=a.b"),
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
