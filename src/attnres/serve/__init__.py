"""A model behind the OpenAI protocol: the server of `attnres serve`.

transformers generates, alone (`generate`) or in batches (continuous batching), and uvicorn speaks HTTP. The protocol
between them is here: `request` checks what clients ask for, `engine` makes tokens, `answer` makes text and JSON of
them, `app` joins the three, `connection` keeps slow clients from taking the places of others.
"""

from .server import serve

__all__ = ["serve"]
