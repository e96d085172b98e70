"""Mistakes of the user, which are told in a sentence. Any other exception is a program's fault, with a traceback."""


class Mistake(ValueError):
    """What the user gave can't work. The message says what was given, what is allowed and what to do."""


class Missing(Mistake, FileNotFoundError):
    """A file or folder that is needed is not there. The message says which, and how to get it."""
