"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can cure: configuration, data, model or environment.

    The message is one line that names the thing, what was expected, and the cure. The command line prints it alone, without a traceback,
    and exits with status 2.
    """
