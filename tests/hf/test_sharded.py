"""The native model over two processes, by transformers' own tensor parallelism and FSDP plans."""

import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WORKER = """
import sys
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

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):  # shards layers before the norms in them
    print("both agree")
    sys.exit()
sharded = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(fsdp_size=2))
own = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(2 + dist.get_rank()))
for model in (whole.train(), sharded.train()):
    model(own, labels=own).loss.backward()
for (name, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
    dist.all_reduce(p.grad)
    torch.testing.assert_close(q.grad.full_tensor(), p.grad / 2, rtol=1e-4, atol=1e-5, msg=name)
dist.barrier()
print("both agree")
dist.destroy_process_group()
"""


def test_tensor_parallel_and_fsdp_compute_the_same(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    workers = []
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
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
