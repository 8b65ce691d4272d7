"""Corpora become tokens on two sides of a split, and the cache gives them back whole or builds them again."""

import errno
import itertools
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest

from attnres.data import corpus as data_module
from attnres.data import pieces
from attnres.data.corpus import default_cache_dir, load_corpus
from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import Failure, UsageError

from .texts import END, FILES, expected_split, held_out, tokens_of


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_folder_is_split_by_the_hash_of_the_path_inside_it(folder, cache, fraction):
    corpus = load_corpus(str(folder), cache_dir=cache, validation_fraction=fraction)
    train, validation = expected_split(sorted(FILES.items()), fraction)
    assert train and validation
    assert tokens_of(corpus) == (train, validation)
    assert (corpus.train.dtype, corpus.train.flags.writeable, isinstance(corpus.train, np.memmap)) == (
        "<u2",
        False,
        True,
    )
    assert corpus.name == "corpus"


def test_copies_at_other_paths_are_the_same_corpus(folder, tmp_path, cache):
    copy = shutil.copytree(folder, tmp_path / "deeply/nested/other/corpus")
    for file in copy.rglob("*.txt"):
        os.utime(file, (1, 1))
    first, second = (load_corpus(str(path), cache_dir=cache) for path in (folder, copy))
    assert first.fingerprint == second.fingerprint
    assert tokens_of(first) == tokens_of(second)
    assert len(list((cache / "tokens").glob("*.tokens"))) == 1


def test_relative_and_absolute_paths_are_the_same_corpus(folder, cache, monkeypatch):
    absolute = load_corpus(str(folder), cache_dir=cache)
    monkeypatch.chdir(folder)
    relative = load_corpus(".", cache_dir=cache)
    assert (relative.fingerprint, relative.name) == (absolute.fingerprint, absolute.name)


def test_a_new_document_moves_no_other_across_the_split(folder, cache):
    (folder / "aaa.txt").write_text("new")
    corpus = load_corpus(str(folder), cache_dir=cache, validation_fraction=0.3)
    assert tokens_of(corpus) == expected_split(sorted({**FILES, "aaa.txt": "new"}.items()), 0.3)


def test_fingerprint_follows_content_tokenizer_and_split(folder, cache):
    pytest.importorskip("tokenizers")
    options = [{}, {"validation_fraction": 0.3}, {"tokenizer": "train:260"}]
    prints = {load_corpus(str(folder), cache_dir=cache, **option).fingerprint for option in options}
    file = folder / "part0/file00.txt"
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"0", b"9"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size and time, other content
    prints.add(load_corpus(str(folder), cache_dir=cache).fingerprint)
    file.rename(folder / "part0/renamed.txt")
    prints.add(load_corpus(str(folder), cache_dir=cache).fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize("name", ["text.txt", "no_suffix", "UPPER.TXT"])
def test_single_file_holds_out_its_end(name, tmp_path, cache):
    (tmp_path / name).write_text("0123456789" * 10)
    train, validation = tokens_of(load_corpus(str(tmp_path / name), cache_dir=cache, validation_fraction=0.25))
    assert [*train, *validation] == [*b"0123456789" * 10, END]
    assert len(validation) == 25


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_even_one_character_has_two_sides(tmp_path, cache, fraction):
    (tmp_path / "a.txt").write_text("a")
    corpus = load_corpus(str(tmp_path / "a.txt"), cache_dir=cache, validation_fraction=fraction)
    assert tokens_of(corpus) == ([ord("a")], [END])


def test_pieces_and_batches_leave_no_trace(folder, cache, monkeypatch):
    (folder / "long.txt").write_text("".join(f"línea {i} 漢字\n" for i in range(500)) + "x" * 5000 + "\n\nend")
    whole = tokens_of(load_corpus(str(folder), cache_dir=cache))
    for module in (pieces, data_module):
        monkeypatch.setattr(module, "PIECE_BYTES", 100)
    monkeypatch.setattr(data_module, "BATCH_BYTES", 333)
    assert tokens_of(load_corpus(str(folder), cache_dir=cache / "other")) == whole


@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_a_long_document_is_marked_once(scheme, tmp_path, cache, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("\u2581\nabc")}, []))
    if scheme == "prepend":
        steps = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        backend.normalizer = tokenizers.normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "abc cab\n" * 400 + "abc" * 400 + " cab" * 400
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    corpus = load_corpus(str(tmp_path / "a.txt"), str(tmp_path / "tokenizer.json"), cache)
    *ids, end = [*corpus.train, *corpus.validation]
    spelled = "".join(backend.id_to_token(int(i)) for i in ids)
    assert spelled == "\u2581" + text.replace(" ", "\u2581") and end == corpus.tokenizer.end_of_document


def test_pieces_are_bounded_and_end_with_a_token(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    for text in ("word  word\n" * 99, "word   word " * 99, "漢" * 999, " " * 999, "é" * 30 + "\n" + "x" * 999):
        found = list(pieces.cut([text.encode(), b"", b"end"]))
        assert b"".join(found) == text.encode() + b"end" and all(0 < len(piece) <= 200 for piece in found)
        assert all(piece.decode() for piece in found), "no character is cut"
        for before, after in itertools.pairwise(found[:-1]):
            if "word" in text:
                assert before.endswith(b"\n") or (after.startswith(b" ") and not before.endswith(b" "))


def test_bpe_corpus_learns_from_training_documents(folder, cache, tmp_path):
    pytest.importorskip("tokenizers")
    held = next(name for name in FILES if held_out(name, 0.3))
    first = load_corpus(str(folder), "train:270", cache, validation_fraction=0.3)
    (folder / held).write_text("zqzqzqzqzq" * 1000)
    second = load_corpus(str(folder), "train:270", cache, validation_fraction=0.3)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.fingerprint != first.fingerprint
    documents = first.tokenizer.decode(first.train), first.tokenizer.decode(first.validation)
    assert documents == tuple(
        bytes(i for i in side if i != END).decode() for side in expected_split(sorted(FILES.items()), 0.3)
    )
    ends = sum(not held_out(name, 0.3) for name in FILES)
    assert first.train.tolist().count(first.tokenizer.end_of_document) == ends
    single = load_corpus(str(folder / held), "train:260", cache)
    assert single.tokenizer.vocab_size == 260


def test_large_vocabulary_takes_32_bits(folder, cache, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        vocabulary = {"[UNK]": 0, **{f"w{i}": i for i in range(1, size - 1)}, "</s>": size - 1}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.save(str(tmp_path / "tokenizer.json"))
        corpus = load_corpus(str(folder), str(tmp_path / "tokenizer.json"), cache)
        assert (corpus.tokenizer.vocab_size, corpus.train.dtype) == (size, dtype)
        assert set(corpus.train.tolist()) == {0, size - 1}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_validation_fraction_out_of_range(fraction, folder, cache):
    with pytest.raises(UsageError, match="validation_fraction must lie between 0 and 1"):
        load_corpus(str(folder), cache_dir=cache, validation_fraction=fraction)


# ---- token cache


def test_default_cache_folder(monkeypatch, tmp_path, folder):
    monkeypatch.delenv("ATTNRES_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "attnres"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "attnres"
    monkeypatch.setenv("ATTNRES_CACHE", str(tmp_path / "own"))
    load_corpus(str(folder))
    assert list((tmp_path / "own").rglob("*.tokens"))


def test_cache_hit_neither_tokenises_nor_writes(folder, cache, monkeypatch):
    first = tokens_of(load_corpus(str(folder), cache_dir=cache))
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)
    monkeypatch.setattr("attnres.data.cache.writing", None)  # a shared cache may be read-only
    assert tokens_of(load_corpus(str(folder), cache_dir=cache)) == first


DAMAGES = {
    "empty": lambda whole: b"",
    "header cut": lambda whole: whole[:300],
    "truncated": lambda whole: whole[:-2],
    "longer": lambda whole: whole + b"\0\0",
    "a flipped token bit": lambda whole: whole[:700] + bytes([whole[700] ^ 1]) + whole[701:],
    "zeros, as after a power failure": lambda whole: bytes(len(whole)),
    "foreign": lambda whole: os.urandom(len(whole)),
    "foreign JSON": lambda whole: b"[1, 2]".ljust(512) + whole[512:],
    "another key": lambda whole: whole.replace(b'"key": "', b'"key": "0', 1)[: len(whole)],
    "another border": lambda whole: re.sub(rb'"train": \d+', b'"train": -1', whole, count=1),
    "another dtype": lambda whole: whole.replace(b"<u2", b"<x9", 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_found_and_rebuilt(damage, folder, cache, caplog):
    first = tokens_of(load_corpus(str(folder), cache_dir=cache))
    (entry,) = cache.glob("tokens/*.tokens")
    whole = entry.read_bytes()
    entry.unlink()  # the mapped tokens above stay valid: writing in place would change them
    entry.write_bytes(DAMAGES[damage](whole))
    with caplog.at_level(logging.WARNING):
        assert tokens_of(load_corpus(str(folder), cache_dir=cache)) == first
    assert "damaged or foreign" in caplog.text
    assert entry.read_bytes() == whole


def in_child(function, *arguments):
    """Run in a forked process (quick: no imports) and return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def build_and_die(folder, cache, moment):
    def die(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "while tokenising":
        encode, calls = ByteTokenizer.encode_batch, itertools.count()
        data_module.BATCH_BYTES = 100
        ByteTokenizer.encode_batch = lambda self, *texts: die() if next(calls) == 5 else encode(self, *texts)
    elif moment == "before the rename":
        os.replace = die
    else:
        rename = os.replace
        os.replace = lambda source, target: (rename(source, target), die())
    load_corpus(str(folder), cache_dir=cache)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("moment", ["while tokenising", "before the rename", "after the rename"])
def test_kill_leaves_no_half_cache(moment, folder, tmp_path, cache):
    expected = tokens_of(load_corpus(str(folder), cache_dir=tmp_path / "undisturbed"))
    assert in_child(build_and_die, folder, cache, moment) == -signal.SIGKILL
    assert bool(list(cache.glob("tokens/*.tokens"))) == (moment == "after the rename")
    assert bool(list(cache.glob("tokens/.*.partial"))) == (moment != "after the rename")
    assert tokens_of(load_corpus(str(folder), cache_dir=cache)) == expected
    assert not list(cache.glob("tokens/.*")), "what a killed build left is swept up"


def build_and_report(folder, cache, start, results):
    encode = ByteTokenizer.encode_batch
    built = []
    ByteTokenizer.encode_batch = lambda self, *texts: built.append(1) or encode(self, *texts)
    start.wait(30)
    corpus = load_corpus(str(folder), cache_dir=cache)
    results.put((bool(built), corpus.fingerprint, tokens_of(corpus)))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_that_build_at_once_share_one_build(folder, cache, tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=build_and_report, args=(folder, cache, start, results)) for _ in range(4)]
    for process in processes:
        process.start()
    reports = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    expected = load_corpus(str(folder), cache_dir=tmp_path / "undisturbed")
    assert all(report[1:] == (expected.fingerprint, tokens_of(expected)) for report in reports)
    assert sum(built for built, *_ in reports) == 1


def test_full_disk(folder, cache, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(Failure, match=r"cannot write .*No space left on device.*ATTNRES_CACHE"):
            load_corpus(str(folder), cache_dir=cache)
    assert not list(cache.glob("tokens/*.tokens")) and not list(cache.glob("tokens/.*"))
    load_corpus(str(folder), cache_dir=cache)


def test_cache_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"cannot write .*ATTNRES_CACHE"):
        load_corpus(str(folder), cache_dir=tmp_path / "file" / "cache")


def test_long_work_reports_plain_lines(folder, cache, monkeypatch, capsys):
    clock = itertools.count(step=11)
    monkeypatch.setattr(data_module.time, "monotonic", lambda: next(clock))
    load_corpus(str(folder), cache_dir=cache)
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenising corpus: 0 MB of 0 MB\n") and not captured.out
