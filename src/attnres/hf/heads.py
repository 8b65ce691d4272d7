"""The native model with other heads than the language model's: one label for a text, or one for each token.

transformers' own heads over any base model; weights of the base model are named as in `AttnResForCausalLM`.
"""

from transformers import AutoModel
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from .configuration import AttnResConfig
from .modeling import AttnResModel, AttnResPreTrainedModel

AutoModel.register(AttnResConfig, AttnResModel, exist_ok=True)  # by which these heads make their base model


class AttnResForSequenceClassification(GenericForSequenceClassification, AttnResPreTrainedModel):
    """Scores [B, num_labels] for a text from its last token that is no padding, as AutoModelForSequenceClassification
    loads it. Batches need `config.pad_token_id`."""


class AttnResForTokenClassification(GenericForTokenClassification, AttnResPreTrainedModel):
    """Scores [B, T, num_labels], one row for each token, as AutoModelForTokenClassification loads it."""
