"""AttnRes in the Hugging Face ecosystem: a native model, conversion of existing ones, evaluation.

Importing this package registers the model with transformers: AutoConfig, AutoModel and AutoModelForCausalLM then know
model_type "attnres". Raises UsageError where transformers is missing.
"""

from ..errors import UsageError

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError as error:
    raise UsageError("attnres.hf needs transformers; run: pip install 'attnres[hf]'") from error

from .configuration import AttnResConfig
from .convert import convert, load
from .modeling import AttnResForCausalLM, AttnResModel

AutoConfig.register(AttnResConfig.model_type, AttnResConfig, exist_ok=True)
AutoModel.register(AttnResConfig, AttnResModel, exist_ok=True)
AutoModelForCausalLM.register(AttnResConfig, AttnResForCausalLM, exist_ok=True)

__all__ = ["AttnResConfig", "AttnResForCausalLM", "AttnResModel", "convert", "load"]
