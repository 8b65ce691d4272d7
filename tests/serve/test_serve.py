"""`attnres serve` in real processes on the loopback address, spoken to by the public client."""

import contextlib
import functools
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from attnres.commands import serve as command
from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import UsageError

pytest.importorskip("transformers")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

CONTEXT = 64
ROUND = 200
CONNECTIONS = 24
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    """A server process, and the model that it has."""

    def __init__(self, folder, log, *flags):
        self.port = _free_port()
        self.name, self.log = folder.name, log
        argv = ["serve", folder, "--port", self.port, "--device", "cpu", *flags]
        self.temporary = log.with_suffix(".tmp")
        self.temporary.mkdir()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "attnres", *map(str, argv)],
                stdout=file,
                stderr=file,
                cwd=folder.parent,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )

    def wait_until_up(self):
        deadline = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.1)
        url = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        return self

    def complete(self, prompt, tokens=6, **more):
        return self.client.completions.create(model=self.name, prompt=prompt, max_tokens=tokens, **more)

    def post(self, path, data):
        """(status, body) of a request with a body that the client would not send."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "text/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def memory(self):
        """Resident bytes."""
        (line,) = [x for x in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "VmRSS" in x]
        return 1024 * int(line.split()[1])

    @functools.cache  # noqa: B019
    def want(self, prompt, tokens=6):
        """The text that greedy generation gives."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = self.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        return self.tokenizer.decode(out, skip_special_tokens=True)


@pytest.fixture(scope="module")
def servers(finished_run, tmp_path_factory):
    """A training run, and a converted model with continuous batching."""
    from transformers import AutoTokenizer

    import attnres.hf

    from ..hf.converted import build, move_queries
    from ..hf.letters import letter_tokenizer

    place = tmp_path_factory.mktemp("served")
    converted = attnres.hf.convert(build("llama", torch.float32, max_position_embeddings=CONTEXT), num_blocks=3)
    move_queries(converted).save_pretrained(place / "upgraded")
    letter_tokenizer(TEMPLATE).save_pretrained(place / "upgraded")
    batching = ("--continuous-batching", "--max-tokens", 40, "--max-connections", CONNECTIONS)
    both = {
        "run": Served(finished_run, place / "run.log"),
        "batching": Served(place / "upgraded", place / "batching.log", *batching),
    }
    both["run"].model = attnres.hf.AttnResForCausalLM.from_run(finished_run)
    both["run"].tokenizer = AutoTokenizer.from_pretrained(finished_run)
    both["batching"].model, both["batching"].tokenizer = converted, letter_tokenizer(TEMPLATE)
    try:
        for served in both.values():
            served.wait_until_up()
        yield both
    finally:
        for served in both.values():
            served.process.kill()
            served.process.wait()


@pytest.fixture(params=["run", "batching"])
def served(request, servers):
    return servers[request.param]


def test_the_client_gets_what_greedy_generation_gives(served):
    for prompt in ("the block", "a", "query attends"):
        answer = served.complete(prompt, temperature=0)
        assert answer.choices[0].text == served.want(prompt)
        assert answer.usage.prompt_tokens == len(served.tokenizer(prompt)["input_ids"])


def test_the_client_streams(servers):
    served = servers["batching"]
    chunks = list(served.complete("depth", tokens=20, stream=True))
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == served.want("depth", tokens=20) and sum(map(bool, texts)) > 2
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_chat_goes_through_the_models_template(servers):
    served = servers["batching"]
    message = {"role": "user", "content": "hi"}
    stream = served.client.chat.completions.create(
        model=served.name, messages=[message], max_completion_tokens=9, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == served.want("user:hi", tokens=9)


def test_a_request_without_max_tokens_ends_at_the_limit(servers):
    served = servers["batching"]
    prompt = next(p for p in "abcdefgh" if len(served.want(p, tokens=45)) > 40)  # one that meets no end of text
    answer = served.client.completions.create(model=served.name, prompt=prompt)
    assert answer.choices[0].text == served.want(prompt, tokens=40)


def test_temperature_draws(servers):
    served = servers["run"]
    texts = {served.complete("the", tokens=8, temperature=5.0).choices[0].text for _ in range(3)}
    assert len(texts) > 1


REFUSED = [
    ({"prompt": ""}, "prompt must be a text"),
    ({"prompt": "a" * 2000}, "the prompt has"),
    ({"max_tokens": 0}, "max_tokens must be a whole number"),
    ({"max_tokens": "many"}, "max_tokens must be a whole number"),
    ({"temperature": -1}, "temperature must be"),
    ({"temperature": "hot"}, "temperature must be"),
    ({"top_p": 0}, "top_p must"),
    ({"stop": 3}, "stop must be"),
    ({"generation_config": "{}"}, "'generation_config' is no field"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[str(fields)[:30] for fields, _ in REFUSED])
def test_bad_requests_get_one_sentence(served, fields, sentence):
    body = {"model": served.name, "prompt": "a", "max_tokens": 3, **fields}
    status, answer = served.post("/v1/completions", json.dumps(body).encode())
    message = json.loads(answer)["error"]["message"]
    assert status == 400 and message.startswith(sentence) and ". " not in message


def test_the_client_reads_refusals_and_the_list_of_models(served):
    with pytest.raises(openai.BadRequestError, match="prompt must be a text"):
        served.complete("")
    assert [model.id for model in served.client.models.list()] == [served.name]
    assert served.client.models.retrieve(served.name).object == "model"


def test_what_used_to_be_refused_is_served(served):
    """Fields that clients send by default, several prompts, more tokens than there is room for."""
    defaults = {"temperature": 0, "top_p": 0.5, "seed": 1234, "stop": [], "frequency_penalty": 0, "n": 1}
    answer = served.complete(["a", "query"], logprobs=1, echo=True, extra_body={"suffix": None}, **defaults)
    assert [choice.text for choice in answer.choices] == ["a" + served.want("a"), "query" + served.want("query")]
    long = served.complete("a", tokens=10**6, stream=True, temperature=0)
    assert served.want("a", tokens=20).startswith("".join(chunk.choices[0].text for chunk in long)[:20])


def test_what_is_not_served(served):
    assert served.post("/v1/completions", b'{"model":')[0] == 400
    assert served.post("/v1/completions", b"[1]")[0] == 400
    assert served.post("/v1/completions", b'{"model": "another", "prompt": "a"}')[0] == 400
    for path in ("/reset", "/load_model", "/v1/responses"):
        assert served.post(path, b"{}")[0] == 404
    assert served.post("/v1/completions", b" " * (5 << 20))[0] == 413


def test_a_web_page_that_rebinds_its_name_gets_no_answer(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    for host, status in (("evil.example", 403), (f"localhost:{served.port}", 200)):
        connection.request("GET", "/v1/models", headers={"Host": host})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: a", "a body", "an answer"])
def test_slow_connections_hold_no_place(servers, sent):
    """More of them than there are places, each of which waits for its client to go on, and one that asks."""
    served = servers["batching"]
    if sent == "a body":
        sent = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    if sent == "an answer":
        sent = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS + 5):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            slow.sendall(sent)
        status, answer = served.post("/v1/completions", b'{"prompt": "a", "max_tokens": 3}')
        assert status == 200 and json.loads(answer)["choices"][0]["text"] == served.want("a", 3)


def test_messages_must_suit_the_template(servers):
    refused = (openai.BadRequestError,)
    for messages in ([], "hi", [{"content": "hi"}], [{"role": "user", "content": [{}]}]):
        with pytest.raises(refused, match="messages must be"):
            servers["batching"].client.chat.completions.create(model="upgraded", messages=messages)
    with pytest.raises(refused, match="no chat template"):
        message = {"role": "user", "content": "hi"}
        servers["run"].client.chat.completions.create(model=servers["run"].name, messages=[message])


def traffic(served, count, seed):
    """`count` requests of mixed length from 8 clients, every other one malformed or cancelled."""
    draw = random.Random(seed)
    words = ["the", "block", "query", "over", "depth", "a", "layer reads"]
    kinds = ["good", "stream", "good", "stream", "empty", "broken", "cancelled", "hung up"]
    requests = [
        (kinds[i % len(kinds)], " ".join(draw.choices(words, k=draw.randint(1, 3))), draw.randint(1, 12))
        for i in range(count)
    ]

    def one(request):
        kind, prompt, tokens = request
        if kind == "good":
            return served.complete(prompt, tokens).choices[0].text
        if kind == "stream":
            return "".join(chunk.choices[0].text for chunk in served.complete(prompt, tokens, stream=True))
        if kind == "empty":
            with pytest.raises(openai.BadRequestError):
                served.complete("", tokens)
        elif kind == "broken":
            assert served.post("/v1/completions", b'{"prompt": "a", ')[0] == 400
        elif kind == "cancelled":
            stream = served.complete(prompt, 30, stream=True)
            next(iter(stream))
            stream.close()
        else:
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                body = json.dumps({"prompt": prompt, "max_tokens": 30}).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body[: -2 * (tokens % 2)] if tokens % 2 else head.encode() + body)
        return None

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, requests))
    wrong = []
    for (kind, prompt, tokens), answer in zip(requests, answers, strict=True):
        if answer is not None and answer != (want := served.want(prompt, tokens)):
            wrong.append((kind, prompt, tokens, answer, want))
    return wrong


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_faulty_traffic_harms_no_other_request_and_leaves_no_memory(servers):
    for served, count in ((servers["run"], 40), (servers["batching"], ROUND)):
        assert not traffic(served, count, seed=0)
        before = served.memory()
        assert not traffic(served, count, seed=1)
        deadline = time.monotonic() + 10
        while served.memory() > 1.02 * before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert served.memory() <= 1.02 * before, f"{before} bytes before, {served.memory()} after"
        assert served.complete("a", 3).choices[0].text == served.want("a", 3)


def test_sigterm_ends_it_while_it_streams(served):  # the last test: it ends the servers
    stream = served.complete("the", tokens=30, stream=True)
    next(iter(stream))
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 128 + signal.SIGTERM
    assert "Traceback" not in served.log.read_text()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_server_that_ends(server, finished_run, tmp_path, stop):
    ended = Served(finished_run, tmp_path / "log").wait_until_up()
    ended.process.send_signal(stop)
    ended.process.wait(60)
    assert list(ended.temporary.iterdir()) == []


def test_bad_arguments_end_with_one_sentence(server, tmp_path):
    end = server.run("serve", tmp_path / "nothing")
    assert end.status == 2 and "there is no folder" in end.said
    for flags, sentence in ((("--port", 0), "--port must lie"), (("--max-tokens", 0), "--max-tokens must be positive")):
        end = server.run("serve", tmp_path, *flags)
        assert end.status == 2 and sentence in end.said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        end = server.run("serve", tmp_path, "--port", taken.getsockname()[1])
    assert end.status == 1 and "give another --port" in end.said


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UsageError, match=r"has no config\.json"):
        command.run([str(tmp_path), "--port", str(_free_port())])
    (tmp_path / "config.json").write_text('{"model_type": "attnres", "architectures": ["AttnResForCausalLM"]}')
    with pytest.raises(UsageError, match="cannot be loaded"):
        command.run([str(tmp_path), "--device", "cpu", "--port", str(_free_port())])


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64)).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(UsageError, match=r"the tokenizer of .* knows 257 tokens and the model 256"):
        command.run([str(tmp_path), "--port", str(_free_port())])


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'attnres\[serve\]'"):
        command.run([str(tmp_path), "--port", str(_free_port())])
