"""One file from the Hugging Face Hub into its cache: resumed after a break, checked by SHA-256, errors in one line.

`huggingface_hub` brings the conventions (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) and the cache's layout; since
2.x it throws a partial file away when its process ends, so the bytes are fetched here and then handed to its cache.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name

from gemwright.errors import GemwrightError, InputError, MachineError
from gemwright.weights.digest import sha256_file

# The base of every failure of the transport: HTTPError of the httpx that this huggingface_hub uses.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def local_copy(repo: str, file: str) -> Path | None:
    """The file in the cache, without asking the network; None where it is not there."""
    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def download(repo: str, file: str, report: Callable[[str], None]) -> tuple[Path, str | None]:
    """(path in the cache, the SHA-256 that the Hub states for it).

    Raises InputError where the person must act (licence, token, name), MachineError for network, disk and damage.
    """
    url, cached = hf_hub_url(repo, file), local_copy(repo, file)
    try:
        stated = get_hf_file_metadata(url)
        digest = stated.etag if stated.etag and _SHA256.fullmatch(stated.etag) else None
        if digest is not None:
            folder = repo_folder_name(repo_id=repo, repo_type="model")
            blob = Path(constants.HF_HUB_CACHE, folder, "blobs", digest)
            lock = Path(constants.HF_HUB_CACHE, ".locks", folder, f"{digest}.part.lock")
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                _fetch(url, blob, stated.size, repo, report)
        path = Path(hf_hub_download(repo, file))
        if digest is not None and not path.is_symlink():  # no symlinks here: the cache has made a copy
            blob.unlink(missing_ok=True)
        return path, digest
    except (_HTTP_ERROR, OSError, EntryNotFoundError) as error:
        explained = _explain(error, repo, file)
        if cached is None or isinstance(explained, InputError):
            raise explained from error
        report(f"{explained.what}; taking the copy that is here")
        return cached, cached.resolve().name if _SHA256.fullmatch(cached.resolve().name) else None


def _fetch(url: str, blob: Path, size: int | None, repo: str, report: Callable[[str], None]) -> None:
    """Bring the bytes of `blob`, whose name is their SHA-256, continuing a part that an earlier try has left."""
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.part")
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have > size:
        part.unlink()
        have = 0
    if size is not None and size - have > shutil.disk_usage(blob.parent).free:
        what = f"this disk lacks the {(size - have) / 1e9:.1f} GB that the download takes"
        raise MachineError(what, where=blob.parent, fix="Free some space, or set HF_HOME to another disk.")
    total = f"{size / 1e6:,.0f} MB" if size is not None else "a file of unknown size"
    report(f"downloading {total} from {repo}" + (f", from {have / 1e6:,.0f} MB on" if have else ""))
    token = get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with part.open("ab") as handle:
        http_get(url, handle, resume_size=have, headers=headers, expected_size=size)
        handle.flush()
        os.fsync(handle.fileno())
    if (got := sha256_file(part)) != blob.name:
        part.unlink()
        what = f"the download is damaged (sha256 {got}, not {blob.name})"
        raise MachineError(what, where=repo, fix="Pull it again.")
    os.replace(part, blob)


def _explain(error: BaseException, repo: str, file: str) -> GemwrightError:
    """The one line for what went wrong between here and the Hub."""
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, OfflineModeIsEnabled):
        return MachineError("HF_HUB_OFFLINE is set", where=repo, fix="Unset it, or give the path of a model file.")
    if isinstance(error, GatedRepoError):
        fix = f"Accept it at {page}, make a token at {constants.ENDPOINT}/settings/tokens and set HF_TOKEN to it."
        return InputError("the Hub gives this model only to those who accepted its licence", where=repo, fix=fix)
    if isinstance(error, RepositoryNotFoundError):
        return InputError("no such repository on the Hub", where=repo, fix="Check HF_ENDPOINT and HF_TOKEN.")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, EntryNotFoundError):
        return InputError(f"the repository has no {file}", where=repo, fix=f"Download a GGUF by hand from {page}.")
    if status in (401, 403):
        return InputError(f"the Hub refused the token (HTTP {status})", where=repo, fix="Set HF_TOKEN to a valid one.")
    if status is not None:
        return MachineError(f"the Hub answered HTTP {status}", where=repo, fix="Try again later.")
    if isinstance(error, OSError) and error.errno in _DISK:
        what, fix = f"cannot write: {error.strerror}", "Free some space, or set HF_HOME to another disk."
        return MachineError(what, where=error.filename or constants.HF_HUB_CACHE, fix=fix)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return MachineError(
        f"no connection to {constants.ENDPOINT} ({reason})",
        where=repo,
        fix="Check the network and pull again (it goes on where it stopped), or give the path of a model file.",
    )
