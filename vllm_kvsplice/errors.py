"""Faults that a user can cause. Every message is one sentence and names the way out."""


class KVSpliceError(Exception):
    """Something asked for cannot be done; the command line prints the message without a traceback.

    Not a `ValueError`: pydantic would swallow those into a report of its own while vLLM builds its configuration.
    """


class ArtifactError(KVSpliceError):
    """An artifact is missing, damaged, or belongs to another model."""
