"""Fetches remote checkpoints into a cache.

A file appears in the cache under its name only when it is complete: its size
and, where the name carries one, its hash are right and it looks like a
checkpoint. An interrupted download lies beside it as ``*.incomplete`` and is
resumed. huggingface_hub transfers what lies on its hub, into its own cache.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from mmengine.dist import all_gather_object, get_dist_info
from mmengine.logging import print_log
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from .errors import CheckpointDownloadError, CheckpointError, CheckpointFileError, shown
from .reader import check_format, expanded

CACHE_VARIABLE = 'CONVNEXT_MM_CACHE'
QUIET_VARIABLE = 'HF_HUB_DISABLE_PROGRESS_BARS'  # set to one of QUIET
QUIET = ('1', 'ON', 'YES', 'TRUE')
# Against the address as it stands: what urlsplit takes for its host need not
# be where urllib goes.
LOOPBACK = re.compile(r'http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?(/.*)?')
TIMEOUT = 15  # seconds without an answer
# As torch.hub and OpenMMLab name files: the start of the SHA-256 before the
# suffix. Eight digits of a date are no hash.
HASH_PATTERN = re.compile(r'-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.[a-z]+$')
# What repositories on the Hugging Face hub call their weights, best first.
HUB_FILES = (
    'model.safetensors',
    'open_clip_model.safetensors',
    'pytorch_model.bin',
    'open_clip_pytorch_model.bin',
)


def fetch(source: str | os.PathLike) -> Path:
    """A local path of a checkpoint; downloads it where it is remote.

    In distributed training one process of each machine downloads while the
    others wait; if it fails, all raise.

    Args:
        source: A path, ``https://...``, ``hf://org/name[@revision][/file]`` or
            ``timm://name``.

    Raises:
        CheckpointDownloadError: It cannot be fetched.
        CheckpointFileError: A path whose ``~`` names no home folder.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f'a checkpoint is a path or an address, got {type(source).__name__}'
        )
    source = os.fsdecode(source)
    scheme, separator, rest = source.partition('://')
    if not separator:
        return expanded(source)
    fetchers = {
        'https': lambda: _fetch_url(source),
        'http': lambda: _fetch_url(source),
        'hf': lambda: _fetch_from_hub(rest),
        'timm': lambda: _fetch_from_timm(rest),
    }
    if scheme not in fetchers:
        raise CheckpointDownloadError(
            f'{shown(source)}: unknown scheme {shown(scheme)!r}; a checkpoint '
            'is a path or starts with https://, hf:// or timm://'
        )
    try:
        return _once_per_machine(fetchers[scheme])
    except ValueError as error:  # ours, or one about the address
        raise CheckpointDownloadError(f'{shown(source)}: {_because(error)}') from error


def cache_dir() -> Path:
    """Where plain downloads go: ``$CONVNEXT_MM_CACHE``, or ``convnext_mm`` in
    the user's cache folder.

    Raises:
        CheckpointFileError: Its ``~`` names no home folder.
    """
    base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return expanded(
        os.environ.get(CACHE_VARIABLE) or os.path.join(base, 'convnext_mm'),
        f'set {CACHE_VARIABLE} to a full path',
    )


def _once_per_machine(download: Callable[[], Path]) -> Path:
    rank, world_size = get_dist_info()
    if world_size == 1:
        return download()
    path = failure = None
    if int(os.environ.get('LOCAL_RANK', rank)) == 0:
        try:
            path = download()
        except Exception as error:  # whatever it is, the others wait for word
            failure = error
    texts = all_gather_object(_because(failure) if failure else None)
    if failure:
        raise failure
    if any(texts):
        raise CheckpointDownloadError(next(filter(None, texts)))
    return path or download()  # from the cache


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise CheckpointDownloadError(
            'hf:// and timm:// need huggingface_hub: `pip install '
            'huggingface_hub`, or download the file yourself and give its path'
        ) from error
    return huggingface_hub


def _because(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    text = (str(error).strip().splitlines() or [''])[0]
    return f'{type(error).__name__}: {shown(text, 300)}'


def cache_path(url: str) -> Path:
    """Where the file of an ``https://`` address lies once it is fetched. One that
    was fetched elsewhere may be put there.

    Raises:
        CheckpointDownloadError: It is no address, or not a protected one.
    """
    _check_protected(url)
    try:
        name = unquote(urlsplit(url).path).rsplit('/', 1)[-1] or 'checkpoint'
    except ValueError as error:
        raise CheckpointDownloadError(
            f'this is not an address ({error}); one looks like '
            'https://host/folder/file.pth'
        ) from error
    name = re.sub(r'[^\w.+-]|^\.+', '_', name, flags=re.ASCII)[-150:]
    # Many files are called model.pth, so each address has its own folder.
    digest = hashlib.sha256(url.encode()).hexdigest()
    return cache_dir() / digest[:16] / name


def _fetch_url(url: str) -> Path:
    path = cache_path(url)
    folder, name = path.parent, path.name
    try:
        if path.exists() and not _hash_fault(path, name):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if path.exists() and (fault := _hash_fault(path, name)):
                print_log(
                    f'{shown(path)}: {fault}; downloading it again',
                    logger='current',
                    level=logging.WARNING,
                )
                path.unlink()
            if not path.exists():
                _download(url, path)
    except (OSError, NotImplementedError) as error:  # of the disk, of filelock
        raise CheckpointDownloadError(
            f'cannot write to the cache {shown(folder)} ({_because(error)}); '
            f'set {CACHE_VARIABLE} to a folder that can be written and has '
            'room'
        ) from error
    return path


def _lock(path: Path) -> contextlib.AbstractContextManager:
    """Lets one process download; the system frees the lock of a dead one."""
    from filelock import FileLock, Timeout  # of torch's own requirements

    lock = FileLock(f'{path}.lock')
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print_log(
            f'{shown(path)}: waiting for the process that downloads it',
            logger='current',
        )
        return lock.acquire()


def _check_protected(url: str) -> None:
    if not url.startswith('https://') and not LOOPBACK.fullmatch(url):
        raise CheckpointDownloadError(
            f'it would come from {shown(url)}, which is not https and could be '
            'changed on its way; use an https address'
        )


class _ProtectedRedirects(HTTPRedirectHandler):
    """Every hop counts, not only the last: each can send us elsewhere."""

    def redirect_request(
        self,
        req: Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> Request | None:
        _check_protected(newurl)
        if code == 308:  # Python 3.10 knows only 307, the same but not for ever
            code = 307
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    http_error_308 = HTTPRedirectHandler.http_error_302


def open_url(url: str, **headers: str) -> HTTPResponse:
    """The server's answer to a request for a protected address.

    Raises:
        CheckpointDownloadError: It does not give the file.
    """
    _check_protected(url)
    headers.update({'Accept-Encoding': 'identity', 'User-Agent': 'convnext_mm'})
    try:
        return build_opener(_ProtectedRedirects).open(
            Request(url, headers=headers), timeout=TIMEOUT
        )
    except (HTTPException, OSError, ValueError) as error:
        raise CheckpointDownloadError(
            f'the server does not give the file ({_because(error)}); check '
            'the address and the network, or download it yourself and give '
            'its path'
        ) from error


def _version(answer: HTTPResponse) -> str | None:
    """Tells versions of a file apart; None where that, or the file's size, is
    not known, so that a download cannot be resumed."""
    for name in ('ETag', 'Last-Modified'):
        value = answer.headers.get(name, 'W/')
        if not value.startswith('W/') and answer.length is not None:  # W: weak
            return hashlib.sha256(value.encode()).hexdigest()[:8]
    return None


def _download(url: str, path: Path) -> None:
    """Transfers, checks, and only then gives the file its name."""
    answer = open_url(url)
    version = _version(answer)
    # The version is in the name: parts of two versions are never joined.
    partial = path.with_name(f'{path.name}.{version}.incomplete')
    for other in path.parent.glob('*.incomplete'):
        if other != partial or version is None:
            other.unlink()
    start = partial.stat().st_size if partial.exists() else 0
    rest = _rest(url, answer, start)
    resumable = version is not None
    try:
        _transfer(
            rest or answer, partial, start if rest else 0, answer.length, path.name
        )
        resumable = False  # complete: right or not
        if fault := _hash_fault(partial, path.name):
            raise CheckpointFileError(fault)
        check_format(partial)
        os.replace(partial, path)
    finally:
        if not resumable:
            partial.unlink(missing_ok=True)


def _rest(url: str, whole: HTTPResponse, start: int) -> HTTPResponse | None:
    """An answer with the bytes of a file from ``start`` on, where the server has
    one for the same version of the file."""
    size = whole.length
    if size is None or not 0 < start < size:
        return None
    # GET, as some servers and signed addresses allow nothing else; without
    # If-Range, whose answer need not say which version it is.
    rest = open_url(url, Range=f'bytes={start}-')
    fits = (_version(rest), rest.headers.get('Content-Range')) == (
        _version(whole),
        f'bytes {start}-{size - 1}/{size}',
    )
    return rest if fits else None


def _transfer(
    answer: HTTPResponse, partial: Path, start: int, size: int | None, name: str
) -> None:
    """Appends what is answered to the first ``start`` bytes, with progress."""
    progress = Progress(
        '{task.description}',
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=os.environ.get(QUIET_VARIABLE, '').upper() in QUIET,
    )
    task = progress.add_task(name, total=size, completed=start)
    with open(partial, 'ab' if start else 'wb') as file, progress:
        for chunk in _chunks(answer, start, size):
            file.write(chunk)
            progress.advance(task, len(chunk))


def _chunks(answer: HTTPResponse, done: int, size: int | None) -> Iterator[bytes]:
    try:
        while chunk := answer.read(1 << 16):
            yield chunk
            done += len(chunk)
        if size not in (None, done):
            raise ConnectionError('the server closed the connection')
    except (HTTPException, OSError) as error:
        raise CheckpointDownloadError(
            f'the download stopped after {done} of {size or "?"} bytes '
            f'({_because(error)}); start again to resume it'
        ) from error


def _hash_fault(path: Path, name: str) -> str | None:
    """Says that the file has not the hash in its name, where it has not."""
    match = HASH_PATTERN.search(name.lower())
    if match is None:
        return None
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    start = digest.hexdigest()[: len(match[1])]
    if start == match[1]:
        return None
    return (
        f'its SHA-256 starts with {start}, its name says {match[1]}: the file '
        'was changed or cut'
    )


def _fetch_from_hub(rest: str) -> Path:
    """``org/name[@revision][/file]``."""
    match = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?', rest)
    if match is None:
        raise CheckpointDownloadError(
            'a file on the Hugging Face hub is written hf://org/name[@revision][/file]'
        )
    hub = _hub()
    repo, revision, file = match.groups()
    errors = hub.errors
    endpoint = os.environ.get('HF_ENDPOINT') or hub.constants.ENDPOINT
    _check_protected(endpoint)
    for name in (file,) if file else HUB_FILES:
        try:
            return Path(
                hub.hf_hub_download(repo, name, revision=revision, endpoint=endpoint)
            )
        except errors.LocalEntryNotFoundError as error:
            raise CheckpointDownloadError(
                f'the hub cannot be reached ({_because(error)})'
            ) from error
        except errors.EntryNotFoundError:
            continue
        except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
            raise CheckpointDownloadError(
                'there is no such repository, or it needs you to accept its '
                f'terms and log in (`hf auth login`): {_because(error)}'
            ) from error
        # requests or httpx, whichever this huggingface_hub uses.
        except Exception as error:
            raise CheckpointDownloadError(
                f'the download failed ({_because(error)})'
            ) from error
    raise CheckpointDownloadError(
        f'{repo} has none of {(file,) if file else HUB_FILES}; name the file '
        'as hf://org/name/file'
    )


def _fetch_from_timm(name: str) -> Path:
    """timm's weights lie on the hub as timm/<model>.<tag>; timm itself is asked
    for the default tag."""
    if re.fullmatch(r'\w+\.\w+', name):
        return _fetch_from_hub(f'timm/{name}')
    try:
        import timm
    except ModuleNotFoundError as error:
        raise CheckpointDownloadError(
            f'timm://{name} names no tag, and timm, which knows the default, '
            'is not installed: `pip install timm`, or write '
            'timm://model.tag'
        ) from error
    config = timm.get_pretrained_cfg(name) if re.fullmatch(r'\w+', name) else None
    if config is None or not config.tag:
        raise CheckpointDownloadError(
            f'timm has no pretrained model {name!r}; see '
            "timm.list_models('convnext*', pretrained=True)"
        )
    return _fetch_from_hub(f'timm/{name}.{config.tag}')
