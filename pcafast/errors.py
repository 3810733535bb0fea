"""The exceptions and warnings that pcafast itself raises."""


class PcafastError(Exception):
    """Something the caller can mend; the message is one paragraph that says how.

    The command line prints it without a traceback and exits with status 2.
    """


class ArgumentError(PcafastError, ValueError):
    """An argument is wrong: the message names it, what was expected and what came."""


class FileError(PcafastError):
    """A file cannot be read or written, is truncated, or is of another format or version."""


class PcafastWarning(UserWarning):
    """Something the caller should know that does not stop the work."""
