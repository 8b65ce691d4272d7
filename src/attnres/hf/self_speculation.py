"""Generation with drafts from a model's own first layers, which transformers asks for by the config's depth."""

from typing import Any


class DraftsItself:
    """Comes before GenerationMixin in a model's bases."""

    base_model: Any

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        # for a draft transformers lowers num_hidden_layers; a draft that fails would leave it low, for all later calls
        config = self.base_model.config
        depth = config.num_hidden_layers
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            config.num_hidden_layers = depth
