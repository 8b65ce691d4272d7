"""Sequences packed into rows, for every kind of attention that a native model has: each way in which their borders can
arrive is heeded by all layers, or refused. The right values are those of every sequence alone."""

import pytest
import torch
from torch.nn import functional as F

from attnres.errors import UsageError
from attnres.hf import AttnResConfig, AttnResForCausalLM
from attnres.model.layer import names

SEQUENCES = (5, 3, 1)
TOKENS = sum(SEQUENCES)
SHAPE = dict(
    vocab_size=41,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    linear_chunk_size=4,
    sliding_window=3,
    initializer_range=0.3,
    tie_word_embeddings=False,
    residual_options={"num_blocks": 2},
)
IDS = torch.randint(0, 41, (1, TOKENS), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(0, 41, (1, TOKENS), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(n) for n in SEQUENCES])[None]
ABSOLUTE = torch.arange(TOKENS)[None]
BORDERS = torch.tensor([0, 5, 8, 9], dtype=torch.int32)
FLASH = {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS, "max_length_q": 5, "max_length_k": 5}
ONES = torch.ones_like(IDS)
SAME = torch.block_diag(*(torch.ones(n, n) for n in SEQUENCES)).tril().double().log()[None, None]  # 0 and -inf
PATTERNS = [*((kind,) for kind in names()), ("kda", "mla", "gqa")]
PATHS = {
    "positions": {"position_ids": POSITIONS, "use_cache": False},
    "positions, and a cache by default": {"position_ids": POSITIONS},
    "positions, and a mask of ones": {"position_ids": POSITIONS, "attention_mask": ONES},
    "positions and borders": {"position_ids": POSITIONS, **FLASH},
    "borders": FLASH,
    "borders alone": {"cu_seq_lens_q": BORDERS},
    "borders with positions that go on": {"position_ids": ABSOLUTE, **FLASH},
    "a mask of blocks with positions": {"position_ids": POSITIONS, "attention_mask": SAME, "use_cache": False},
}

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)


def make(pattern, implementation="sdpa"):
    torch.manual_seed(0)
    model = AttnResForCausalLM(AttnResConfig(**SHAPE, attention_pattern=pattern)).double()
    for parameter in model.model.residual.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation(implementation)
    return model


def alone(model, ids=IDS):
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(SEQUENCES, 1)], 1)


def assert_same(found, want):
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)  # rotary factors are fp32


@every_pattern
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("path", PATHS)
def test_packed_sequences_do_not_see_each_other(pattern, implementation, path):
    model = make(pattern, implementation)
    output = model(IDS, **PATHS[path])
    assert_same(output.logits, alone(model))
    assert output.past_key_values is None


@every_pattern
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_sequences_alone(pattern, checkpointing):
    model = make(pattern)
    parameters = list(model.parameters())
    want = torch.autograd.grad(F.cross_entropy(alone(model)[0], IDS[0]), parameters)
    if checkpointing:
        model.gradient_checkpointing_enable()
    logits = model(IDS, position_ids=POSITIONS).logits
    found = torch.autograd.grad(F.cross_entropy(logits[0], IDS[0]), parameters)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@every_pattern
def test_rows_may_be_packed_in_different_ways(pattern):
    model = make(pattern)
    whole = torch.arange(TOKENS)[None]
    logits = model(torch.cat([IDS, OTHER]), position_ids=torch.cat([POSITIONS, whole])).logits
    assert_same(logits, torch.cat([alone(model), model(OTHER, use_cache=False).logits]))
    logits = model(torch.cat([IDS, OTHER]), position_ids=POSITIONS).logits  # one row of positions for both
    assert_same(logits, torch.cat([alone(model), alone(model, OTHER)]))


@every_pattern
@torch.no_grad()
def test_positions_of_padding_begin_nothing(pattern):
    model = make(pattern)
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    want = model(IDS[:, 3:], use_cache=False).logits
    for padding in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, padding)
        for use_cache in (False, "full_attention" in model.config.layer_types):
            output = model(IDS, attention_mask=mask, position_ids=positions, use_cache=use_cache)
            assert_same(output.logits[:, 3:], want)
            assert (output.past_key_values is not None) == use_cache


@pytest.mark.parametrize("pattern", [("gqa",), ("mla",)], ids="-".join)
def test_a_compiler_keeps_them_apart_too(pattern):
    model = make(pattern)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(IDS, position_ids=POSITIONS, use_cache=False).logits, alone(model))
        with pytest.raises(RuntimeError, match="use_cache=False"):
            compiled(IDS, position_ids=POSITIONS, use_cache=True)


REFUSED = {
    "a cache": ({"position_ids": POSITIONS, "use_cache": True}, "a cache has one sequence a row"),
    "padding": (
        {"position_ids": POSITIONS, "attention_mask": torch.tensor([[0] + 8 * [1]])},
        "attention_mask must be left out",
    ),
    "borders of another length": ({"cu_seq_lens_q": torch.tensor([0, 5])}, "number of tokens of a single row, 9"),
    "borders that disagree": (
        {"position_ids": POSITIONS, "cu_seq_lens_q": torch.tensor([0, 5, 9])},
        "position_ids start anew where cu_seq_lens_q has no border",
    ),
}


@every_pattern
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_mix_them_is_refused(pattern, case):
    arguments, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        make(pattern)(IDS, **arguments)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "kda" in p], ids="-".join)
@pytest.mark.parametrize("positions", [ABSOLUTE + 4, POSITIONS + 1, torch.full((1, 1), 17)], ids=["row", "all", "step"])
def test_linear_attention_without_a_state_begins_at_zero(pattern, positions):
    with pytest.raises(UsageError, match="position_ids must start at 0 with every sequence"):
        make(pattern)(IDS[:, : positions.shape[1]], position_ids=positions, use_cache=False)


def test_flash_attention_takes_one_packed_row():
    model = make(("gqa",))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="takes packed sequences in a single row, and there are 2"):
        model(torch.cat([IDS, IDS]), position_ids=POSITIONS)
