"""Downloads over a loopback server and archives made here: every way in which one can be wrong is refused."""

import bz2
import contextlib
import gzip
import hashlib
import http.server
import io
import os
import random
import signal
import socket
import stat
import subprocess
import sys
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


def vars_of(member, changes):
    for name, value in changes.items():
        setattr(member, name, value)


def make_tar(path, members):
    """A .tar.gz of (name, bytes), (name, bytes, changes of its TarInfo), or (name, TarInfo type, link target)."""
    with tarfile.open(path, 'w:gz') as tar:
        for name, *what in members:
            member = tarfile.TarInfo(name)
            if isinstance(what[-1], dict):
                vars_of(member, what.pop())
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
        ([('null', tarfile.CHRTYPE, '')], 'is a link or a device'),
        ([('sda', tarfile.BLKTYPE, '')], 'is a link or a device'),
        ([('new', b'x', {'type': b'Z'})], 'is a link or a device'),
        ([('a\\..\\..\\evil', b'2')], 'leaves the folder'),
        ([('d/../../evil', b'2')], 'leaves the folder'),
        ([('n' * 300, b'2')], 'File name too long'),
        ([('a', b'1'), ('a', b'2')], 'is there twice'),
        ([('a', b'1'), ('./a', b'2')], 'is there twice'),
        ([('d/a', b'1'), ('d//a', b'2')], 'is there twice'),
        ([('a', b'1'), ('a/b', b'2')], 'is there twice'),
        ([('a/b', b'1'), ('a', b'2')], 'is there twice'),
        ([('a', b'1'), ('a', tarfile.DIRTYPE, '')], 'is there twice'),
        ([('.', b'1')], 'is there twice'),
        ([('n' * (download.MAX_HEADER_BYTES + 1), b'')], r'a header of \d+ bytes'),
        ([('a', b'', {'pax_headers': {'size': '-512'}})], "'a' has -512 bytes"),
        ([('a', b'', {'pax_headers': {'comment': 'c' * download.MAX_HEADER_BYTES}})], r'a header of \d+ bytes'),
    ],
)
def test_extract_refuses_a_hostile_tar(tmp_path, members, message):
    inner = tmp_path / 'inner'
    inner.mkdir()
    archive = make_tar(inner / 'a.tgz', members)
    with pytest.raises(UsageError, match=message):
        download.extract(archive, inner / 'out')
    assert leftovers(tmp_path) == ['a.tgz']


@pytest.mark.parametrize(
    ('names', 'mode', 'message'),
    [
        (['../evil'], 0, 'leaves the folder'),
        (['/evil'], 0, 'leaves the folder'),
        (['d/../../evil'], 0, 'leaves the folder'),
        (['d\\..\\..\\evil'], 0, 'leaves the folder'),
        (['link'], 0o120777, 'is a link or a device'),
        (['fifo'], 0o010644, 'is a link or a device'),
        (['disk'], 0o060644, 'is a link or a device'),
        (['a', 'a'], 0o100644, 'is there twice'),
        (['a', './a'], 0o100644, 'is there twice'),
        (['a', 'a/b'], 0o100644, 'is there twice'),
    ],
)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_extract_refuses_a_hostile_zip(tmp_path, names, mode, message):
    inner = tmp_path / 'inner'
    inner.mkdir()
    with zipfile.ZipFile(inner / 'a.zip', 'w') as zipped:
        for name in names:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            zipped.writestr(member, '/etc/passwd')
    with pytest.raises(UsageError, match=message):
        download.extract(inner / 'a.zip', inner / 'out')
    assert leftovers(tmp_path) == ['a.zip']


def test_extract_lets_folders_come_again(tmp_path):
    folders = [('d', tarfile.DIRTYPE, ''), ('./', tarfile.DIRTYPE, '')] * 2
    archive = make_tar(tmp_path / 'a.tgz', [*folders, ('d/a', b'1'), ('./d/b', b'2'), ('d', tarfile.DIRTYPE, '')])
    assert leftovers(download.extract(archive, tmp_path / 'out')) == ['a', 'b']


def test_extract_gives_nobody_rights(tmp_path):
    """Neither the set-user-id bits, nor the right to write for others, nor an owner, come out of an archive."""
    files = [(f'{mode:o}', b'#!', {'mode': mode, 'uid': 12345, 'gid': 12345}) for mode in (0o6755, 0o777, 0o1666, 0o000)]
    folder = download.extract(make_tar(tmp_path / 'a.tgz', [*files, ('d', tarfile.DIRTYPE, '')]), tmp_path / 'tar')
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as zipped:
        member = zipfile.ZipInfo('z')
        member.external_attr = (stat.S_IFREG | 0o6777) << 16
        zipped.writestr(member, '#!')
    unzipped = download.extract(tmp_path / 'a.zip', tmp_path / 'zip')
    found = [*folder.rglob('*'), *unzipped.rglob('*')]
    assert len(found) == 6
    for path in found:
        assert not path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX | stat.S_IWGRP | stat.S_IWOTH), path
        assert path.stat().st_uid == os.getuid(), path
        assert os.access(path, os.R_OK | os.W_OK), path


def test_extract_survives_a_size_that_lies(tmp_path):
    """A zip whose directory announces 10 bytes of a 100,000 byte member gives no more than these, and is refused."""
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr('z', bytes(100_000))
    data = (tmp_path / 'a.zip').read_bytes()
    (tmp_path / 'a.zip').write_bytes(data.replace((100_000).to_bytes(4, 'little'), (10).to_bytes(4, 'little')))
    with pytest.raises(UsageError, match='Bad CRC'):
        download.extract(tmp_path / 'a.zip', tmp_path / 'out')
    assert leftovers(tmp_path) == ['a.zip']


def test_extract_refuses_a_tar_that_is_cut_off_between_its_members(tmp_path):
    """tarfile takes that for the end, and a header with a wrong checksum too: the rest would be missing in silence."""
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name in 'abc':
            member = tarfile.TarInfo(name)
            member.size = 600
            tar.addfile(member, io.BytesIO(bytes(600)))
    whole = (tmp_path / 'a.tar').read_bytes()
    block = tarfile.BLOCKSIZE
    damaged = bytearray(whole)
    damaged[3 * block + 5] ^= 1  # in the name of the second member
    for content in (whole[: 3 * block], whole[: 6 * block], whole[: 9 * block], bytes(damaged), whole[: 6 * block + 100]):
        (tmp_path / 'a.tar').write_bytes(content)
        with pytest.raises(UsageError, match='it has no end: it is cut off or damaged'):
            download.extract(tmp_path / 'a.tar', tmp_path / 'out')
        assert leftovers(tmp_path) == ['a.tar']
    (tmp_path / 'a.tar').write_bytes(whole[: 10 * block])  # one block of zeros is an end
    assert leftovers(download.extract(tmp_path / 'a.tar', tmp_path / 'out')) == ['a', 'b', 'c']


def test_extract_reads_the_checksum_behind_the_end_of_a_tar_and_not_for_ever(tmp_path):
    whole = make_tar(tmp_path / 'a.tgz', [('a', CONTENT)]).read_bytes()
    (tmp_path / 'a.tgz').write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    with pytest.raises(UsageError, match='CRC check failed'):
        download.extract(tmp_path / 'a.tgz', tmp_path / 'out')
    bomb = gzip.compress(gzip.decompress(whole) + bytes(download.MAX_TAIL_BYTES + (1 << 20)), 1)
    (tmp_path / 'a.tgz').write_bytes(bomb)
    with pytest.raises(UsageError, match='bytes behind its end'):
        download.extract(tmp_path / 'a.tgz', tmp_path / 'out')
    assert leftovers(tmp_path) == ['a.tgz']


def test_extract_names_a_zip_with_a_password(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as zipped:
        zipped.writestr('z', b'1')
    data = bytearray((tmp_path / 'a.zip').read_bytes())
    data[data.index(b'PK\x01\x02') + 8] |= 1  # the flag of an encrypted member
    data[6] |= 1
    (tmp_path / 'a.zip').write_bytes(data)
    with pytest.raises(UsageError, match='password required'):
        download.extract(tmp_path / 'a.zip', tmp_path / 'out')


def test_extract_leaves_a_full_disk_to_the_disk(tmp_path, monkeypatch):
    """It is not the archive that is damaged."""

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(tarfile.TarFile, 'extract', full)
    with pytest.raises(OSError, match='No space left'):
        download.extract(make_tar(tmp_path / 'a.tgz', [('a', b'1')]), tmp_path / 'out')
    assert leftovers(tmp_path) == ['a.tgz']


@pytest.mark.parametrize('kind', ['tar', 'tar.gz', 'tar.bz2', 'tar.xz', 'zip', 'gz', 'bz2'])
def test_extract_of_any_damage_is_whole_or_refused(tmp_path, kind):
    """Random bytes changed, cut out and doubled: a UsageError or a folder, never another error, never a part."""
    draw = random.Random(kind)
    archive = tmp_path / f'a.{kind}'
    if kind.startswith('tar'):
        with tarfile.open(archive, f'w:{kind[4:]}', format=tarfile.PAX_FORMAT) as tar:
            for name in ('a', 'd/' + 'b' * 120, 'é'):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = 600, 1.5
                tar.addfile(member, io.BytesIO(bytes(draw.choices(range(256), k=600))))
    elif kind == 'zip':
        with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as zipped:
            for name in ('a', 'd/b', 'é'):
                zipped.writestr(name, bytes(draw.choices(range(256), k=600)))
    else:
        archive.write_bytes({'gz': gzip, 'bz2': bz2}[kind].compress(bytes(draw.choices(range(256), k=600))))
    whole, refused = archive.read_bytes(), 0
    for i in range(120):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.choice([0, 1, 1, 1, 40])] = draw.choice([b'', b'\xff', b'-', bytes([draw.randrange(256)])])
        archive.write_bytes(data)
        with contextlib.suppress(UsageError):
            download.extract(archive, tmp_path / f'out{i}', max_bytes=1 << 20)
        refused += not (tmp_path / f'out{i}').exists()
    assert refused > 30
    assert not [path for path in tmp_path.iterdir() if path.name.endswith('.part')]


KILLED = """
import os, sys
from research.data import download
extract = download.tarfile.TarFile.extract
def dying(self, member, path, **options):
    extract(self, member, path, **options)
    if member.name == 'b':
        os.kill(os.getpid(), 9)
download.tarfile.TarFile.extract = dying
download.extract(sys.argv[1], sys.argv[2])
"""


def test_a_process_killed_while_it_unpacks_leaves_nothing_that_looks_complete(tmp_path):
    archive = make_tar(tmp_path / 'a.tgz', [(name, name.encode()) for name in 'abc'])
    for _ in range(2):  # what the first one left does not hinder the second, nor the next whole one
        done = subprocess.run([sys.executable, '-c', KILLED, archive, tmp_path / 'out'], timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / 'out').exists()
    assert leftovers(download.extract(archive, tmp_path / 'out')) == ['a', 'b', 'c']


def test_two_processes_that_unpack_the_same_do_not_disturb_each_other(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / 'a.tgz', [('a', b'1')])
    sync = os.sync

    def other():
        monkeypatch.setattr(download.os, 'sync', sync)
        download.extract(archive, tmp_path / 'out')

    monkeypatch.setattr(download.os, 'sync', other)
    assert leftovers(download.extract(archive, tmp_path / 'out')) == ['a']
    assert os.sync is sync  # the other one came in between: after the unpacking, before the name
    assert leftovers(tmp_path) == ['a', 'a.tgz']


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
