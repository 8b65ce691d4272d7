import pytest

from ..command_line import Server
from .tiny import write_chats, write_model, write_texts

MODULES = ("attnres.commands.upgrade", "transformers.models.llama.modeling_llama", "peft")


@pytest.fixture(scope="session")
def upgrader(tmp_path_factory):
    """A server of commands that has imported transformers."""
    server = Server(tmp_path_factory.mktemp("upgrades"), *MODULES)
    yield server
    server.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("pretrained") / "tiny")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")
