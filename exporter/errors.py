"""Errors of exporting a checkpoint."""

from common.errors import WdmoeError


class CheckpointError(WdmoeError):
    """The source checkpoint is missing, damaged or of a family that can't be exported."""

    exit_code = 10


class DownloadError(WdmoeError):
    """A download failed or has the wrong hash."""

    exit_code = 13
