"""Errors whose message is meant for the user: the CLI prints it alone and exits with code 1."""


class UserError(Exception):
    """Something the user gave cannot be used; says what came and what to do."""
