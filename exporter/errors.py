"""Errors of exporting a checkpoint."""

from common.errors import WdmoeError


class CheckpointError(WdmoeError):
    """The source checkpoint is missing, broken or not a Mixtral."""

    exit_code = 10


class DownloadError(WdmoeError):
    """Something that had to be fetched could not be, or has the wrong hash."""

    exit_code = 13
