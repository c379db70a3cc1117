"""Failures that a user can mend."""


class ExpectedError(Exception):
    """An expected failure; its message is one line that names the file or field and the remedy.

    The command line prints the message without a traceback and leaves with status 2.
    """


def one_line(error: BaseException) -> str:
    """Returns what an error of a library says, as one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
