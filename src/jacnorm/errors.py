"""Mistakes a person can mend: one sentence that names the key, file or value and says what to do."""


class UserError(Exception):
    """An expected mistake.

    The message is one sentence for the person at the terminal. Steps print it as ``ERROR: <message>`` and exit
    with status 2, without a traceback (set ``JACNORM_DEBUG=1`` to see one).
    """
