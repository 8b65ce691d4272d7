"""The proof before training: a conversion that computes something else, or mixes what is packed, is found out."""

import pytest

from attnres.errors import Failure
from attnres.upgrade import UpgradeConfig, proof
from attnres.upgrade.proof import Proof, prove


@pytest.fixture
def asked(model, tmp_path):
    entries = ("full_attnres", "block_attnres")
    return Proof(UpgradeConfig(str(model), "stdlib", out=tmp_path / "out", residual=entries, device="cpu"))


def test_conversions_that_compute_the_same_are_told(asked):
    found = prove(asked)
    assert found["packed"] and list(found["conversions"]) == ["full_attnres", "block_attnres"]
    assert all(same["relative_difference"] < 1e-5 for same in found["conversions"].values())


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_a_conversion_that_computes_something_else_fails(asked, monkeypatch, difference):
    monkeypatch.setattr(proof, "convert_and_compare", lambda *given: {"relative_difference": difference})
    with pytest.raises(Failure, match=r"converted to full_attnres computes something else .*; nothing was trained"):
        prove(asked)


@pytest.mark.parametrize("mixing", ["LlamaForCausalLM", "AttnResLlamaForCausalLM"])
def test_one_model_that_mixes_sequences_is_enough(asked, monkeypatch, mixing):
    monkeypatch.setattr(proof, "keeps_apart", lambda model: type(model).__name__ != mixing)
    assert not prove(asked)["packed"]
