"""What the hub's library reports, as one line that says what to do."""

import errno

from common.console import describe_os_error
from common.errors import StorageError, WdmoeError, one_line
from exporter.errors import DownloadError

_LOGIN = "'hf auth login', or set HF_TOKEN"
_AGAIN = "run the same command again, files that are complete are kept"
_MAX_SHOWN = 200


def hub_is_silent(error: Exception) -> bool:
    """Whether an error means that there was no answer from the hub: no network, a failing hub, or offline mode."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    # The library's offline mode raises a ConnectionError.
    return isinstance(error, (*_without_answer(), ConnectionError, LocalEntryNotFoundError))


def hub_error(error: Exception, repository: str, revision: str | None) -> WdmoeError:
    """The error to raise instead of one of the library.

    Args:
        repository: hub id.
        revision: the revision that was asked for; None for the main branch.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        access = "with the account of your token" if get_token() else f"log in with {_LOGIN}"
        return DownloadError(f"{repository} is gated: accept its terms at {hub}/{repository}, {access}, and try again")
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(
            f"{repository} has no revision '{revision}': {hub}/{repository}/tree/main lists its branches and tags"
        )
    if isinstance(error, DisabledRepoError):
        return DownloadError(f"the hub has disabled {repository}: choose another model")
    # The hub answers 401 to a client without a token for a model that is private or does not exist.
    if isinstance(error, RepositoryNotFoundError):
        private = "your token may not read it" if get_token() else f"it is private: log in with {_LOGIN}"
        return DownloadError(f"the hub shows no model {repository}: check the spelling, or else {private}")
    if status == 401:
        return DownloadError(f"the hub refused your token: log in again with {_LOGIN} to a valid one, or unset it")
    if status == 403:
        return DownloadError(f"your token may not read {repository}: give it that permission at {hub}/settings/tokens")
    if status == 429:
        return DownloadError("the hub allows no more requests for now: wait some minutes, or log in to be allowed more")
    copy = f"{constants.HF_HUB_CACHE} has no complete copy of {repository}"
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return DownloadError(f"HF_HUB_OFFLINE is set, and {copy}: unset it, or name a folder")
    if hub_is_silent(error):
        cause = error.__cause__ or error
        return DownloadError(
            f"no answer from {hub} ({_short(cause)}), and {copy}: check the network and {_AGAIN}; or name a folder"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return StorageError(f"can't write to {constants.HF_HUB_CACHE}: {describe_os_error(error)}")
    return DownloadError(f"can't fetch {repository} from {hub} ({_short(error)}): {_AGAIN}")


def _without_answer() -> tuple[type[BaseException], ...]:
    """The base of the errors of the library's HTTP client, whichever client that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)


def _short(error: BaseException) -> str:
    # Messages of the library continue with paragraphs of advice.
    text = one_line(error) if isinstance(error, Exception) else type(error).__name__
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
