"""Downloads over a loopback server and archives made here: every way in which one can be wrong is refused."""

import bz2
import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
import time
import zipfile

import pytest

from research.core.errors import UsageError
from research.data import download

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server(monkeypatch):
    """A loopback server; `server.files` is what it serves, `server.asked` what was asked of it."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            httpd.asked.append(self.path)
            body = httpd.files.get(self.path)
            if not isinstance(body, bytes):
                self.send_error(body or 404)
                return
            self.send_response(200)
            self.send_header('Content-Length', str(len(body) + httpd.missing))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        httpd.files, httpd.asked, httpd.missing = {'/a.bin': CONTENT}, [], 0
        httpd.url = f'http://127.0.0.1:{httpd.server_port}'
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join(5)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def leftovers(folder):
    return sorted(p.name for p in folder.rglob('*') if p.is_file())


def test_fetch_writes_the_content_and_asks_once(server, tmp_path):
    path = tmp_path / 'deep' / 'a.bin'
    for _ in range(2):
        assert download.fetch(f'{server.url}/a.bin', path, sha256=sha(CONTENT), size=len(CONTENT)) == path
    assert path.read_bytes() == CONTENT
    assert server.asked == ['/a.bin']
    assert leftovers(tmp_path) == ['a.bin']


def test_fetch_replaces_a_damaged_file(server, tmp_path):
    (tmp_path / 'a.bin').write_bytes(CONTENT[:-1])
    assert download.fetch(f'{server.url}/a.bin', tmp_path / 'a.bin', sha256=sha(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ('sha256', 'size', 'message'),
    [
        (sha(b'other'), None, 'has SHA-256'),
        (sha(CONTENT), len(CONTENT) + 1, f'has {len(CONTENT)} bytes, expected {len(CONTENT) + 1}'),
        (sha(CONTENT), 10, 'expected 10: it is not the published file'),
    ],
)
def test_fetch_refuses_what_is_not_the_published_file(server, tmp_path, sha256, size, message):
    with pytest.raises(UsageError, match=message):
        download.fetch(f'{server.url}/a.bin', tmp_path / 'a.bin', sha256=sha256, size=size)
    assert leftovers(tmp_path) == []


def test_fetch_stops_reading_what_is_too_long(server, tmp_path):
    server.files['/long'] = bytes(5 * download.BLOCK_BYTES)
    with pytest.raises(UsageError, match=f'has {download.BLOCK_BYTES} bytes, expected 10'):
        download.fetch(f'{server.url}/long', tmp_path / 'a', sha256=sha(CONTENT), size=10)


def test_fetch_names_the_http_error_and_asks_once(server, tmp_path):
    with pytest.raises(UsageError, match=r'HTTP 404 Not Found\n  fix: do this'):
        download.fetch(f'{server.url}/none', tmp_path / 'a', sha256=sha(b''), fix='do this')
    assert server.asked == ['/none']


def test_fetch_retries_a_busy_server_and_a_torn_transfer(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, 'sleep', lambda _: None)
    server.files['/busy'] = 503
    with pytest.raises(UsageError, match='HTTP 503'):
        download.fetch(f'{server.url}/busy', tmp_path / 'a', sha256=sha(b''))
    server.missing = 5
    with pytest.raises(UsageError, match='IncompleteRead'):
        download.fetch(f'{server.url}/a.bin', tmp_path / 'a', sha256=sha(CONTENT))
    assert server.asked == ['/busy'] * 3 + ['/a.bin'] * 3
    assert leftovers(tmp_path) == []


def test_fetch_without_network_answers_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(download.time, 'sleep', lambda _: pytest.fail('it tried again'))
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        port = taken.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(UsageError, match='Connection refused'):
        download.fetch(f'http://127.0.0.1:{port}/a', tmp_path / 'a', sha256=sha(b''))
    assert time.monotonic() - start < 2


def test_fetch_refuses_other_schemes(tmp_path):
    (tmp_path / 'secret').write_text('x')
    with pytest.raises(UsageError, match='only http and https'):
        download.fetch(f'file://{tmp_path}/secret', tmp_path / 'a', sha256=sha(b'x'))


def make_tar(path, members):
    """A .tar.gz of (name, bytes) or (name, TarInfo type, link target)."""
    with tarfile.open(path, 'w:gz') as tar:
        for name, *what in members:
            member = tarfile.TarInfo(name)
            if len(what) == 1:
                member.size = len(what[0])
                tar.addfile(member, io.BytesIO(what[0]))
            else:
                member.type, member.linkname = what
                tar.addfile(member)
    return path


def test_extract_tar_and_zip_round_trip(tmp_path):
    files = {'d/a.txt': b'one', 'd/e/b.txt': b'two'}
    archive = make_tar(tmp_path / 'a.tar.gz', list(files.items()))
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    for source in (archive, tmp_path / 'a.zip'):
        folder = download.extract(source, tmp_path / f'out-{source.suffix}')
        assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()} == files


def test_extract_single_files(tmp_path):
    (tmp_path / 'a.gz').write_bytes(gzip.compress(CONTENT))
    (tmp_path / 'a.bz2').write_bytes(bz2.compress(CONTENT))
    assert download.extract(tmp_path / 'a.gz', tmp_path / 'x').read_bytes() == CONTENT
    assert download.extract(tmp_path / 'a.bz2', tmp_path / 'y').read_bytes() == CONTENT


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ([('ok', b'1'), ('../evil', b'2')], 'leaves the folder'),
        ([('/abs/evil', b'2')], 'leaves the folder'),
        ([('link', tarfile.SYMTYPE, '/etc'), ('link/evil', b'2')], 'is a link or a device'),
        ([('link', tarfile.LNKTYPE, '../evil')], 'is a link or a device'),
        ([('fifo', tarfile.FIFOTYPE, '')], 'is a link or a device'),
    ],
)
def test_extract_refuses_a_hostile_tar(tmp_path, members, message):
    inner = tmp_path / 'inner'
    inner.mkdir()
    archive = make_tar(inner / 'a.tgz', members)
    with pytest.raises(UsageError, match=message):
        download.extract(archive, inner / 'out')
    assert leftovers(tmp_path) == ['a.tgz']


def test_extract_refuses_a_hostile_zip(tmp_path):
    for name, mode, message in (('../evil', 0, 'leaves the folder'), ('link', 0o120777, 'is a link')):
        with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as zipped:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            zipped.writestr(member, '/etc/passwd')
        with pytest.raises(UsageError, match=message):
            download.extract(tmp_path / 'a.zip', tmp_path / 'out')
        assert leftovers(tmp_path) == ['a.zip']


def test_extract_refuses_bombs(tmp_path, monkeypatch):
    zeros = bytes(100_000)
    make_tar(tmp_path / 'a.tar.gz', [('z', zeros)])
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr('z', zeros)
    (tmp_path / 'a.gz').write_bytes(gzip.compress(zeros))
    for name in ('a.tar.gz', 'a.zip', 'a.gz'):
        with pytest.raises(UsageError, match='more than the disk has free, or more than is allowed'):
            download.extract(tmp_path / name, tmp_path / 'out', max_bytes=len(zeros) - 1)
        download.extract(tmp_path / name, tmp_path / f'{name}-fits', max_bytes=len(zeros))
    monkeypatch.setattr(download, 'MAX_MEMBERS', 0)
    with pytest.raises(UsageError, match='more than 0 members'):
        download.extract(tmp_path / 'a.tar.gz', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['a.tar.gz', 'a.zip', 'a.gz', 'a.bz2'])
def test_extract_names_a_damaged_archive(tmp_path, name):
    whole = {'a.gz': gzip.compress(CONTENT), 'a.bz2': bz2.compress(CONTENT)}.get(name)
    if name == 'a.tar.gz':
        whole = make_tar(tmp_path / 'whole.tgz', [('a', CONTENT)]).read_bytes()
    (tmp_path / name).write_bytes((whole or b'PK' * 50)[: -len(whole or '') // 2])
    with pytest.raises(UsageError, match=f'{name} cannot be unpacked'):
        download.extract(tmp_path / name, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_extract_refuses_an_unknown_kind(tmp_path):
    with pytest.raises(UsageError, match=r'a\.rar is not an archive that can be unpacked'):
        download.extract(tmp_path / 'a.rar', tmp_path / 'out')
