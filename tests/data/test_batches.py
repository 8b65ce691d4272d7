"""Batches depend on nothing but the seed, the step and the tokens."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres.data import batches as batches_module
from attnres.data.corpus import Batches, load_corpus, validation_batches
from attnres.errors import UsageError

TOKENS = np.arange(1000, dtype=np.uint16)


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """A corpus whose tokens are mapped from the cache, as in a run."""
    folder = tmp_path_factory.mktemp("mapped")
    (folder / "numbers.txt").write_text("\n".join(map(str, range(20_000))))
    return load_corpus(str(folder / "numbers.txt"), cache_dir=folder)


def take(batches, count):
    return [torch.stack(pair) for pair in itertools.islice(batches, count)]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def starts(batches, steps):
    return torch.cat([batches[step][0][:, 0] for step in steps]).tolist()


def test_shapes_and_shift():
    inputs, targets = Batches(TOKENS, 3, 16, seed=0)[0]
    assert inputs.shape == targets.shape == (3, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.is_contiguous() and targets.is_contiguous()


@given(length=st.integers(9, 300), context=st.integers(1, 8), seed=st.integers(0, 2**63), epoch=st.integers(0, 50))
def test_an_epoch_visits_windows_that_do_not_overlap_once(length, context, seed, epoch):
    window = context + 1
    windows = max(1, (length - context) // window)
    batches = Batches(np.arange(length, dtype=np.uint32), 1, context, seed)
    found = sorted(starts(batches, range(epoch * windows, (epoch + 1) * windows)))
    assert found == [found[0] + i * window for i in range(windows)]
    assert found[0] >= 0 and found[-1] + window <= length
    assert length - windows * window <= 2 * context, "at most two contexts of tokens are left over"


@pytest.mark.parametrize("length", [9, 10, 17, 25, 26, 27, 100])
def test_every_token_is_seen_after_some_epochs(length):
    batches = Batches(np.arange(length, dtype=np.uint16), 16, 8, seed=1)
    seen = {
        token for step in range(30) for pair in [batches[step]] for side in pair for token in side.unique().tolist()
    }
    assert seen == set(range(length))


def test_epochs_differ_and_are_shuffled():
    windows = (1000 - 16) // 17
    batches = Batches(TOKENS, 1, 16, seed=3)
    epochs = [starts(batches, range(e * windows, (e + 1) * windows)) for e in range(3)]
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert len({min(epoch) for epoch in epochs}) > 1, "the offset is drawn anew"
    orders = {tuple(np.argsort(epoch)) for epoch in epochs}
    assert len(orders) == 3
    assert starts(Batches(TOKENS, 1, 16, seed=4), range(windows)) != epochs[0]


def test_stream_is_frozen():
    """The same on every machine and with every version of NumPy: a run resumes exactly after an upgrade."""
    first_epoch, second_epoch = (
        [538, 473, 798, 213, 148, 603, 18, 408, 733, 278, 343, 668, 83, 863],
        [579, 774, 449, 59, 189, 904],
    )
    assert starts(Batches(TOKENS, 4, 64, seed=2024), range(5)) == first_epoch + second_epoch


@settings(max_examples=30)
@given(st.integers(0, 200), st.integers(1, 7), st.integers(1, 40), st.integers(0, 2**40))
def test_resuming_at_any_step_is_exact(step, batch_size, context, seed):
    make = lambda start: iter(Batches(TOKENS, batch_size, context, seed, start_step=start))  # noqa: E731
    uninterrupted = take(make(0), step + 3)
    assert same(take(make(step), 3), uninterrupted[step:])


def test_iterating_again_begins_at_the_start_step():
    batches = Batches(TOKENS, 2, 16, seed=0, start_step=7)
    assert same(take(batches, 3), take(batches, 3))
    assert same(take(batches, 1), [torch.stack(batches[7])])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, mapped):
    options = {"seed": 5, "start_step": 11, "rank": 1, "world_size": 3}
    plain = take(Batches(mapped.train, 2, 64, **options), 7)
    assert same(take(Batches(mapped.train, 2, 64, num_workers=workers, **options), 7), plain)


@given(batch_size=st.integers(1, 5), world_size=st.integers(1, 6), step=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_ranks_share_out_the_global_batch(batch_size, world_size, step, seed):
    ranks = [Batches(TOKENS, batch_size, 16, seed, rank=r, world_size=world_size)[step] for r in range(world_size)]
    whole = Batches(TOKENS, batch_size * world_size, 16, seed)[step]
    for shared, expected in zip(zip(*ranks, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(shared), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_left_alone(workers):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    take(Batches(TOKENS, 2, 16, seed=0, num_workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_permutation_is_made_once_an_epoch():
    batches_module._shuffle.cache_clear()
    take(Batches(TOKENS, 4, 4, seed=0), 40)  # 160 of 199 windows
    assert batches_module._shuffle.cache_info().misses == 1


def test_mapped_tokens_travel_to_workers_by_name(mapped):
    for tokens in (mapped.train, mapped.validation):
        batches = Batches(tokens, 2, 32, seed=1)
        sent = pickle.dumps(batches)
        assert len(sent) < 5000
        assert same([torch.stack(pickle.loads(sent)[3])], [torch.stack(batches[3])])
    part = Batches(mapped.validation[1000:3000], 2, 32, seed=1)
    assert same([torch.stack(pickle.loads(pickle.dumps(part))[3])], [torch.stack(part[3])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"context": 0}, "context must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"start_step": -1}, "start_step must be at least 0"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size = 2"),
        ({"context": 1000}, r"1000 tokens .* fewer than context \+ 1 = 1001.*smaller context"),
    ],
)
def test_bad_batch_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        Batches(TOKENS, **{"batch_size": 2, "context": 16, "seed": 0, **options})


def test_corpus_of_exactly_one_window():
    for inputs, targets in itertools.islice(Batches(TOKENS, 3, 999, seed=0), 2):
        assert torch.equal(inputs, torch.arange(999).expand(3, -1)) and torch.equal(targets, inputs + 1)


# ---- validation batches --------------------------------------------------------------------------------------------


@given(length=st.integers(2, 300), context=st.integers(1, 20), batch_size=st.integers(1, 7))
def test_validation_predicts_every_token_once(length, context, batch_size):
    length = max(length, context + 1)
    tokens = np.arange(length, dtype=np.uint16)
    pairs = list(validation_batches(tokens, batch_size, context))
    targets = torch.cat([targets.flatten() for _, targets in pairs])
    assert targets.tolist() == list(range(1, (length - 1) // context * context + 1))
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in pairs)
    assert all(len(inputs) == batch_size for inputs, _ in pairs[:-1])


@given(st.integers(16, 1200), st.integers(1, 5))
def test_validation_is_bounded_spread_and_fixed(max_tokens, batch_size):
    first, second = (list(validation_batches(TOKENS, batch_size, 16, max_tokens)) for _ in range(2))
    assert same([torch.stack(pair) for pair in first], [torch.stack(pair) for pair in second])
    count = min(max_tokens // 16, 999 // 16)
    begin = torch.cat([inputs[:, 0] for inputs, _ in first])
    assert len(begin) == len(begin.unique()) == count
    if count > 1:
        gaps = begin.diff()
        assert int(gaps.max() - gaps.min()) <= 16, "windows are spread evenly"
        assert int(begin[-1]) + 16 + int(gaps.max()) >= 999 - 16


def test_validation_errors_come_at_the_call():
    with pytest.raises(UsageError, match="fewer than context"):
        validation_batches(TOKENS, 2, 1000)
    with pytest.raises(UsageError, match="max_tokens must be at least 16"):
        validation_batches(TOKENS, 2, 16, 15)
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        validation_batches(TOKENS, 0, 16)
