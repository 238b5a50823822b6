"""The errors that refgemma raises for input it cannot use; any other exception is a bug in refgemma."""


class InputError(ValueError):
    """Input that cannot be used: the message says what was given, what was expected, and what to do."""


class InputTypeError(InputError, TypeError):
    """Input of the wrong Python type."""
