"""Fetches remote checkpoints into a cache; huggingface_hub does the transfer.

A file appears in the cache under its name only when it is complete: its size
and, where the name carries one, its hash are right and it looks like a
checkpoint. An interrupted download lies beside it as ``*.incomplete`` and is
resumed.
"""
import hashlib
import os
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from mmengine.dist import all_gather_object, get_dist_info

from .errors import (CheckpointDownloadError, CheckpointError,
                     CheckpointFileError)
from .reader import check_format

CACHE_VARIABLE = 'CONVNEXT_MM_CACHE'
LOOPBACK = ('localhost', '127.0.0.1', '::1')
TIMEOUT = 15  # seconds without an answer
# As torch.hub and OpenMMLab name files: the start of the SHA-256 before the
# suffix. Eight digits of a date are no hash.
HASH_PATTERN = re.compile(r'-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.[a-z]+$')
# What repositories on the Hugging Face hub call their weights, best first.
HUB_FILES = ('model.safetensors', 'open_clip_model.safetensors',
             'pytorch_model.bin', 'open_clip_pytorch_model.bin')


def fetch(source: Union[str, os.PathLike]) -> Path:
    """A local path of a checkpoint; downloads it where it is remote.

    In distributed training one process of each machine downloads while the
    others wait; if it fails, all raise.

    Args:
        source: A path, ``https://...``, ``hf://org/name[@revision][/file]`` or
            ``timm://name``.

    Raises:
        CheckpointDownloadError: It cannot be fetched.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError('a checkpoint is a path or an address, got '
                        f'{type(source).__name__}')
    source = os.fspath(source)
    scheme, separator, rest = source.partition('://')
    if not separator:
        return Path(source)
    fetchers = {
        'https': lambda: _fetch_url(source),
        'http': lambda: _fetch_url(source),
        'hf': lambda: _fetch_from_hub(rest),
        'timm': lambda: _fetch_from_timm(rest)
    }
    if scheme not in fetchers:
        raise CheckpointDownloadError(
            f'{source}: unknown scheme {scheme!r}; a checkpoint is a path or '
            'starts with https://, hf:// or timm://')
    try:
        return _once_per_machine(fetchers[scheme])
    except CheckpointError as error:
        raise CheckpointDownloadError(f'{source}: {error}') from error


def cache_dir() -> Path:
    """Where plain downloads go: ``$CONVNEXT_MM_CACHE``, or ``convnext_mm`` in
    the user's cache folder."""
    base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return Path(os.environ.get(CACHE_VARIABLE)
                or os.path.join(base, 'convnext_mm')).expanduser()


def _once_per_machine(download: Callable[[], Path]) -> Path:
    rank, world_size = get_dist_info()
    if world_size == 1:
        return download()
    path = failure = None
    first = int(os.environ.get('LOCAL_RANK', rank)) == 0
    if first:
        try:
            path = download()
        except CheckpointError as error:
            failure = str(error)
    failures = [text for text in all_gather_object(failure) if text]
    if failures:
        raise CheckpointDownloadError(failures[0])
    return path if first else download()  # from the cache


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise CheckpointDownloadError(
            'downloads need huggingface_hub: `pip install huggingface_hub`, '
            'or download the file yourself and give its path') from error
    return huggingface_hub


def _because(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [''])[0][:300]
    return f'{type(error).__name__}: {text}'


def _fetch_url(url: str) -> Path:
    if not _is_protected(url):
        raise CheckpointDownloadError(
            'plain http can be changed on its way; use https')
    name = unquote(urlsplit(url).path).rsplit('/', 1)[-1] or 'checkpoint'
    name = re.sub(r'[^\w.+-]', '_', name)[-150:]
    # Many files are called model.pth, so each address has its own folder.
    folder = cache_dir() / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    if path.exists():
        return path
    from filelock import FileLock  # of torch's own requirements
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / 'lock'):
            if not path.exists():
                _download(url, path)
    except OSError as error:
        raise CheckpointDownloadError(
            f'cannot write to the cache {folder} ({_because(error)}); set '
            f'{CACHE_VARIABLE} to a folder that can be written') from error
    return path


def _is_protected(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise CheckpointDownloadError(
            f'{url!r} is not an address ({error})') from error
    return parts.scheme == 'https' or parts.hostname in LOOPBACK


class _Remote(NamedTuple):
    """What a server says about a file."""
    size: Optional[int] = None
    version: Optional[str] = None


def _ask(url: str) -> _Remote:
    request = Request(url, method='HEAD', headers={
        'Accept-Encoding': 'identity', 'User-Agent': 'convnext_mm'})
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:
            headers, final = answer.headers, answer.geturl()
    except HTTPError as error:
        if error.code in (405, 501):  # answers no such questions
            return _Remote()
        raise CheckpointDownloadError(
            f'the server answers {error.code} ({error.reason}); check the '
            'address') from error
    except (URLError, HTTPException, OSError, ValueError) as error:
        raise CheckpointDownloadError(
            f'the server does not give the file ({_because(error)}); check '
            'the address and the network, or download it yourself and give '
            'its path') from error
    if not _is_protected(final):
        raise CheckpointDownloadError(f'leads to {final}, which is not https')
    size = headers.get('Content-Length', '')
    version = headers.get('ETag') or headers.get('Last-Modified') or size
    digest = hashlib.sha256(version.encode()).hexdigest()[:8]
    return _Remote(int(size) if size.isdigit() else None,
                   digest if version else None)


def _download(url: str, path: Path) -> None:
    """Transfers, checks, and only then gives the file its name."""
    _hub()
    from huggingface_hub.file_download import http_get
    remote = _ask(url)
    # The version is in the name: parts of two versions are never joined.
    partial = path.with_name(f'{path.name}.{remote.version}.incomplete')
    if remote.version is None:
        partial.unlink(missing_ok=True)
    try:
        with open(partial, 'ab') as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                expected_size=remote.size,
                displayed_filename=path.name)
    # requests or httpx, whichever this huggingface_hub uses, has own errors.
    except Exception as error:
        size = partial.stat().st_size if partial.exists() else 0
        if remote.size is not None and size > remote.size:
            partial.unlink()  # cannot become right any more
        raise CheckpointDownloadError(
            f'the download stopped after {size} of {remote.size} bytes '
            f'({_because(error)}); start again to resume it') from error
    try:
        _check_hash(partial, path.name)
        check_format(partial)
    except CheckpointError:
        partial.unlink()
        raise
    os.replace(partial, path)


def _check_hash(path: Path, name: str) -> None:
    match = HASH_PATTERN.search(name.lower())
    if match is None:
        return
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(match[1]):
        raise CheckpointFileError(
            f'its SHA-256 starts with {digest.hexdigest()[:len(match[1])]}, '
            f'its name says {match[1]}: the file was changed or cut')


def _fetch_from_hub(rest: str) -> Path:
    """``org/name[@revision][/file]``."""
    match = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?', rest)
    if match is None:
        raise CheckpointDownloadError(
            'a file on the Hugging Face hub is written '
            'hf://org/name[@revision][/file]')
    hub = _hub()
    repo, revision, file = match.groups()
    errors = hub.errors
    for name in (file, ) if file else HUB_FILES:
        try:
            return Path(
                hub.hf_hub_download(
                    repo,
                    name,
                    revision=revision,
                    endpoint=os.environ.get('HF_ENDPOINT')))
        except errors.LocalEntryNotFoundError as error:
            raise CheckpointDownloadError(
                f'the hub cannot be reached ({_because(error)})') from error
        except errors.EntryNotFoundError:
            continue
        except (errors.GatedRepoError, errors.RepositoryNotFoundError
                ) as error:
            raise CheckpointDownloadError(
                'there is no such repository, or it needs you to accept its '
                f'terms and log in (`hf auth login`): {_because(error)}'
            ) from error
        # requests or httpx, whichever this huggingface_hub uses.
        except Exception as error:
            raise CheckpointDownloadError(
                f'the download failed ({_because(error)})') from error
    raise CheckpointDownloadError(
        f'{repo} has none of {(file, ) if file else HUB_FILES}; name the file '
        'as hf://org/name/file')


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
            'timm://model.tag') from error
    config = timm.get_pretrained_cfg(name) if re.fullmatch(r'\w+',
                                                           name) else None
    if config is None or not config.tag:
        raise CheckpointDownloadError(
            f'timm has no pretrained model {name!r}; see '
            "timm.list_models('convnext*', pretrained=True)")
    return _fetch_from_hub(f'timm/{name}.{config.tag}')
