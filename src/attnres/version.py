__version__ = "0.1.0"

_ROOT = __name__.rpartition(".")[0]
IN_FOLDER = "." in _ROOT
"""Whether this code is no installed package but came with a model's folder (`hf/remote_code`), inside a module."""
NAMESPACE = _ROOT.replace(".", "_")
"""Of the operators that this code enters into torch, where each is known by one name."""
