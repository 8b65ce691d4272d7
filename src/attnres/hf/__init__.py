"""AttnRes in the Hugging Face ecosystem: a native model, conversion of existing ones, evaluation.

Importing this package registers the models with transformers: AutoConfig, AutoModel and AutoModelForCausalLM then know
model_type "attnres" and those of converted models, and Trainer gives queries no weight decay. Raises UsageError where
transformers is missing.
"""

from ..errors import UsageError

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError as error:
    raise UsageError("attnres.hf needs transformers; run: pip install 'attnres[hf]'") from error

from .configuration import AttnResConfig
from .convert.classes import add_to_transformers
from .convert.door import convert, load
from .modeling import AttnResForCausalLM, AttnResModel
from .optim import parameter_groups, spare_residuals


def register() -> None:
    """Makes the models known to transformers; vLLM and SGLang call it in each of their processes, as a plug-in.

    Importing this package has done it already, for converted models too.
    """
    AutoConfig.register(AttnResConfig.model_type, AttnResConfig, exist_ok=True)
    AutoModel.register(AttnResConfig, AttnResModel, exist_ok=True)
    AutoModelForCausalLM.register(AttnResConfig, AttnResForCausalLM, exist_ok=True)
    for model_class in (AttnResModel, AttnResForCausalLM):
        add_to_transformers(model_class)


register()
spare_residuals()

__all__ = [
    "AttnResConfig",
    "AttnResForCausalLM",
    "AttnResModel",
    "convert",
    "load",
    "parameter_groups",
    "register",
]
