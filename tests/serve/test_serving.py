"""The protocol of the server, spoken to in this process: what clients send, what is refused, what comes back."""

import asyncio
import copy
import json
import logging

import pytest
import torch

pytest.importorskip("transformers")
from transformers import ContinuousBatchingConfig

import attnres.hf
from attnres.errors import UsageError
from attnres.serve.answer import Answers, Text
from attnres.serve.app import App, Hosts
from attnres.serve.engine import Batched, OneByOne
from attnres.serve.request import CHAT, COMPLETIONS, Reader, Sampling

from ..hf.converted import VOCAB, build, move_queries
from ..hf.letters import letter_tokenizer

CONTEXT, LIMIT = 64, 50
GREEDY = Sampling(0.0, 1.0, None)
ROOM = {"num_blocks": 8, "max_batch_tokens": 32}
TEMPLATE = "{% for m in messages %}{{ m['content'] + (mark or '') }}{% endfor %}"


class Served:
    """A model behind the application, without a network."""

    def __init__(self, engine, context=CONTEXT):
        self.engine, self.tokenizer = engine, letter_tokenizer(TEMPLATE)
        reader = Reader(
            "small",
            self.tokenizer,
            engine.model.config.vocab_size,
            max_tokens=LIMIT if context == CONTEXT else context,
            context=context,
            sampling=GREEDY,
            seeded=isinstance(engine, OneByOne),
        )
        self.app = App(reader, Answers("small", self.tokenizer, engine), Hosts("127.0.0.1"))
        self.model = copy.deepcopy(engine.model)
        """Another, since some versions of transformers cannot call one that a batch uses."""
        self.model.set_attn_implementation(engine.model.config._attn_implementation.removeprefix("paged|"))

    async def request(self, path, body=b"", method="POST", host="localhost:8000"):
        """(status, JSON, or the list of what a stream's events say)."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        incoming, sent = [{"type": "http.request", "body": body}], []

        async def receive():
            return incoming.pop() if incoming else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "method": method, "headers": [(b"host", host.encode())]}
        await self.app(scope, receive, send)
        data = b"".join(message.get("body", b"") for message in sent)
        if not data.startswith(b"data: "):
            return sent[0]["status"], json.loads(data)
        events = data.decode().removesuffix("\n\n").split("\n\n")
        assert events.pop() == "data: [DONE]"
        return sent[0]["status"], [json.loads(event.removeprefix("data: ")) for event in events]

    def ask(self, body, path=COMPLETIONS, **more):
        return asyncio.run(self.request(path, body, **more))

    def text(self, **body):
        status, answer = self.ask({"prompt": "the block", "max_tokens": 6, **body})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def greedy(self, prompt="the block", tokens=6):
        """What the model itself makes of a prompt."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(tokens):
            with torch.no_grad():
                logits = self.model(input_ids=ids, use_cache=False).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        return self.tokenizer.decode(ids[0, -tokens:])


def converted(**changes):
    torch.manual_seed(0)
    model = move_queries(attnres.hf.convert(build("llama", torch.float32, **changes), num_blocks=3))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=["one by one", "batched"])
def served(request):
    model = converted(max_position_embeddings=CONTEXT)
    engine = OneByOne(model) if request.param == "one by one" else Batched(model, ContinuousBatchingConfig(**ROOM))
    yield Served(engine)
    engine.close()


DEFAULTS = [
    {"temperature": 0, "top_p": 0.5},
    {"temperature": 0, "seed": 1234, "stop": None, "n": 1, "best_of": 1},
    {"stop": []},
    {"stop": ["@"], "frequency_penalty": 0, "presence_penalty": 0.0},
    {"max_tokens": None, "max_completion_tokens": 6},
    {"response_format": {"type": "text"}, "user": "me", "logit_bias": {}, "suffix": None, "echo": False},
    {"stream": False, "stream_options": None, "logprobs": None, "model": "small"},
    {"temperature": 1e-9},
    {"temperature": 1, "top_p": 1e-9},
]


@pytest.mark.parametrize("fields", DEFAULTS, ids=str)
def test_what_clients_send_by_default_changes_nothing(served, fields):
    assert served.text(**fields) == served.greedy()


def test_chat_takes_the_defaults_of_its_clients(served):
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "the block"}], "name": "me"}],
        "max_completion_tokens": 6,
        "response_format": {"type": "text"},
        "logprobs": False,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
    }
    status, answer = served.ask(body, CHAT)
    assert status == 200 and answer["choices"][0]["message"] == {"role": "assistant", "content": served.greedy()}
    assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == len("the block")
    status, events = served.ask({**body, "stream": True, "chat_template_kwargs": {"mark": "."}}, CHAT)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == served.greedy("the block.")
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert events[-1]["choices"][0]["finish_reason"] == "length"


REFUSED = [
    ({"suffix": "end"}, "suffix is not served"),
    ({"suffix": 3}, "suffix is not served"),
    ({"logit_bias": {"5": 100}}, "logit_bias is not served"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not served"),
    ({"best_of": 2}, "best_of is not served"),
    ({"response_format": {"type": "json_object"}}, "response_format is not served"),
    ({"top_k": 5}, "'top_k' is no field"),
    ({"messages": []}, "'messages' is no field"),
    ({"prompt": []}, "prompt must be"),
    ({"prompt": ["a", ""]}, "prompt must be"),
    ({"prompt": [["a"]]}, "prompt must be"),
    ({"prompt": "é"}, "prompt must have a token"),
    ({"prompt": "a\ud800"}, "the request must be text"),
    ({"prompt": [3, VOCAB]}, f"prompt must have ids from 0 to {VOCAB - 1}"),
    ({"prompt": [-1]}, "prompt must have ids"),
    ({"prompt": [True]}, "prompt must be"),
    ({"prompt": "a" * CONTEXT}, f"the prompt has {CONTEXT} tokens"),
    ({"prompt": ["a"] * 43, "n": 3}, "prompts times n must be at most 128"),
    ({"n": 0}, "n must be a whole number"),
    ({"stop": ""}, "stop must be"),
    ({"stop": ["a"] * 65}, "stop must be"),
    ({"seed": 2**64}, "seed must be"),
    ({"seed": 1.5}, "seed must be"),
    ({"temperature": 10**400}, "temperature must be a number"),
    ({"temperature": 101}, "temperature must be from 0"),
    ({"temperature": float("nan")}, "the request must be a JSON object"),
    ({"top_p": 1.5}, "top_p must"),
    ({"max_tokens": True}, "max_tokens must be a whole number"),
    ({"logprobs": True}, "logprobs must be a whole number"),
    ({"logprobs": 1, "stream": True}, "echo and logprobs are not streamed"),
    ({"stream": "yes"}, "stream must be true or false"),
    ({"stream_options": 3}, "stream_options must be"),
    ({"model": "another"}, "model must be 'small'"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[str(fields)[:30] for fields, _ in REFUSED])
def test_what_would_be_ignored_or_cannot_be_is_refused(served, fields, sentence):
    status, answer = served.ask({"prompt": "a", "max_tokens": 3, **fields})
    assert status == 400 and answer["error"]["message"].startswith(sentence)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', b"\xff", b"[" * 100_000, b"1" * 5000], ids=len)
def test_a_body_that_is_no_json_object(served, body):
    status, answer = served.ask(body)
    assert status == 400 and answer["error"]["message"].startswith("the request must be a JSON object")


def test_a_template_that_renders_to_nothing_harms_no_other_request(served):
    for content in ("", [], "é"):
        status, answer = served.ask({"messages": [{"role": "user", "content": content}]}, CHAT)
        assert status == 400 and "makes an empty prompt" in answer["error"]["message"]
    assert served.text() == served.greedy()


@pytest.mark.parametrize("variables", [{"chat_template": "a"}, {"tokenize": False}, 3], ids=str)
def test_template_variables_are_not_options_of_the_tokenizer(served, variables):
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": variables}
    status, answer = served.ask(body, CHAT)
    assert status == 400 and answer["error"]["message"].startswith("chat_template_kwargs must be")


def test_messages_that_are_none(served):
    user = {"role": "user", "content": "a"}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    for messages in ({}, [user, 3], [{"content": "a"}], [{"role": "user", "content": 3}], [image], [call]):
        status, answer = served.ask({"messages": messages}, CHAT)
        assert status == 400 and answer["error"]["message"].startswith("messages must be")


def test_several_prompts_and_answers(served):
    ids = served.tokenizer("depth")["input_ids"]
    for prompts in (["a", "depth"], [served.tokenizer("a")["input_ids"], ids]):
        _, answer = served.ask({"prompt": prompts, "n": 2, "max_tokens": 4})
        want = [served.greedy("a", 4)] * 2 + [served.greedy("depth", 4)] * 2
        assert [choice["text"] for choice in answer["choices"]] == want
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 16, "total_tokens": 22}
    assert served.text(prompt=ids) == served.greedy("depth")
    _, events = served.ask({"prompt": ["a", "depth"], "max_tokens": 4, "stream": True})
    texts = ["", ""]
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [served.greedy("a", 4), served.greedy("depth", 4)]


def test_more_tokens_than_there_is_room_for_are_cut(served):
    long = "t" * 40
    for prompt, asked, given in (("the", 10**30, LIMIT), (long, 1000, CONTEXT - 40), (long, None, CONTEXT - 40)):
        _, answer = served.ask({"prompt": prompt, "max_tokens": asked})
        assert answer["usage"]["completion_tokens"] == given
        assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_ends_the_text_in_front_of_it(served):
    whole = served.greedy(tokens=30)
    stop = whole[10:13]
    at = whole.index(stop)
    body = {"prompt": "the block", "max_tokens": 30, "stop": ["@@", stop]}
    _, answer = served.ask(body)
    assert answer["choices"][0]["text"] == whole[:at] and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == at + len(stop)
    _, events = served.ask({**body, "stream": True, "stream_options": {"include_usage": True}})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole[:at]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["choices"] == [] and events[-1]["usage"] == answer["usage"]


def test_a_token_that_ends_the_text(served):
    before, engine = served.greedy(tokens=4), served.engine
    ends, engine.ends = engine.ends, frozenset(served.tokenizer(before[3])["input_ids"])
    engine.model.generation_config.eos_token_id = list(engine.ends)
    try:
        _, answer = served.ask({"prompt": "the block", "max_tokens": 10})
    finally:
        engine.ends, engine.model.generation_config.eos_token_id = ends, None
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["text"] == before
    assert answer["usage"]["completion_tokens"] == 4


def test_requests_with_different_sampling_run_beside_each_other(served):
    async def all_at_once():
        hot = {"prompt": "the block", "max_tokens": 20, "temperature": 5.0}
        requests = [served.request(COMPLETIONS, {**hot, "n": 3}) for _ in range(3)]
        requests += [served.request(COMPLETIONS, {**hot, "temperature": 0}) for _ in range(3)]
        return [answer["choices"] for _, answer in await asyncio.gather(*requests)]

    answers = asyncio.run(all_at_once())
    hot = [choice["text"] for choices in answers[:3] for choice in choices]
    assert len(set(hot)) == 9
    assert [choices[0]["text"] for choices in answers[3:]] == [served.greedy(tokens=20)] * 3


@pytest.mark.parametrize("served", ["batched"], indirect=True)
def test_draws_of_a_batch_follow_the_distribution(served):
    """One token, 128 answers at once, five times: the counts of its tokens against what the model says."""
    ids = served.tokenizer("the block", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = (served.model(input_ids=ids).logits[0, -1] / 0.7).softmax(-1)
    count = torch.zeros(VOCAB)
    for _ in range(5):
        _, answer = served.ask({"prompt": "the block", "max_tokens": 1, "temperature": 0.7, "n": 128})
        for choice in answer["choices"]:
            count[served.tokenizer(choice["text"])["input_ids"]] += 1
    # half the summed difference of 640 draws is 0.09 +- 0.012; for temperature 1 or top_p 0.8 it is 0.2
    assert (count / count.sum() - want).abs().sum() / 2 < 0.17


def test_a_seed_makes_draws_repeatable():
    engine = OneByOne(converted(max_position_embeddings=CONTEXT))
    served = Served(engine)

    def draw(**fields):
        return served.text(temperature=5.0, max_tokens=20, **fields)

    first = draw(seed=3)
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    assert draw(seed=3) == first and draw(seed=4) != first and draw(seed=-1) != first
    assert torch.rand(1) == want  # others' draws are not touched
    _, answer = served.ask({"prompt": "the block", "temperature": 5.0, "max_tokens": 20, "seed": 3, "n": 2})
    assert answer["choices"][0]["text"] == first != answer["choices"][1]["text"]
    engine.close()


@pytest.mark.parametrize("served", ["batched"], indirect=True)
def test_a_seed_is_refused_where_requests_draw_from_one_generator(served):
    status, answer = served.ask({"prompt": "a", "temperature": 1, "seed": 3})
    assert status == 400 and answer["error"]["message"].startswith("seed must be left out")


def test_log_probabilities_as_evaluation_harnesses_ask_for_them(served):
    """A continuation is scored from an echoed prompt; the one further token is generated and not looked at."""
    ids = [served.tokenizer(text)["input_ids"] for text in ("the block", "depth" + served.greedy("depth", 3))]
    body = {"prompt": ids, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    _, answer = served.ask({**body, "model": "small"})
    for choice, row, known in zip(answer["choices"], ids, (4, 5), strict=True):
        with torch.no_grad():
            scores = served.model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        want = [scores[i, token].item() for i, token in enumerate(row[1:])]
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:-1]), torch.tensor(want), rtol=0, atol=1e-5)
        greedy = [
            own == max(top.values())
            for own, top in zip(found["token_logprobs"][known:-1], found["top_logprobs"][known:-1], strict=True)
        ]
        best = scores[known - 1 : -1].argmax(-1).tolist()
        assert greedy == [token == likeliest for token, likeliest in zip(row[known:], best, strict=True)]
        assert "".join(found["tokens"]) == choice["text"] == served.tokenizer.decode(row) + choice["text"][-1]
        assert found["text_offset"] == list(range(len(row) + 1))
    assert all(greedy)  # the second prompt ends with the model's own words


def test_log_probabilities_of_an_answer(served):
    _, answer = served.ask({"prompt": "the block", "max_tokens": 5, "logprobs": 3, "stop": served.greedy(tokens=5)[3]})
    found = answer["choices"][0]["logprobs"]
    ids = served.tokenizer("the block" + answer["choices"][0]["text"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = served.model(input_ids=ids).logits[0].log_softmax(-1)
    want = [scores[i - 1, ids[0, i]].item() for i in range(len("the block"), ids.shape[1])]
    torch.testing.assert_close(torch.tensor(found["token_logprobs"]), torch.tensor(want), rtol=0, atol=1e-5)
    assert found["tokens"] == list(answer["choices"][0]["text"]) and all(len(top) == 3 for top in found["top_logprobs"])
    _, answer = served.ask({"prompt": "the", "max_tokens": 0, "echo": True, "logprobs": 0})
    assert answer["choices"][0]["text"] == "the" and len(answer["choices"][0]["logprobs"]["tokens"]) == 3
    status, answer = served.ask({"prompt": "t" * CONTEXT, "max_tokens": 1, "echo": True, "logprobs": 1})
    assert status == 400 and answer["error"]["message"].startswith("the prompt has")


def test_models_and_health(served):
    status, answer = served.ask(b"", "/v1/models", method="GET")
    assert status == 200 and [model["id"] for model in answer["data"]] == ["small"]
    assert served.ask(b"", "/v1/models/small", method="GET")[1]["id"] == "small"
    assert served.ask(b"", "/v1/models/other", method="GET")[0] == 404
    assert served.ask(b"", "/health", method="GET") == (200, {"status": "ok"})
    assert served.ask(b"", COMPLETIONS, method="GET")[0] == 405
    assert served.ask(b"", "/v1/models", method="OPTIONS")[0] == 405
    assert served.ask({}, "/v1/embeddings")[0] == 404
    assert served.ask(b" " * (5 << 20))[0] == 413


def test_a_request_that_fails_harms_no_other(served, monkeypatch, caplog):
    def fail(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.engine, "_logits", fail)
    with caplog.at_level(logging.ERROR):
        status, answer = served.ask({"prompt": "a", "max_tokens": 1, "logprobs": 1})
    assert status == 500 and answer["error"]["type"] == "server_error" and "secret" not in answer["error"]["message"]
    assert "secret" in caplog.text and served.text() == served.greedy()


def test_a_client_that_hangs_up_frees_the_engine(served):
    async def hang_up():
        left = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"prompt": "a", "n": 100}'}]

        async def receive():
            return left.pop()

        async def send(message):
            raise AssertionError(message)

        scope = {"type": "http", "path": COMPLETIONS, "method": "POST", "headers": [(b"host", b"localhost")]}
        await served.app(scope, receive, send)

    asyncio.run(hang_up())
    assert served.text() == served.greedy()


HOSTS = [
    ("127.0.0.1", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "localhost."], True),
    ("127.0.0.1", ["evil.example", "evil.example:8000", "192.168.0.7:8000", "", "localhost.evil.example"], False),
    ("192.168.0.7", ["192.168.0.7:8000", "localhost", "[::1]"], True),
    ("192.168.0.7", ["192.168.0.8", "evil.example"], False),
    ("box.local", ["box.local:8000", "BOX.local", "127.0.0.1"], True),
    ("0.0.0.0", ["192.168.0.7:8000", "[fe80::1]:8000", "localhost"], True),
    ("::", ["evil.example", "evil.example:80"], False),
]


@pytest.mark.parametrize(("host", "headers", "allowed"), HOSTS)
def test_names_that_are_not_the_servers_are_not_answered(host, headers, allowed):
    assert [Hosts(host).allow(header) for header in headers] == [allowed] * len(headers)


def test_another_host_is_told_so(served):
    status, answer = served.ask({"prompt": "a"}, host="evil.example")
    assert status == 403 and answer["error"]["message"].startswith("the Host header must")


def test_a_batch_that_has_no_room_for_a_request_refuses_it():
    """Given to transformers, it would end the batch for everybody."""
    engine = Batched(
        converted(max_position_embeddings=1024), ContinuousBatchingConfig(num_blocks=1, max_batch_tokens=64)
    )
    served = Served(engine, context=256)
    try:
        assert served.ask({"prompt": "a" * 256})[0] == 400
        _, answer = served.ask({"prompt": "a" * 200, "max_tokens": 500})
        assert answer["usage"]["completion_tokens"] == 56
        assert served.text() == served.greedy()
    finally:
        engine.close()


def test_a_batch_that_has_ended_says_so():
    engine = Batched(converted(max_position_embeddings=CONTEXT), ContinuousBatchingConfig(**ROOM))
    served = Served(engine)
    assert served.text() == served.greedy()
    engine.manager.stop(block=True, timeout=60)
    status, answer = served.ask({"prompt": "a"})
    assert status == 503 and "start the server anew" in answer["error"]["message"]
    assert served.ask(b"", "/health", method="GET")[0] == 503


def test_batching_of_eager_attention_scores_too():
    model = converted(max_position_embeddings=CONTEXT)
    model.set_attn_implementation("eager")
    want = Served(OneByOne(model)).ask({"prompt": "the block", "max_tokens": 3, "logprobs": 1})[1]["choices"]
    engine = Batched(model, ContinuousBatchingConfig(**ROOM))
    try:
        assert Served(engine).ask({"prompt": "the block", "max_tokens": 3, "logprobs": 1})[1]["choices"] == want
    finally:
        engine.close()


class Bytes:
    """A tokenizer with one token a byte."""

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve — 中文 🙂", "ends broken 🙂"])
@pytest.mark.parametrize("stop", [[], ["中"], ["never", "— x"], ["e", "plain"]])
def test_text_comes_in_whole_characters_and_stops_in_front_of_a_stop_string(text, stop):
    data = text.encode()[: -1 if "broken" in text else None]
    whole = data.decode(errors="replace")
    cut = min((whole.find(s) for s in stop if s in whole), default=len(whole))
    out, spelt = [], Text(Bytes(), stop)
    for token in data:
        out.append(spelt.push(token))
        if spelt.stopped:
            break
    assert all("\ufffd" not in piece for piece in out)
    out.append(spelt.finish())
    assert "".join(out) == whole[:cut] and spelt.stopped == (cut < len(whole)) and spelt.length == cut


def test_of_two_stop_strings_the_first_in_the_text_counts():
    spelt = Text(Bytes(), ["cd", "bcx"])
    assert "".join(spelt.push(token) for token in b"abcd") == "ab" and spelt.stopped


def test_an_internal_error_is_not_the_users(tmp_path, monkeypatch):
    from attnres.serve import serve, server

    def broken(*_, **__):
        raise AttributeError("a fault of ours")

    options = {"host": "127.0.0.1", "port": 8000, "max_tokens": 1, "max_connections": 1, "device": "cpu"}
    options |= {"continuous_batching": False, "cache_tokens": None, "dtype": "auto"}
    monkeypatch.setattr(server, "open_model", broken)
    with pytest.raises(AttributeError, match="a fault of ours"):
        serve(tmp_path, **options)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="has no config"):
        serve(tmp_path, **options)
