"""Remote checkpoints, from servers on loopback."""

import errno
import hashlib
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors.torch import save as save_safetensors

from convnext_mm import CheckpointError, load_checkpoint
from convnext_mm.checkpoint import CheckpointDownloadError, remote


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files``: path -> bytes or a function of the handler."""

    def answer(self):
        self.server.requests.append(
            (self.command, self.path, self.headers.get('Range'))
        )
        content = self.server.files.get(self.path)
        if callable(content):
            content(self)
        elif content is None:
            self.reply(404, b'<html>not found</html>')
        else:
            self.send(content)

    do_GET = do_HEAD = answer

    def send(self, content, **headers):
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        if start:
            headers['Content-Range'] = (
                f'bytes {start}-{len(content) - 1}/{len(content)}'
            )
        self.reply(206 if start else 200, content[start:], **headers)

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header('Content-Length', str(length or len(body)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, 'TIMEOUT', 1)
    monkeypatch.setenv(remote.QUIET_VARIABLE, '1')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    server.files, server.requests = {}, []
    server.cache = str(tmp_path / 'cache')
    server.url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setenv(remote.CACHE_VARIABLE, server.cache)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def content(weights):
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def cached():
    """Complete files in the cache."""
    return [
        path
        for path in remote.cache_dir().rglob('*')
        if path.is_file() and path.suffix not in ('.lock', '.incomplete')
    ]


def partial():
    """Interrupted downloads in the cache."""
    return list(remote.cache_dir().rglob('*.incomplete'))


@pytest.fixture
def log(log_of):
    """Messages about downloads."""
    return log_of(remote)


def test_download_and_cache(server, content, weights):
    server.files['/a/model.pth'] = content
    for _ in range(2):
        state = load_checkpoint(f'{server.url}/a/model.pth')
        assert state.keys() == weights.keys()
    assert len([r for r in server.requests if r[0] == 'GET']) == 1
    # Another address with the same file name is another file.
    server.files['/b/model.pth'] = b'PK' + content
    with pytest.raises(CheckpointError):
        load_checkpoint(f'{server.url}/b/model.pth')
    assert len(cached()) == 1


@pytest.mark.parametrize('right', [True, False])
def test_hash_in_the_name(right, server, content):
    digest = hashlib.sha256(content).hexdigest()[:8] if right else 'deadbeef'
    server.files[f'/net-{digest}.pth'] = content
    if right:
        assert load_checkpoint(f'{server.url}/net-{digest}.pth')
    else:
        with pytest.raises(CheckpointDownloadError, match='SHA-256.*deadbeef'):
            load_checkpoint(f'{server.url}/net-{digest}.pth')
        assert not cached()


def test_a_date_in_the_name_is_no_hash(server, content):
    server.files['/net-20220301.pth'] = content
    assert load_checkpoint(f'{server.url}/net-20220301.pth')


@pytest.mark.parametrize('gone', [False, True])
def test_changed_file_in_the_cache(gone, server, content, weights, log):
    path = f'/net-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    server.files[path] = content
    load_checkpoint(server.url + path)
    cached()[0].write_bytes(content[:-1] + b'x')
    if gone:
        del server.files[path]
        with pytest.raises(CheckpointDownloadError, match='404'):
            load_checkpoint(server.url + path)
        assert not cached()
    else:
        state = load_checkpoint(server.url + path)
        assert state.keys() == weights.keys()
        assert cached()[0].read_bytes() == content
    assert len(log) == 1 and 'SHA-256' in log[0] and 'again' in log[0]


@pytest.mark.parametrize(
    'path, name',
    [
        ('/a/lock', 'lock'),
        ('/a/..', '_'),
        ('/%2e%2E', '_'),
        ('/', 'checkpoint'),
        ('/a/%2Fb%0A%1b.pth', 'b__.pth'),
        ('/' + '%C3%BC' * 200 + '.pth', None),
    ],
)
def test_names_in_the_cache(path, name, server, content):
    server.files[path] = content
    for _ in range(2):
        assert load_checkpoint(server.url + path)
    assert cached()[0].name == (name or cached()[0].name)


@pytest.mark.parametrize('quiet', [False, True])
def test_progress(quiet, server, content, monkeypatch, capfd):
    monkeypatch.setenv(remote.QUIET_VARIABLE, 'yes' if quiet else '0')
    server.files['/model.pth'] = content
    remote.fetch(f'{server.url}/model.pth')
    output = capfd.readouterr().err
    if quiet:
        assert output == ''
    else:
        assert re.search(r'model.pth .*\d+\.\d/\d+\.\d kB.*/s', output)


def half(content, **headers):
    """Declares all and gives half; later requests find no more either."""

    def serve(handler):
        if handler.headers.get('Range'):
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.reply(
                200,
                content[: len(content) // 2],
                len(content),
                **(headers or {'ETag': '"1"'}),
            )
            handler.close_connection = True

    return serve


def test_interrupted_download_is_resumed(server, content, weights):
    server.files['/model.pth'] = half(content)
    url = f'{server.url}/model.pth'
    with pytest.raises(CheckpointDownloadError, match='stopped after.*resume'):
        load_checkpoint(url)
    assert not cached()
    server.files['/model.pth'] = lambda handler: handler.send(content, ETag='"1"')
    server.requests.clear()
    assert load_checkpoint(url).keys() == weights.keys()
    # The first one asks for the version only.
    ranges = [r[2] for r in server.requests if r[0] == 'GET']
    assert len(ranges) == 2 and ranges[0] is None
    assert 0 < int(ranges[1][6:-1]) <= len(content) // 2
    assert cached()[0].read_bytes() == content and not partial()


def test_parts_of_two_versions_are_not_joined(server, content, weights):
    server.files['/model.pth'] = half(content)
    with pytest.raises(CheckpointDownloadError):
        load_checkpoint(f'{server.url}/model.pth')
    server.files['/model.pth'] = lambda handler: handler.send(content, ETag='"2"')
    server.requests.clear()
    assert load_checkpoint(f'{server.url}/model.pth').keys() == weights.keys()
    assert [r[2] for r in server.requests if r[0] == 'GET'] == [None]
    assert cached()[0].read_bytes() == content and not partial()


@pytest.mark.parametrize(
    'answer', ['whole', 'other version', 'no version', 'other place', 'other size']
)
def test_parts_that_do_not_fit_are_not_joined(answer, server, content):
    server.files['/model.pth'] = half(content)
    with pytest.raises(CheckpointDownloadError):
        load_checkpoint(f'{server.url}/model.pth')

    def serve(handler):
        start = int((handler.headers.get('Range') or 'bytes=0-')[6:-1])
        if not start or answer == 'whole':
            handler.reply(200, content, ETag='"1"')
            return
        headers = {
            'ETag': {'other version': '"2"', 'no version': ''}.get(answer, '"1"'),
            'Content-Range': 'bytes {}-{}/{}'.format(
                start + (answer == 'other place'),
                len(content) - 1,
                len(content) + (answer == 'other size'),
            ),
        }
        handler.reply(206, b'x' * (len(content) - start), **headers)

    server.files['/model.pth'] = serve
    load_checkpoint(f'{server.url}/model.pth')
    assert cached()[0].read_bytes() == content and not partial()


@pytest.mark.parametrize(
    'headers, kept',
    [
        ({'ETag': '"1"'}, True),
        ({'ETag': 'W/"1"'}, False),
        ({'X': 'y'}, False),
        ({'Last-Modified': 'Sun, 06 Nov 1994 08:49:37 GMT'}, True),
    ],
)
def test_only_what_can_be_resumed_is_kept(headers, kept, server, content):
    server.files['/model.pth'] = half(content, **headers)
    with pytest.raises(CheckpointDownloadError):
        load_checkpoint(f'{server.url}/model.pth')
    assert len(partial()) == kept


@pytest.mark.parametrize('headers', [{'ETag': '"1"'}, {'X': 'y'}])
def test_full_disk(headers, server, content, monkeypatch):

    class FullDisk(io.FileIO):
        def write(self, data):
            super().write(data[:10000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    url = f'{server.url}/model.pth'
    server.files['/model.pth'] = lambda handler: handler.send(content, **headers)
    monkeypatch.setattr(remote, 'open', FullDisk, raising=False)
    with pytest.raises(
        CheckpointDownloadError, match=f'No space left.*{remote.CACHE_VARIABLE}.*room'
    ):
        load_checkpoint(url)
    assert not cached() and len(partial()) == ('ETag' in headers)
    monkeypatch.undo()
    monkeypatch.setenv(remote.CACHE_VARIABLE, server.cache)
    load_checkpoint(url)
    assert cached()[0].read_bytes() == content and not partial()


def test_server_that_answers_downloads_only(server, content, weights):
    def no_head(handler):
        if handler.command == 'HEAD':
            handler.reply(405, b'')
        else:
            handler.send(content)

    server.files['/model.pth'] = no_head
    assert load_checkpoint(f'{server.url}/model.pth').keys() == weights.keys()


def redirect(where):
    return lambda handler: handler.reply(302, b'', Location=where)


@pytest.mark.parametrize(
    'target',
    [
        'http://example.invalid/x.pth',
        'http://example.invalid/hop',
        '//example.invalid/x.pth',
        'ftp://127.0.0.1/x.pth',
        'file:///x.pth',
        'data:,x',
        'http://localhost@example.invalid/',
        'http://[::1].invalid/',
        'http://localhost.example.invalid/',
        'http://example.invalid\\@localhost/',
        'HTTP://example.invalid/x.pth',
    ],
)
@pytest.mark.parametrize('head', ['redirected', 'answered', 'not allowed'])
def test_no_hop_is_unprotected(head, target, server, content, monkeypatch):
    # As a proxy the server is asked for every plain address, and would answer.
    monkeypatch.setenv('http_proxy', server.url)
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    def first(handler):
        if handler.command == 'HEAD' and head != 'redirected':
            handler.reply(200 if head == 'answered' else 405, b'')
        else:
            handler.reply(302, b'', Location='/second.pth')

    server.files.update(
        {
            '/first.pth': first,
            '/second.pth': redirect(target),
            '/model.pth': content,
            'http://example.invalid/x.pth': content,
            'http://example.invalid/hop': redirect(f'{server.url}/model.pth'),
        }
    )
    # Newer Pythons find some of these malformed before we ask for https.
    said = 'https|not allowed|Invalid IPv6'
    with pytest.raises(CheckpointDownloadError, match=said):
        load_checkpoint(f'{server.url}/first.pth')
    assert {r[1] for r in server.requests} == {'/first.pth', '/second.pth'}
    assert not cached() and not partial()


@pytest.mark.parametrize('url', ['https://[::1/x.pth', 'https://h\u2100st/x.pth'])
def test_an_address_that_is_none(url):
    with pytest.raises(CheckpointDownloadError, match='not an address .* looks like'):
        load_checkpoint(url)


@pytest.mark.parametrize('code', [301, 302, 303, 307, 308])
def test_redirects_are_followed(code, server, content, weights):
    server.files['/model.pth'] = content
    server.files['/there.pth'] = lambda handler: handler.reply(
        code, b'', Location='/model.pth'
    )
    assert load_checkpoint(f'{server.url}/there.pth').keys() == weights.keys()


def faulty_servers(content):
    def silent(handler):
        time.sleep(3)

    def stalls(handler):
        handler.reply(200, content[:1000], len(content))
        if handler.command == 'GET':
            handler.wfile.flush()
            time.sleep(3)

    def closes(handler):
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    def nonsense(handler):
        handler.wfile.write(b'220 smtp ready\r\n')

    def status(code):
        return lambda handler: handler.reply(code, b'no')

    return {
        '/missing.pth': None,
        '/gone.pth': status(410),
        '/forbidden.pth': status(403),
        '/login.pth': status(401),
        '/broken.pth': status(500),
        '/busy.pth': status(503),
        '/page.pth': b'<!DOCTYPE html><html>Sign in</html>',
        '/page-without-type.pth': b'<html>Sign in</html>',
        '/empty.pth': b'',
        '/text.pth': b'moved',
        '/loop.pth': redirect('/loop.pth'),
        '/loop-1.pth': redirect('/loop-2.pth'),
        '/loop-2.pth': redirect('/loop-1.pth'),
        '/elsewhere.pth': redirect('http://example.invalid/x.pth'),
        '/to-file.pth': redirect('file:///etc/passwd'),
        '/to-nothing.pth': redirect(''),
        '/half.pth': half(content),
        '/silent.pth': silent,
        '/stalls.pth': stalls,
        '/closes.pth': closes,
        '/nonsense.pth': nonsense,
        '/net-0123456789ab.pth': content,
        '/weights.pth.gz': b'\x1f\x8b' + content,
        '/cut.pth': content[:-100],
    }


def test_faulty_servers(server, content):
    server.files.update(faulty_servers(content))
    for path in server.files:
        start = time.time()
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(server.url + path)
        assert time.time() - start < 20, path
        assert server.url + path in str(error.value) or path == '/cut.pth'
        # Truncated on the server: complete as far as a download can tell.
        assert [p.name for p in cached() if p.name != 'cut.pth'] == []


BAD_ADDRESSES = [
    'http://example.invalid/x.pth',
    'https://',
    'https:///x.pth',
    'https://127.0.0.1:1/x.pth',
    'http://127.0.0.1:1/x.pth',
    'https://127.0.0.1:99999/x.pth',
    'https://[::1/x.pth',
    'https://exa mple.invalid/x.pth',
    'ftp://127.0.0.1/x.pth',
    's3://bucket/x.pth',
    'file:///etc/passwd',
    'hf://',
    'hf://name',
    'hf://../../etc',
    'hf://org/name@',
    'timm://',
    'timm://resnet/../x',
    'timm://no_such_model',
    'data://x',
    'https://\xfc.invalid/\xfc.pth',
]


def test_bad_addresses(server):
    for source in BAD_ADDRESSES:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(source)
        assert source in str(error.value)
    assert not cached()


UNPRINTABLE = [
    'https://127.0.0.1:1/a\n\x1b[2Jb.pth',
    'https://127.0.0.1:1/\0.pth',
    'https://127.0.0.1:1/\udcff.pth',
    'https://127.0.0.1:1\r\nHost: x/a.pth',
    'http://example.invalid/\x1b',
    'x\ny://a',
    'hf://org/name/a\nb',
    'hf://org/name/\x1b\0',
    'timm://a\nb',
    'timm://\x1b',
    '~nosuchuser/\x1b.pth',
]


@pytest.mark.parametrize('source', UNPRINTABLE)
def test_messages_are_printable(source, server, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(source)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    'reply',
    [
        b'HTTP/1.0 302 \x1b[2J\r\nLocation: http://h/\x1b[2J\r\n\r\n',
        b'HTTP/1.0 404 \x1b[2J\r\n\r\n',
        b'\x1b[2J\r\n\r\n',
    ],
)
def test_messages_of_servers_are_printable(reply, server):
    server.files['/x.pth'] = lambda handler: handler.wfile.write(reply)
    with pytest.raises(CheckpointDownloadError) as error:
        load_checkpoint(f'{server.url}/x.pth')
    assert str(error.value).isprintable()


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))

    class Bytes(PurePosixPath):
        def __fspath__(self):
            return b'/a/\xff.pth'

    assert remote.fetch(Bytes()) == Path('/a/\udcff.pth')
    assert remote.fetch('~/x.pth') == tmp_path / 'x.pth'
    with pytest.raises(CheckpointError, match='full path'):
        remote.fetch('~nosuchuser/x.pth')


def test_cache_in_no_home_folder(server, monkeypatch):
    monkeypatch.setenv(remote.CACHE_VARIABLE, '~nosuchuser/x')
    with pytest.raises(CheckpointDownloadError, match=remote.CACHE_VARIABLE):
        load_checkpoint(f'{server.url}/model.pth')


@pytest.mark.parametrize('killed', [False, True])
def test_another_process_downloads(killed, server, content, weights, log):
    url = f'{server.url}/model.pth'
    with pytest.raises(CheckpointDownloadError):
        load_checkpoint(url)
    (lock,) = remote.cache_dir().rglob('*.lock')
    server.files['/model.pth'] = content
    owner = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'import filelock, sys\n'
            'with filelock.FileLock(sys.argv[1]):\n'
            '    print(flush=True)\n'
            '    input()',
            lock,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    owner.stdout.readline()
    if killed:
        owner.kill()
        owner.wait()
    timer = threading.Timer(1, owner.communicate)
    timer.start()
    start = time.time()
    assert load_checkpoint(url).keys() == weights.keys()
    timer.join()
    assert (time.time() - start > 0.9) or killed
    assert [m for m in log if 'waiting' in m] == log and len(log) != killed


def test_cache_that_cannot_be_written(server, content, monkeypatch):
    server.files['/model.pth'] = content
    monkeypatch.setenv(remote.CACHE_VARIABLE, '/proc/cache')
    with pytest.raises(CheckpointDownloadError, match=remote.CACHE_VARIABLE):
        load_checkpoint(f'{server.url}/model.pth')


def test_without_huggingface_hub(server, content, weights, monkeypatch):
    server.files['/model.pth'] = content
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert load_checkpoint(f'{server.url}/model.pth').keys() == weights.keys()
    with pytest.raises(CheckpointDownloadError, match='pip install huggingface_hub'):
        load_checkpoint('hf://org/name')


@pytest.fixture
def hub_server(server, content, monkeypatch, tmp_path):
    """A Hugging Face hub with one repository of each kind."""
    hub = pytest.importorskip('huggingface_hub')
    monkeypatch.setattr(hub.constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 1)
    monkeypatch.setattr(hub.constants, 'HF_HUB_ETAG_TIMEOUT', 1)
    monkeypatch.setattr(hub.constants, 'DOWNLOAD_CHUNK_SIZE', 1024)
    # Only shortens the waits between retries.
    monkeypatch.setattr(hub.file_download.time, 'sleep', lambda _: None)
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    monkeypatch.setattr(hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    digest = hashlib.sha256(content).hexdigest()

    def file(handler):
        handler.send(content, ETag=f'"{digest}"', X_Repo_Commit='a' * 40)

    def no_entry(handler):
        handler.reply(404, b'', X_Error_Code='EntryNotFound', X_Repo_Commit='a' * 40)

    def no_repository(handler):
        handler.reply(404, b'', X_Error_Code='RepoNotFound')

    def gated(handler):
        handler.reply(403, b'', X_Error_Code='GatedRepo')

    for repo in (
        'org/net',
        'timm/convnext_tiny.fb_in1k',
        'timm/convnext_tiny.in12k_ft_in1k',
    ):
        for name in ('model.safetensors', 'open_clip_model.safetensors'):
            server.files[f'/{repo}/resolve/main/{name}'] = no_entry
        server.files[f'/{repo}/resolve/main/pytorch_model.bin'] = file
    server.files['/org/net/resolve/v1/sub/weights.pth'] = file
    for name in remote.HUB_FILES:
        server.files[f'/org/empty/resolve/main/{name}'] = no_entry
        server.files[f'/org/none/resolve/main/{name}'] = no_repository
        server.files[f'/org/gated/resolve/main/{name}'] = gated
    return server


@pytest.mark.parametrize(
    'source',
    [
        'hf://org/net',
        'hf://org/net/pytorch_model.bin',
        'hf://org/net@v1/sub/weights.pth',
        'timm://convnext_tiny.fb_in1k',
        'timm://convnext_tiny',
    ],
)
def test_hub(source, hub_server, weights):
    if source == 'timm://convnext_tiny':
        pytest.importorskip('timm')
    for _ in range(2):
        assert load_checkpoint(source).keys() == weights.keys()


@pytest.mark.parametrize(
    'source, reason',
    [
        ('hf://org/empty', 'has none of'),
        ('hf://org/none', 'no such repository'),
        ('hf://org/gated', 'accept its terms'),
        ('hf://org/net/model.safetensors', 'has none of'),
        ('hf://org/elsewhere', 'failed|reached|no such'),
    ],
)
def test_hub_errors(source, reason, hub_server):
    with pytest.raises(CheckpointDownloadError, match=reason):
        load_checkpoint(source)


def test_unprotected_hub(hub_server, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://example.invalid')
    with pytest.raises(CheckpointDownloadError, match='is not https'):
        load_checkpoint('hf://org/net')


WORKER = """
import sys, torch
from convnext_mm import CheckpointError, load_checkpoint
torch.distributed.init_process_group('gloo')
for source in sys.argv[1:]:
    try:
        print(f'loaded {len(load_checkpoint(source))};')
    except CheckpointError as error:
        print(type(error).__name__)
"""


def run_two(script, folder, *args):
    (folder / 'worker.py').write_text(script)
    return subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--nproc-per-node=2',
            '--rdzv-backend=c10d',
            '--rdzv-endpoint=127.0.0.1:0',
            '--local-addr=127.0.0.1',  # the host's name may not resolve
            str(folder / 'worker.py'),
            *args,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).resolve().parents[2],
    ).stdout


@pytest.mark.slow
def test_one_process_downloads(server, weights, tmp_path):
    server.files['/model.safetensors'] = save_safetensors(weights)
    sources = (f'{server.url}/{name}.safetensors' for name in ('missing', 'model'))
    output = run_two(WORKER, tmp_path, *sources)
    # Where the download fails nobody waits for it.
    assert output.count('CheckpointDownloadError') == 2
    assert output.count(f'loaded {len(weights)};') == 2
    assert [request[:2] for request in server.requests] == [
        ('GET', '/missing.safetensors'),
        ('GET', '/model.safetensors'),
    ]


# On one machine the first process fails, then of two machines the second.
FAILING_WORKER = """
import os, sys, torch
from convnext_mm.checkpoint import remote
torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()

def download(url, path):
    if rank == culprit:
        raise RuntimeError('broken')
    path.touch()

remote._download = download
os.environ['CONVNEXT_MM_CACHE'] = f'{sys.argv[1]}/{rank}'
for culprit in (0, 1):
    try:
        remote.fetch('https://example.invalid/x.pth')
    except Exception as error:
        print(f'{culprit} {rank} {type(error).__name__}: {error};')
    os.environ['LOCAL_RANK'] = '0'
"""


@pytest.mark.slow
def test_every_failure_reaches_the_others(tmp_path):
    output = run_two(FAILING_WORKER, tmp_path, str(tmp_path))
    text = (
        'CheckpointDownloadError: https://example.invalid/x.pth: RuntimeError: broken'
    )
    assert sorted(re.findall(r'\d \d \w+Error:[^;]*', output)) == [
        '0 0 RuntimeError: broken',
        f'0 1 {text}',
        f'1 0 {text}',
        '1 1 RuntimeError: broken',
    ]
