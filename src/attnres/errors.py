"""The two ways a run ends early: the user's input is wrong, or the environment failed."""


def first_line(error: Exception) -> str:
    """What a library's error says, without its long story."""
    return str(error).strip().partition("\n")[0]


class UsageError(ValueError):
    """Bad input: the message names the argument and the mend. The command line exits with status 2."""


class Failure(RuntimeError):
    """The environment failed (disk full, damaged file, diverged loss). The command line exits with status 1."""
