"""AttnRes as a model of vLLM's own: its layers, attention and caches around this library's residual connections.

`register` is the plug-in `attnres` of vLLM (entry point group `vllm.general_plugins`), which calls it in each of its
processes. Importing this package loads neither vLLM nor transformers.
"""


def register() -> None:
    """Makes the models of `attnres.hf` known, and this one to vLLM as what runs `AttnResForCausalLM`.

    `model_impl="transformers"` still takes transformers' model, and converted models always do.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ..hf import register as register_with_transformers
    from .config import ModelCheck

    register_with_transformers()
    # by name: to import a model's layers here would start the accelerator in processes that are forked later
    ModelRegistry.register_model("AttnResForCausalLM", "attnres.vllm.model:AttnResForCausalLM")
    MODELS_CONFIG_MAP["AttnResForCausalLM"] = ModelCheck
