"""What `attnres inspect` measures, against passes written out by hand in fp64; its refusals; its page as text."""

import json
import re

import pytest
import torch
from torch.nn import functional as F

from attnres.analysis.draw.inspect_page import numbers, page
from attnres.analysis.measure import inspect as leaving_out
from attnres.analysis.measure import leave_out
from attnres.analysis.measure.inspect import PARTIAL, inspect
from attnres.analysis.measure.mixing import mixing_matrix
from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import UsageError
from attnres.model import Decoder, DecoderConfig

EVIL = "</script><script>alert(1)</script><!-- \U0001f642 é\n\t"
SHAPE = dict(vocab_size=257, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
HYBRID = dict(attention_pattern=("kda", "mla", "gqa"), linear_chunk_size=4, num_experts=4, num_experts_per_tok=2,
              first_k_dense_replace=1, moe_intermediate_size=16)  # fmt: skip
VARIANTS = [
    ("full_attnres", {}),
    ("block_attnres", {"block_size": 4}),
    ("full_attnres", {"heads": 2}),
    ("full_attnres", {"mixing": "sigmoid"}),
    ("block_attnres", {"block_size": 3, "null_source": True}),
    ("block_attnres", {"block_size": 2, "reads": "transformer_block"}),
    ("block_attnres", {"block_size": 4, "reads": "mlp"}),
]


def decoder(name, shape=SHAPE, **options):
    model = Decoder(DecoderConfig(**shape, residual=name, residual_options=options), seed=2).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.residual.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(1))


def by_hand(model, tokens, cut=lambda layer, i, n: False):
    """(losses, weights of every read) where the sources i of n with cut(layer, i, n) are left out."""
    residual, ids = model.residual, tokens[None]
    context = model.context(ids.shape[1], ids.device)
    state, seen, outputs = residual.start(model.embed_tokens(ids)), [], []
    h = model.embed_tokens(ids)
    for layer in range(7):
        if not residual.reads_depth(layer):
            seen.append(torch.zeros(0, len(tokens)))
            stream = h if residual.reads != "mlp" else model.embed_tokens(ids) + sum(outputs[:-1])
            h = stream + outputs[-1] if outputs else stream
            outputs.append(model.layers[layer](model.layers[layer].norm(h), context))
            state = residual.write(residual.read(state, layer)[1], layer, outputs[-1])
            continue
        sources, weights = residual.sources(state, layer), residual.depth_weights(state, layer)
        seen.append(weights[:, 0])
        gone = [i for i in range(len(sources)) if len(sources) > 1 and cut(layer, i, len(sources))]
        rest = [i for i in range(len(sources)) if i not in gone]
        kept = weights[rest] / weights[rest].sum(0) * weights.sum(0)
        heads = weights.shape[3] if weights.dim() == 4 else 1
        pieces = torch.stack([sources[i].unflatten(-1, (heads, -1)) for i in rest])
        kept = kept.view(*kept.shape[:3], heads, 1)
        h = (kept * pieces).sum(0).flatten(-2) * residual.scale(len(sources))
        if layer < 6:
            outputs.append(model.layers[layer](model.layers[layer].norm(h), context))
            state = residual.write(residual.read(state, layer)[1], layer, outputs[-1])
    logits = model.lm_head(model.norm(h))[0]
    return F.cross_entropy(logits[:-1], tokens[1:], reduction="none"), seen


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_weights_and_ablations_are_what_the_formulas_say(name, options, tokens):
    model = decoder(name, **options)
    with torch.no_grad():
        found = inspect(model, tokens)
        loss, weights = by_hand(model, tokens)
        assert torch.allclose(found.loss, loss, atol=1e-9)
        for read, expected in zip(found.reads, weights, strict=True):
            expected = expected.mean(-1) if expected.dim() > 2 else expected
            assert torch.allclose(read.weights, expected.float(), atol=1e-6)
        column = [read.sources for read in found.reads]
        for source, change in zip(found.sources, found.source_change, strict=True):
            without, _ = by_hand(model, tokens, lambda layer, i, n, source=source: column[layer][i] == source)
            assert torch.allclose(change, without - loss, atol=1e-8), source
        for layer in (1, 4, 6):
            if len(column[layer]) > 1:
                for s in range(len(column[layer])):
                    without, _ = by_hand(model, tokens, lambda at, i, n, here=(layer, s): (at, i) == here)
                    assert found.read_change[layer][s] == pytest.approx((without - loss).mean().item(), abs=1e-8)
        assert found.source_change.abs().max() > 1e-3
    assert "read" not in vars(model.residual) and not model.residual.lean


def other_model(kind):
    if kind == "hybrid":
        return decoder("block_attnres", SHAPE | HYBRID, block_size=3)
    pytest.importorskip("transformers")
    import attnres.hf

    if kind.startswith("native"):
        shape = SHAPE | (HYBRID if kind == "native hybrid" else {})
        return attnres.hf.AttnResForCausalLM.from_decoder(decoder("full_attnres", shape)).eval()
    from ..hf.converted import build, move_queries

    return move_queries(attnres.hf.convert(build(kind), num_blocks=3))


@pytest.mark.parametrize("kind", ["hybrid", "native", "native hybrid", "llama", "gpt_neox_parallel"])
def test_starting_in_front_of_a_read_gives_what_the_whole_model_gives(kind, tokens, monkeypatch):
    model, real = other_model(kind), leave_out.losses_without
    tokens = tokens % model.config.vocab_size
    found, calls = leaving_out.inspect(model, tokens), []

    def from_the_start(model, residual, tokens, present, states, cuts, *rest):
        calls.extend(cut.first for cut in cuts)
        return real(model, residual, tokens, present, states, [cut._replace(first=0) for cut in cuts], *rest)

    monkeypatch.setattr(leaving_out, "losses_without", from_the_start)
    whole = leaving_out.inspect(model, tokens)
    assert max(calls) > 2
    assert (
        torch.allclose(found.source_change, whole.source_change, atol=1e-9) and found.source_change.abs().max() > 1e-4
    )
    for some, expected in zip(found.read_change, whole.read_change, strict=True):
        assert some == pytest.approx(expected, abs=1e-9)


def test_the_share_of_the_work_grows_to_one(tokens):
    told = []
    inspect(decoder("full_attnres"), tokens, progress=lambda *said: told.append(said))
    shares = [share for *_, share in told]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert told[-1][1] == told[-1][2] and told[0][3] > told[0][1] / told[0][2]  # early layers take the longest


def test_sources_are_named_as_the_paper_numbers_them(tokens):
    full, block = (inspect(decoder(*variant[:1], **variant[1]), tokens, per_read=False) for variant in VARIANTS[:2])
    assert [read.sources for read in full.reads] == [list(range(n + 1)) for n in range(7)]
    assert [read.sources for read in block.reads] == [[0], *[[0, PARTIAL]] * 3, [0, 1], [0, 1, PARTIAL], [0, 1, 2]]
    assert full.read_change is None


@pytest.mark.parametrize(("name", "options"), VARIANTS[:2] + VARIANTS[-2:])
def test_a_converted_model_is_seen_like_a_native_one(name, options, tokens):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    import attnres.hf

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                         num_attention_heads=2)).double()  # fmt: skip
    model = attnres.hf.convert(model, name, **options)
    equal = inspect(model, tokens)
    for read in equal.reads:
        assert torch.allclose(read.weights, torch.full_like(read.weights, 1 / max(1, len(read.sources))))
    standard = torch.ones(7, 7).tril().double()
    assert torch.allclose(equal.mixing, standard)  # the conversion is the plain sum
    values = numbers(equal, model, tokens.tolist(), ByteTokenizer(), residual=name, name="x", command="")
    assert [read["kind"] for read in values["reads"]] == [*["attention", "MLP"] * 3, "output"]
    assert page(values).count("<main") == 1
    torch.nn.init.normal_(model.model.residual.pseudo_query)
    moved = inspect(model, tokens)
    assert moved.source_change.abs().max() > 1e-6 and not torch.allclose(moved.mixing, standard)


def test_a_native_hugging_face_model_gives_the_same_numbers(tokens):
    pytest.importorskip("transformers")
    import attnres.hf

    model = decoder("block_attnres", block_size=4)
    ours, theirs = inspect(model, tokens), inspect(attnres.hf.AttnResForCausalLM.from_decoder(model), tokens)
    assert torch.allclose(ours.source_change, theirs.source_change, atol=1e-8)
    assert torch.allclose(theirs.mixing, mixing_matrix(model, tokens[None]), atol=1e-8)


def test_what_there_was_no_time_for_is_not_measured(tokens, monkeypatch):
    model, clock, first = decoder("full_attnres"), iter([0.0, *[1.0] * 3, *[61.0] * 99]), []
    monkeypatch.setattr(leave_out, "TOKENS_AT_ONCE", 3 * len(tokens))  # three cuts a pass
    monkeypatch.setattr(leave_out.time, "monotonic", lambda: next(clock))
    whole = inspect(model, tokens)
    clock = iter([0.0, *[1.0] * 3, *[61.0] * 99])
    some = inspect(model, tokens, minutes=1, listened=first.append)
    assert whole.measured == (7, 7, 27, 27) and first[0].measured == (0, 7, 0, 27)
    assert 3 <= some.measured[0] <= 7 and some.measured[1:] == (7, 0, 27), "sources come before single reads"
    for now, then in zip(some.source_change, whole.source_change, strict=True):
        assert now.isnan().all() or torch.equal(now, then)
    assert torch.equal(first[0].loss, whole.loss) and torch.equal(first[0].mixing, whole.mixing)
    ids = tokens.tolist()
    for found, minutes in ((first[0], None), (some, 1.0), (whole, 5.0)):
        values = numbers(found, model, ids, ByteTokenizer(), residual="x", name="x", command="", minutes=minutes)
        assert (values["measured"], values["minutes"]) == (list(found.measured), minutes)
        measured = [row["mean_change"] is not None for row in values["ablation"]]
        assert measured == [not change.isnan().any() for change in found.source_change]
        assert page(values)


def test_the_page_is_there_before_sources_are_left_out(server, finished_run, tmp_path):
    out = tmp_path / "page.html"
    stop = (
        "import attnres.analysis.measure.inspect as i\ndef end(*_): raise KeyboardInterrupt\ni.losses_without = end\n"
    )
    end = server.start("inspect", finished_run, "--text", "attends", "--out", out, "--device", "cpu", patch=stop).wait()
    assert end.status != 0 and "where each layer listens; now leaving out sources" in end.err
    values = json.loads(out.with_suffix(".json").read_text())
    assert values["measured"][0] == 0 < values["measured"][1] and values["minutes"] is None and out.exists()


def test_models_without_depth_attention_and_too_few_tokens_are_refused(tokens):
    with pytest.raises(UsageError, match="no depth attention"):
        inspect(Decoder(DecoderConfig(**SHAPE, residual="prenorm")), tokens)
    with pytest.raises(UsageError, match="at least two"):
        inspect(decoder("full_attnres"), tokens[:1])


def test_text_cannot_break_the_page():
    model = decoder("block_attnres", block_size=3)
    ids = ByteTokenizer().encode(EVIL).astype(int)
    found = inspect(model, torch.tensor(ids), per_read=False)
    values = numbers(found, model, ids.tolist(), ByteTokenizer(), residual="block_attnres", name=EVIL, command=EVIL)
    values["tokens"][0] = EVIL
    html = page(values)
    assert html.count("<script") == html.count("</script>") == 2 and "<script>alert" not in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["tokens"][0] == data["command"] == EVIL and data["tokens"][-1] == "\t"
    assert "\\xf0" in data["tokens"] and "default-src 'none'" in html
    assert not re.search(r"https?://", html)


def test_the_command_writes_a_page_and_its_numbers(server, finished_run, tmp_path):
    out = tmp_path / "new" / "page.html"
    end = server.run("inspect", finished_run, "--text", "attends over depth", "--out", out, "--device", "cpu")
    assert end.status == 0, end.err
    assert "leaving out sources" in end.err and "page.json" in end.out
    values = json.loads(out.with_suffix(".json").read_text())
    assert "".join(values["tokens"][1:]) == "attends over depth" and len(values["reads"]) == values["layers"] + 1 == 5
    for read, weights in zip(values["reads"], values["weights"], strict=True):
        assert torch.tensor(weights).mean(1).tolist() == pytest.approx(read["mean"], abs=2e-5)


def test_bad_input_is_refused_in_one_sentence(server, finished_run, tiny, tmp_path):
    plain, empty, config = tmp_path / "plain", tmp_path / "empty.txt", {"model": {"residual": "prenorm"}}
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config))
    empty.write_text(" \n")
    (latin := tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    text = ["--text", "attends over depth"]
    for argv, said in (
        ([plain, *text], "has the residual prenorm, without depth attention"),
        ([tmp_path, *text], "is no model"),
        ([finished_run], "either --text TEXT or --data FILE"),
        ([finished_run, "--text", ""], "--text is empty"),
        ([finished_run, "--data", empty], "is empty"),
        ([finished_run, "--data", tmp_path / "none.txt"], "cannot be read: No such file"),
        ([finished_run, "--text", "attends " * 500], "at most 256 are read"),
        ([finished_run, *text, "--tokens", "1"], "--tokens must be at least 2"),
        ([finished_run, *text, "--minutes", "0"], "--minutes must be a positive number; it is 0.0"),
        ([finished_run, "--data", latin], "latin.txt is not UTF-8 (byte 0xe9)"),
        ([finished_run, *text, "--out", tmp_path], "--out must name an HTML file"),
        ([finished_run, *text, "--tokenizer", "none.json"], "does not exist"),
    ):
        end = server.run("inspect", *argv, "--device", "cpu")
        assert end.status == 2 and said in end.err and end.err.count("attnres inspect:") == 1, (argv, end.err)
