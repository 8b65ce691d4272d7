"""The two ways a run ends early: the user's input is wrong, or the environment failed."""

from collections.abc import Sequence


def first_line(error: Exception) -> str:
    """What a library's error says, without its long story."""
    return str(error).strip().partition("\n")[0]


class UsageError(ValueError):
    """Bad input: the message names the argument and the mend. The command line exits with status 2."""


def check_counts(least: int = 1, **values: object) -> None:
    """Raises UsageError for the first of these arguments that is no whole number of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            kind = {0: "a non-negative whole number", 1: "a positive whole number"}
            wanted = kind.get(least, f"a whole number of at least {least}")
            raise UsageError(f"{name} must be {wanted}; it is {value!r}")


def check_each_once(**lists: Sequence[object]) -> None:
    """Raises UsageError for the first of these arguments that is empty or repeats itself."""
    for name, values in lists.items():
        if not values or len(set(values)) != len(values):
            raise UsageError(f"{name} must name at least one, each once; it is {', '.join(map(str, values))!r}")


class Failure(RuntimeError):
    """The environment failed (disk full, damaged file, diverged loss). The command line exits with status 1."""
