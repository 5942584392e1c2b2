"""The error tree.

::

    CheckpointError                  what went wrong with which file (also: a save that failed)
    +-- CheckpointNotFoundError      no such file, or no checkpoint in the folder
    +-- CheckpointCorruptError       the file is damaged, cut short or not a checkpoint
    +-- CheckpointMismatchError      the file is intact but does not fit the graph
"""


class CheckpointError(Exception):
    """Something is wrong with a checkpoint; the base of all errors of this package."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint, or none in this folder."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint is damaged, incomplete or not a checkpoint at all."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint does not hold what the graph wants: other names, shapes or dtypes."""
