"""Native models over two processes, by transformers' own tensor parallelism and FSDP plans."""

import os
import socket
import subprocess
import sys

import pytest

from ..distributed.processes import ROOT

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WORKER = """
import sys
from tests.distributed.processes import leave_gpus_alone
leave_gpus_alone()
import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from attnres.hf import AttnResConfig, AttnResForCausalLM

dist.init_process_group("gloo")
torch.manual_seed(0)
config = AttnResConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.3, residual_options={"num_blocks": 2},
)
whole = AttnResForCausalLM(config)
for p in whole.model.residual.parameters():
    torch.nn.init.normal_(p)
if dist.get_rank() == 0:
    whole.save_pretrained(sys.argv[1])
dist.barrier()

split = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
assert split.model.layers[0].q_proj.weight.to_local().shape == (16, 32)
ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    torch.testing.assert_close(split.eval()(ids).logits, whole.eval()(ids).logits, rtol=1e-4, atol=1e-4)

HYBRID

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):  # shards layers before the norms in them
    print("both agree")
    sys.exit()
# in fp64: norms of sharded layers run apart from the reads before them, and so round differently
sharded = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float64
)
own = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(2 + dist.get_rank()))
for model in (whole.double().train(), sharded.train()):
    model(own, labels=own).loss.backward()
for (name, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
    dist.all_reduce(p.grad)
    torch.testing.assert_close(q.grad.full_tensor(), p.grad / 2, rtol=1e-9, atol=1e-11, msg=name)
dist.barrier()
print("both agree")
dist.destroy_process_group()
"""

HYBRID = """
from attnres.errors import UsageError

torch.manual_seed(0)
hybrid = AttnResForCausalLM(AttnResConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, attention_pattern=("kda", "mla", "gqa"),
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1, linear_chunk_size=4,
    max_position_embeddings=64, initializer_range=0.3, residual_options={"num_blocks": 2}, MORE
))
for p in hybrid.model.residual.parameters():
    torch.nn.init.normal_(p)
folder = sys.argv[1] + "-hybrid"
if dist.get_rank() == 0:
    hybrid.save_pretrained(folder)
dist.barrier()
split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
delta, latent, experts = split.model.layers[0], split.model.layers[2], split.model.layers[3]
assert delta.A_log.to_local().shape == (2,) and latent.kv_b_proj.weight.to_local().shape == (32, 32)
assert experts.down_proj.to_local().shape == (4, hybrid.config.routed_expert_hidden_size or 32, 4)
for model in (split, hybrid):
    model.eval()
with torch.no_grad():
    torch.testing.assert_close(split(ids).logits, hybrid(ids).logits, rtol=1e-4, atol=1e-4)
greedy = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
assert torch.equal(split.generate(ids, **greedy), hybrid.generate(ids, **greedy))
for model in (split, hybrid):
    model.train()(ids, labels=ids).loss.backward()
for (name, p), q in zip(hybrid.named_parameters(), split.parameters(), strict=True):
    found = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
    torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")
hybrid.config.linear_num_heads = 3
try:
    AttnResForCausalLM.maybe_distribute_model(hybrid, DistributedConfig(tp_size=2), object())
    raise AssertionError("3 heads over 2 processes")
except UsageError as error:
    assert str(error).startswith("linear_num_heads must be a multiple of the tensor-parallel processes: 3 over 2")
"""

KIMI_K3 = """
    hidden_act="situ", linear_gate_lower_bound=-5.0, linear_full_rank_gate=True, q_lora_rank=12,
    mla_use_output_gate=True, routed_expert_hidden_size=16, latent_moe_use_norm=True,
"""


def test_tensor_parallel_and_fsdp_compute_the_same(tmp_path):
    script = tmp_path / "worker.py"
    hybrids = "".join(HYBRID.replace("MORE", more) for more in ("", KIMI_K3))
    script.write_text(WORKER.replace("\nHYBRID\n", hybrids))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    workers = []
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        place["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(script), str(tmp_path / "model")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        workers.append(subprocess.Popen(command, env={**os.environ, **place}, **pipes))
    try:
        for worker in workers:
            out, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors[-3000:]
            assert "both agree" in out
    finally:
        for worker in workers:
            worker.kill()
