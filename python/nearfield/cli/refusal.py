"""What a command raises when its input is wrong."""


class Refused(Exception):
    """One sentence for the user: what was given, what is supported."""
