"""Tokenizers: round trips, the file a run keeps, BPE from a corpus, and clear words for bad specs."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnres
from attnres.data import pieces
from attnres.data import tokenizer as tokenizer_module
from attnres.data.tokenizer import ByteTokenizer, LibraryTokenizer, load_tokenizer, load_tokenizer_from
from attnres.errors import Failure, UsageError

DOCUMENTS = [
    "def add(left, right):\n    return left + right\n" * 20,
    b"class Adder:\n    total = 0\n" * 20,
    "naïve 漢字 🎉",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return load_tokenizer("train:280", lambda: DOCUMENTS, tmp_path_factory.mktemp("cache"))


@given(st.text())
def test_bytes_are_the_utf8_bytes_and_come_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text.encode("utf-8", "replace"))
    assert ids.tolist() == list(text.encode("utf-8", "replace"))
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode()


def test_byte_vocabulary_is_256_bytes_and_the_end_of_a_document():
    tokenizer = load_tokenizer("bytes", None, "unused")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.encode("\ud800").tolist() == [ord("?")]  # a lone surrogate has no UTF-8 form


@given(st.lists(st.integers(-5, 300)))
def test_any_byte_ids_decode(ids):
    expected = bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")
    assert ByteTokenizer().decode(np.array(ids, dtype=np.int64)) == expected


@given(ids=st.lists(st.integers(-5, 400)))
def test_any_bpe_ids_decode(bpe, ids):
    assert isinstance(bpe.decode(ids), str)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode(text).tolist() == bpe.encode(text.encode()).tolist()


def test_bpe_has_the_asked_size_and_learned_something(bpe):
    assert bpe.vocab_size == 280
    assert 0 <= bpe.end_of_document < 280
    assert len(bpe.encode(DOCUMENTS[0])) < len(DOCUMENTS[0]) / 2
    assert [ids.tolist() for ids in bpe.encode_batch(DOCUMENTS)] == [bpe.encode(text).tolist() for text in DOCUMENTS]


def test_text_cannot_forge_the_end_of_a_document(bpe):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.end_of_document not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"
    assert bpe.decode([*ids, bpe.end_of_document]) == "a<|endoftext|>b"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_run_folder_gives_the_same_tokenizer(kind, bpe, tmp_path):
    saved = bpe if kind == "bpe" else ByteTokenizer()
    saved.save(tmp_path / "run")
    found = load_tokenizer_from(tmp_path / "run")
    assert type(found) is type(saved)
    assert (found.fingerprint, found.end_of_document) == (saved.fingerprint, saved.end_of_document)
    assert load_tokenizer(str(tmp_path / "run"), None, tmp_path).fingerprint == saved.fingerprint
    assert load_tokenizer(str(tmp_path / "run/tokenizer.json"), None, tmp_path).fingerprint == saved.fingerprint
    assert found.encode(DOCUMENTS[2]).tolist() == saved.encode(DOCUMENTS[2]).tolist()


def test_fingerprints_tell_tokenizers_apart(bpe, tmp_path):
    other = load_tokenizer("train:270", lambda: DOCUMENTS, tmp_path)
    assert len({bpe.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3


def test_saved_bytes_mean_the_same_to_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ByteTokenizer().save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "tab\tnew\r\n line  é 漢字 🎉 \x00 don't"
    assert theirs.encode(text) == ByteTokenizer().encode(text).tolist()
    assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.eos_token_id, len(theirs)) == (256, 257)


def test_bytes_need_no_package(tmp_path):
    ByteTokenizer().save(tmp_path)
    # A package made by hand, since attnres/__init__.py imports torch, which takes seconds and plays no part here.
    program = (
        "import sys, types; sys.modules.update(tokenizers=None, datasets=None, rich=None)\n"
        "package = sys.modules['attnres'] = types.ModuleType('attnres')\n"
        f"package.__path__ = {list(attnres.__path__)}\n"
        "from attnres.data.tokenizer import load_tokenizer_from\n"
        f"print(load_tokenizer_from({str(tmp_path)!r}).vocab_size)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "257", done.stderr


def test_trained_bpe_is_kept_for_equal_documents_only(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    first = load_tokenizer("train:270", lambda: DOCUMENTS, tmp_path)
    other = load_tokenizer("train:270", lambda: [*DOCUMENTS, "more"], tmp_path)
    assert len(list((tmp_path / "tokenizers").glob("*.json"))) == 2
    assert other.vocab_size == 270
    monkeypatch.setattr(tokenizers.trainers, "BpeTrainer", None)  # a second training would fail
    assert load_tokenizer("train:270", lambda: DOCUMENTS, tmp_path).fingerprint == first.fingerprint


def test_damaged_bpe_cache_is_learned_again(tmp_path):
    pytest.importorskip("tokenizers")
    first = load_tokenizer("train:270", lambda: DOCUMENTS, tmp_path)
    (file,) = (tmp_path / "tokenizers").glob("*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert load_tokenizer("train:270", lambda: DOCUMENTS, tmp_path).fingerprint == first.fingerprint
    assert file.read_bytes() == whole


def test_bpe_learns_from_a_bounded_sample(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(tokenizer_module, "BPE_SAMPLE_BYTES", 1000)
    taken = []

    def documents():
        for index in range(100):
            taken.append(index)
            yield "some words to merge " * 10

    load_tokenizer("train:260", documents, tmp_path)
    assert max(taken) == 4


def test_bpe_learns_from_no_long_text_or_word(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10_000)
    learned = []

    def watched(text):
        for part in pieces.cut_words(text):
            learned.append(part)
            yield part

    monkeypatch.setattr(tokenizer_module, "cut_words", watched)
    document = "one line of words " * 5000 + "ACGT" * 5000 + "漢" * 5000 + "1" * 5000 + " " * 5000 + "?" * 5000 + "\n"
    load_tokenizer("train:270", lambda: [document, "a_b c1\n" * 9], tmp_path)
    assert "".join(learned) == document + "a_b c1\n" * 9 and learned[-1] == "a_b c1\n" * 9
    assert max(len(text.encode()) for text in learned) <= 20_000
    words = re.findall(r"[^\W\d_]+|\d+|[^\w\s]+|\s+", "\0".join(learned).replace("\0", "_"))
    assert max(map(len, words)) == pieces.WORD


def test_corpus_too_small_for_the_vocabulary_is_noted(tmp_path, caplog):
    pytest.importorskip("tokenizers")
    assert load_tokenizer("train:1000", lambda: ["abab"], tmp_path).vocab_size < 1000
    assert "too small for 1000" in caplog.text


@pytest.mark.parametrize(
    ("vocabulary", "config", "expected"),
    [
        (["a", "</s>"], None, "</s>"),
        (["a", "<|endoftext|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}, "<|im_end|>"),
        (["a", "stop"], {"eos_token": {"content": "stop"}}, "stop"),
        (["a", "b"], {"eos_token": "absent"}, "<|endoftext|>"),
    ],
)
def test_end_of_document_of_a_published_tokenizer(tmp_path, vocabulary, config, expected):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="a"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path), None, tmp_path)
    assert tokenizer.end_name == expected
    ids = {word: i for i, word in enumerate(vocabulary)}
    assert tokenizer.end_of_document == ids.get(expected, len(vocabulary))
    assert tokenizer.vocab_size == max(len(vocabulary), tokenizer.end_of_document + 1)
    assert len(tokenizer.encode("a a a a a")) == 5, "a file's truncation and padding must not cut or fill documents"


def test_vocabulary_that_cannot_spell_the_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    with pytest.raises(UsageError, match="cannot encode this text"):
        load_tokenizer(str(tmp_path / "t.json"), None, tmp_path).encode("b")


@pytest.mark.parametrize("spec", ["train:", "train:256", "train:-300", "train:many", "train:٣٠٠", "train:3e4"])
def test_bad_vocabulary_size(spec, tmp_path):
    with pytest.raises(UsageError, match="VOCAB in train:VOCAB must be a whole number of at least 257"):
        load_tokenizer(spec, lambda: DOCUMENTS, tmp_path)


def test_bad_specs_say_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    cases = [
        ("train:300", None, "needs a corpus"),
        ("train:300", lambda: [], "no text to learn from"),
        (str(tmp_path / "absent.json"), None, "does not exist"),
        ("./absent", None, "does not exist"),
        ("", None, "does not exist"),
        (str(tmp_path / "broken.json"), None, "is not a tokenizer.json"),
        (str(tmp_path / "empty"), None, "holds no tokenizer.json"),
    ]
    for spec, documents, message in cases:
        with pytest.raises(UsageError, match=message):
            load_tokenizer(spec, documents, tmp_path)
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json"):
        load_tokenizer_from(tmp_path / "nowhere")


def test_hub_name_downloads_the_tokenizer_files_only(bpe, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    bpe.save(tmp_path)

    def download(name, allow_patterns):
        assert (name, sorted(allow_patterns)) == ("org/model", ["tokenizer.json", "tokenizer_config.json"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_tokenizer("org/model", None, tmp_path).fingerprint == bpe.fingerprint


def test_unreachable_hub_is_one_clear_sentence(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def download(name, allow_patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UsageError, match=r"'org/model' is neither .* the Hugging Face Hub did not give it: no route$"):
        load_tokenizer("org/model", None, tmp_path)


@pytest.mark.parametrize("spec", ["train:300", "org/model", "file"])
def test_missing_package_names_the_extra(spec, bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"needs the package tokenizers: pip install 'attnres\[train\]'"):
        load_tokenizer(str(tmp_path) if spec == "file" else spec, lambda: DOCUMENTS, tmp_path)


def test_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="cannot write"):
        ByteTokenizer().save(tmp_path / "file" / "run")


def sentence_piece_like(kind):
    """A byte-fallback BPE whose words begin with a mark, which the start of a text gets too."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.\n1", "th", "the", "\u2581the", "ca", "cat", "\u2581cat"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {p: 256 + i for i, p in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("c", "a"), ("ca", "t"), ("\u2581", "cat")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    if kind == "prepend":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(steps)
    elif kind != "byte level":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=kind)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return LibraryTokenizer(backend)


TEXT = "the cat. the the\n\n  cat th\ncat\ncat \u6f22\u5b57 the\ncat1\n" * 9


@pytest.mark.parametrize("kind", ["prepend", "first", "always"])
def test_only_the_start_of_a_document_is_marked(kind):
    tokenizer = sentence_piece_like(kind)
    whole = tokenizer.encode(TEXT).tolist()
    assert tokenizer.marks_starts
    assert tokenizer.decode(whole) == TEXT
    for cut in range(1, len(TEXT)):
        if TEXT[cut - 1] == "\n" or TEXT[cut] == " ":
            first, rest, other = tokenizer.encode_batch([TEXT[:cut], TEXT[cut:], TEXT], [False, True, False])
            assert [*first.tolist(), *rest.tolist()] == whole, cut
            assert other.tolist() == whole


def test_byte_level_tokenizers_that_begin_with_a_space(bpe):
    assert not bpe.marks_starts and not ByteTokenizer().marks_starts
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer.from_str(bpe.to_json())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = LibraryTokenizer(backend)
    text = "def add(left):\n"
    first, rest = tokenizer.encode_batch([text, text], [False, True])
    assert tokenizer.decode([*first, *rest]) == " " + text + text


def test_a_tokenizer_that_marks_every_text_whatever_stands_before_it_is_told_of(caplog):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "\u2581b": 1, "a": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer = LibraryTokenizer(backend)
    assert [ids.tolist() for ids in tokenizer.encode_batch(["b", "b"], [False, True])] == [[1], [1]]
    assert "marks the start of a text" in caplog.text
