"""Remote checkpoints, from servers on loopback."""
import collections
import hashlib
import io
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from convnext_mm import CheckpointError, load_checkpoint
from convnext_mm.checkpoint import CheckpointDownloadError, remote

hub = pytest.importorskip('huggingface_hub')


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files``: path -> bytes or a function of the handler."""

    def answer(self):
        self.server.requests.append(
            (self.command, self.path, self.headers.get('Range')))
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
            headers['Content-Range'] = (f'bytes {start}-{len(content) - 1}/'
                                        f'{len(content)}')
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
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / 'cache'))
    monkeypatch.setattr(remote, 'TIMEOUT', 1)
    monkeypatch.setattr(hub.constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 1)
    monkeypatch.setattr(hub.constants, 'HF_HUB_ETAG_TIMEOUT', 1)
    monkeypatch.setattr(hub.constants, 'DOWNLOAD_CHUNK_SIZE', 1024)
    # Only shortens the waits between retries.
    monkeypatch.setattr(hub.file_download.time, 'sleep', lambda _: None)
    monkeypatch.setenv('HF_HUB_DISABLE_PROGRESS_BARS', '1')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    server.files, server.requests = {}, []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def content(weights):
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def cached(name='*.p*'):
    """Complete files in the cache."""
    return [path for path in remote.cache_dir().rglob('*')
            if path.is_file() and path.name != 'lock'
            and path.suffix != '.incomplete']


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


def half(content):
    """Declares all and gives half; later requests find no more either."""

    def serve(handler):
        if handler.headers.get('Range'):
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.reply(200, content[:len(content) // 2], len(content),
                          ETag='"1"')
            handler.close_connection = True

    return serve


def test_interrupted_download_is_resumed(server, content, weights):
    server.files['/model.pth'] = half(content)
    url = f'{server.url}/model.pth'
    with pytest.raises(CheckpointDownloadError, match='stopped after.*resume'):
        load_checkpoint(url)
    assert not cached()
    server.files['/model.pth'] = lambda handler: handler.send(content,
                                                              ETag='"1"')
    server.requests.clear()
    assert load_checkpoint(url).keys() == weights.keys()
    ranges = [r[2] for r in server.requests if r[0] == 'GET']
    assert len(ranges) == 1
    assert 0 < int(ranges[0][6:-1]) <= len(content) // 2


def test_parts_of_two_versions_are_not_joined(server, content, weights):
    server.files['/model.pth'] = half(content)
    with pytest.raises(CheckpointDownloadError):
        load_checkpoint(f'{server.url}/model.pth')
    server.files['/model.pth'] = lambda handler: handler.send(content,
                                                              ETag='"2"')
    server.requests.clear()
    assert load_checkpoint(f'{server.url}/model.pth').keys() == weights.keys()
    assert [r[2] for r in server.requests if r[0] == 'GET'] == [None]


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


def test_faulty_servers(server, content, record):
    server.files.update(faulty_servers(content))
    outcomes = collections.Counter()
    for path in server.files:
        start = time.time()
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(server.url + path)
        assert time.time() - start < 20, path
        assert server.url + path in str(error.value) or path == '/cut.pth'
        # Truncated on the server: complete as far as a download can tell.
        assert [p.name for p in cached() if p.name != 'cut.pth'] == []
        outcomes[error.type.__name__] += 1
    record('checkpoint_hostile', 'faulty servers', dict(outcomes))


BAD_ADDRESSES = [
    'http://example.invalid/x.pth', 'https://', 'https:///x.pth',
    'https://127.0.0.1:1/x.pth', 'http://127.0.0.1:1/x.pth',
    'https://127.0.0.1:99999/x.pth', 'https://[::1/x.pth',
    'https://exa mple.invalid/x.pth', 'ftp://127.0.0.1/x.pth',
    's3://bucket/x.pth', 'file:///etc/passwd', 'hf://', 'hf://name',
    'hf://../../etc', 'hf://org/name@', 'timm://', 'timm://resnet/../x',
    'timm://no_such_model', 'data://x'
]


def test_bad_addresses(server, record):
    outcomes = collections.Counter()
    for source in BAD_ADDRESSES:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(source)
        assert source in str(error.value)
        outcomes[error.type.__name__] += 1
    assert not cached()
    record('checkpoint_hostile', 'bad addresses', dict(outcomes))


def test_cache_that_cannot_be_written(server, content, monkeypatch):
    server.files['/model.pth'] = content
    monkeypatch.setenv(remote.CACHE_VARIABLE, '/proc/cache')
    with pytest.raises(CheckpointDownloadError, match=remote.CACHE_VARIABLE):
        load_checkpoint(f'{server.url}/model.pth')


def test_without_huggingface_hub(server, content, monkeypatch):
    server.files['/model.pth'] = content
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(CheckpointDownloadError,
                       match='pip install huggingface_hub'):
        load_checkpoint(f'{server.url}/model.pth')


@pytest.fixture
def hub_server(server, content, monkeypatch, tmp_path):
    """A Hugging Face hub with one repository of each kind."""
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    monkeypatch.setattr(hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    digest = hashlib.sha256(content).hexdigest()

    def file(handler):
        handler.send(content, ETag=f'"{digest}"', X_Repo_Commit='a' * 40)

    def no_entry(handler):
        handler.reply(404, b'', X_Error_Code='EntryNotFound',
                      X_Repo_Commit='a' * 40)

    def no_repository(handler):
        handler.reply(404, b'', X_Error_Code='RepoNotFound')

    def gated(handler):
        handler.reply(403, b'', X_Error_Code='GatedRepo')

    for repo in ('org/net', 'timm/convnext_tiny.fb_in1k',
                 'timm/convnext_tiny.in12k_ft_in1k'):
        for name in ('model.safetensors', 'open_clip_model.safetensors'):
            server.files[f'/{repo}/resolve/main/{name}'] = no_entry
        server.files[f'/{repo}/resolve/main/pytorch_model.bin'] = file
    server.files['/org/net/resolve/v1/sub/weights.pth'] = file
    for name in remote.HUB_FILES:
        server.files[f'/org/empty/resolve/main/{name}'] = no_entry
        server.files[f'/org/none/resolve/main/{name}'] = no_repository
        server.files[f'/org/gated/resolve/main/{name}'] = gated
    return server


@pytest.mark.parametrize('source', [
    'hf://org/net', 'hf://org/net/pytorch_model.bin',
    'hf://org/net@v1/sub/weights.pth', 'timm://convnext_tiny.fb_in1k',
    'timm://convnext_tiny'
])
def test_hub(source, hub_server, weights):
    if source == 'timm://convnext_tiny':
        pytest.importorskip('timm')
    for _ in range(2):
        assert load_checkpoint(source).keys() == weights.keys()


@pytest.mark.parametrize('source, reason', [
    ('hf://org/empty', 'has none of'), ('hf://org/none', 'no such repository'),
    ('hf://org/gated', 'accept its terms'),
    ('hf://org/net/model.safetensors', 'has none of'),
    ('hf://org/elsewhere', 'failed|reached|no such')
])
def test_hub_errors(source, reason, hub_server):
    with pytest.raises(CheckpointDownloadError, match=reason):
        load_checkpoint(source)


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


def test_one_process_downloads(server, content, weights, tmp_path):
    server.files['/model.pth'] = content
    (tmp_path / 'worker.py').write_text(WORKER)
    output = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2',
         '--rdzv-backend=c10d', '--rdzv-endpoint=127.0.0.1:0',
         str(tmp_path / 'worker.py'), f'{server.url}/missing.pth',
         f'{server.url}/model.pth'],
        capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).resolve().parents[2]).stdout
    # Where the download fails nobody waits for it.
    assert output.count('CheckpointDownloadError') == 2
    assert output.count(f'loaded {len(weights)};') == 2
    assert [request[:2] for request in server.requests] == [
        ('HEAD', '/missing.pth'), ('HEAD', '/model.pth'),
        ('GET', '/model.pth')]
