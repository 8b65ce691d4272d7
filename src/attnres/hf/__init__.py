"""AttnRes in the Hugging Face ecosystem: a native model, conversion of existing ones, evaluation.

Importing this package registers the models with transformers: AutoConfig and the AutoModel classes then know model_type
"attnres" and those of converted models, and Trainer gives queries no weight decay. Raises UsageError where transformers
is missing.
"""

from ..errors import UsageError

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
except ImportError as error:
    raise UsageError("attnres.hf needs transformers; run: pip install 'attnres[hf]'") from error

from .configuration import AttnResConfig
from .convert.classes import add_to_transformers
from .convert.door import convert, load
from .heads import AttnResForSequenceClassification, AttnResForTokenClassification
from .modeling import AttnResForCausalLM, AttnResModel
from .optim import parameter_groups, spare_residuals

MODELS = {
    AutoModel: AttnResModel,
    AutoModelForCausalLM: AttnResForCausalLM,
    AutoModelForSequenceClassification: AttnResForSequenceClassification,
    AutoModelForTokenClassification: AttnResForTokenClassification,
}
"""The native model's classes, each by the Auto class that loads it."""


def register() -> None:
    """Makes the models known to transformers; vLLM and SGLang call it in each of their processes, as a plug-in.

    Importing this package has done it already, for converted models too.
    """
    AutoConfig.register(AttnResConfig.model_type, AttnResConfig, exist_ok=True)
    for auto_class, model_class in MODELS.items():
        auto_class.register(AttnResConfig, model_class, exist_ok=True)
        add_to_transformers(model_class)


register()
spare_residuals()

__all__ = [
    "AttnResConfig",
    "AttnResForCausalLM",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "convert",
    "load",
    "parameter_groups",
    "register",
]
