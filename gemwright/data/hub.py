"""A data set of the Hugging Face Hub: its data files, fetched into the Hub's own cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemwright.data.records import COMPRESSED, SUFFIXES
from gemwright.errors import GemwrightError, InputError, MachineError


def snapshot(name: str, report: Callable[[str], None]) -> Path:
    """The folder in the cache that holds the data files of `owner/name`; HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE count.

    Raises InputError where the person must act (name, licence, token), MachineError for network and disk.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    wanted = [f"*{suffix}{more}" for suffix in SUFFIXES for more in ("", *COMPRESSED)]
    if not constants.HF_HUB_OFFLINE:
        report(f"{name} is no file or folder here: asking {constants.ENDPOINT} for a data set of that name")
    disable_progress_bars()
    # The base of every failure of the transport: HTTPError of the httpx that this huggingface_hub uses.
    transport: type[BaseException] = HfHubHTTPError.__bases__[0]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except (transport, OSError, ValueError) as error:
        raise _explain(error, name) from error


def _explain(error: BaseException, name: str) -> GemwrightError:
    """The one line for what went wrong between here and the Hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # nothing cached, and this is why
    check = "Check the name and the path; a data set's name is owner/name."
    if isinstance(error, GatedRepoError):
        fix = f"Accept it at {constants.ENDPOINT}/datasets/{name} and set HF_TOKEN to a token of yours."
        return InputError("the Hub gives this data set only to those who accepted its terms", where=name, fix=fix)
    if isinstance(error, RepositoryNotFoundError):
        return InputError("no such file or folder, and no data set of that name on the Hub", where=name, fix=check)
    if isinstance(error, HfHubHTTPError):
        return MachineError(f"the Hub answered HTTP {error.response.status_code}", where=name, fix="Try again later.")
    if isinstance(error, LocalEntryNotFoundError) or constants.HF_HUB_OFFLINE:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no connection to {constants.ENDPOINT}"
        return MachineError(f"no such file or folder here, and {offline}", where=name, fix=check)
    if isinstance(error, ValueError):
        return InputError("no such file or folder, and no name of a data set", where=name, fix=check)
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return MachineError(f"no connection to {constants.ENDPOINT} ({reason})", where=name, fix=check)
