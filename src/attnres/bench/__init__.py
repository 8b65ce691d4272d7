"""What depth attention costs on the machine at hand."""

from .measure import Machine, bench

__all__ = ["Machine", "bench"]
