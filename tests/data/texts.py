"""Small corpora, and what they must become: bytes as tokens, split by the documented rule."""

import hashlib

END = 256
FILES = {f"part{i % 3}/file{i:02}.txt": f"file {i}: {'é漢🎉'[i % 3]}\n" * (i + 1) for i in range(40)}
RECORDS = [f"record {i}\nof {'many ' * (i % 5)}" for i in range(60)]


def make_folder(root, files=FILES):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def held_out(key, fraction):
    """The documented rule, written a second time: the first 64 bits of SHA-256 as a number in [0, 1)."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 2**64 < fraction


def expected_split(documents, fraction):
    sides = ([], [])
    for key, text in documents:
        sides[held_out(key, fraction)].extend([*text.encode(), END])
    return sides


def tokens_of(corpus):
    return corpus.train.tolist(), corpus.validation.tolist()
