"""Downloads that are checked before anything reads them, and archives that cannot write outside their folder.

A file is fetched into a temporary neighbour, its size and SHA-256 are compared, and only then it takes its name; an archive
is unpacked into a temporary folder that is renamed when it is complete. So a path that exists is whole and right. Without
network the answer comes in seconds: a connection that cannot be made is not tried again.

    path = fetch('https://host/a.tar.gz', 'downloads/a.tar.gz', sha256='c4a3...', size=170052171)
    folder = extract(path, 'downloads/a')           # checked: no links, no paths that leave the folder, enough disk space
"""

import bz2
import contextlib
import gzip
import hashlib
import http.client
import logging
import os
import pathlib
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator

from research.core.errors import UsageError

Path = str | os.PathLike[str]

TIMEOUT_S = 15.0  # to connect, and for each read
ATTEMPTS = 3  # for transfers that break off and for servers that are busy
BLOCK_BYTES = 1 << 20
MAX_MEMBERS = 10_000_000
MAX_BYTES = 1 << 41  # 2 TiB unpacked
TAR_SUFFIXES = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tbz', '.tb2', '.tar.xz')
OFFLINE_FIX = 'check the network; where there is none, bring the prepared data from a machine that has one'

log = logging.getLogger(__name__)


def fetch(url: str, path: Path, *, sha256: str, size: int | None = None, fix: str = OFFLINE_FIX) -> pathlib.Path:
    """Downloads `url` to `path` unless a file with this SHA-256 is there already.

    Args:
      url: http or https.
      path: where the file shall be; its folder is made.
      sha256: the expected digest, hexadecimal. A file without a known digest is not downloaded at all.
      size: the expected size in bytes, if known; a longer answer is cut off at once.
      fix: what the error tells the user to do if the file cannot be had.

    Raises:
      UsageError: no connection, an HTTP error, or content that is not what was expected (nothing is left behind then).
    """
    path = pathlib.Path(path)
    if path.is_file() and digest_of(path) == sha256:
        return path
    if urllib.parse.urlsplit(url).scheme not in ('http', 'https'):
        raise UsageError(f'cannot download {url}: only http and https are allowed', fix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_neighbour(path) as temporary:
        log.info('downloading %s', url)
        found = _transfer_with_retries(url, temporary, size, fix)
        if size is not None and temporary.stat().st_size != size:
            raise UsageError(f'{url} has {temporary.stat().st_size} bytes, expected {size}: it is not the published file', fix)
        if found != sha256:
            raise UsageError(f'{url} has SHA-256 {found}, expected {sha256}: it is not the published file', fix)
        os.replace(temporary, path)
    return path


def extract(archive: Path, to: Path, kind: str | None = None, max_bytes: int = MAX_BYTES) -> pathlib.Path:
    """Unpacks an archive to `to`, all or nothing; what is at `to` already is taken as it is.

    Args:
      archive: a tar (plain, gz, bz2, xz), a zip, or one file packed with gzip or bzip2.
      to: the folder to make; for gzip and bzip2 the file to make.
      kind: 'tar', 'zip', 'gz' or 'bz2'; None reads it from the file's name.
      max_bytes: refuse to unpack more than this (a bomb), or more than the disk has free.

    Raises:
      UsageError: damaged, too large, or with a member that is a link, a device, or outside the folder.
    """
    archive, to = pathlib.Path(archive), pathlib.Path(to)
    if to.exists():
        return to
    unpack = {'tar': _untar, 'zip': _unzip, 'gz': _decompress, 'bz2': _decompress}[kind or archive_kind(archive.name)]
    to.parent.mkdir(parents=True, exist_ok=True)
    room = min(max_bytes, shutil.disk_usage(to.parent).free)
    with temporary_neighbour(to) as temporary:
        try:
            unpack(archive, temporary, room)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
            raise UsageError(f'{archive} cannot be unpacked: {error}', f'delete {archive} and download it again') from error
        os.replace(temporary, to)
    return to


def archive_kind(name: str) -> str:
    """'tar', 'zip', 'gz' or 'bz2' from a file's name.

    Raises:
      UsageError: the name ends in none of the known ways.
    """
    if name.endswith(TAR_SUFFIXES):
        return 'tar'
    kind = name.rpartition('.')[2]
    if kind not in ('zip', 'gz', 'bz2'):
        raise UsageError(f'{name} is not an archive that can be unpacked', 'known: .tar[.gz|.bz2|.xz], .tgz, .zip, .gz, .bz2')
    return kind


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def temporary_neighbour(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write to; what is still there at the end (a failure, Ctrl-C) is removed."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _transfer_with_retries(url: str, to: pathlib.Path, size: int | None, fix: str) -> str:
    """Downloads `url` and returns its SHA-256; retries what a second try can mend."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return _transfer(url, to, size)
        except urllib.error.HTTPError as error:
            error.close()
            reason, may_retry = f'HTTP {error.code} {error.reason}', error.code in (429, 500, 502, 503, 504)
        except urllib.error.URLError as error:  # no connection: asking again only delays the answer
            reason, may_retry = str(error.reason), False
        except (OSError, http.client.HTTPException) as error:  # it broke off on the way
            reason, may_retry = f'{type(error).__name__}: {error}', True
        if not may_retry or attempt == ATTEMPTS:
            raise UsageError(f'cannot download {url}: {reason}', fix)
        time.sleep(attempt / 2)


def _transfer(url: str, to: pathlib.Path, size: int | None) -> str:
    request = urllib.request.Request(url, headers={'User-Agent': 'fulcrum'})  # noqa: S310  the scheme was checked
    state, received = hashlib.sha256(), 0
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer, open(to, 'wb') as file:  # noqa: S310
        while block := answer.read(BLOCK_BYTES):
            state.update(block)
            received += file.write(block)
            if size is not None and received > size:
                return state.hexdigest()
        if answer.length:  # the connection closed before the announced end
            raise http.client.IncompleteRead(b'', answer.length)
    return state.hexdigest()


def _untar(archive: pathlib.Path, to: pathlib.Path, room: int) -> None:
    """Unpacks files and folders only: a link is refused, since older Pythons' data filter can be led out through one."""
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:  # one pass, so a bomb is met before the whole list is in memory
            if not (member.isfile() or member.isdir()):
                raise ValueError(f'{member.name!r} is a link or a device')
            _check_path(member.name)
            members.append(member)
            room -= member.size
            _check_room(room, len(members))
        to.mkdir()
        tar.extractall(to, members, filter='data')


def _unzip(archive: pathlib.Path, to: pathlib.Path, room: int) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            _check_path(member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f'{member.filename!r} is a link or a device')
        _check_room(room - sum(member.file_size for member in members), len(members))
        to.mkdir()
        file.extractall(to, members)  # noqa: S202  every member was checked above


def _decompress(archive: pathlib.Path, to: pathlib.Path, room: int) -> None:
    """Unpacks one gzip or bzip2 file."""
    with archive.open('rb') as packed:
        is_gzip = packed.read(2) == b'\x1f\x8b'
    with (gzip.open if is_gzip else bz2.open)(archive, 'rb') as opened, to.open('wb') as target:
        while block := opened.read(BLOCK_BYTES):
            room -= target.write(block)
            _check_room(room, 1)


def _check_path(name: str) -> None:
    """Refuses absolute paths and '..'."""
    if name.startswith(('/', '\\')) or '..' in name.replace('\\', '/').split('/'):
        raise ValueError(f'{name!r} leaves the folder it is unpacked to')


def _check_room(room: int, members: int) -> None:
    if room < 0:
        raise ValueError('it holds more than the disk has free, or more than is allowed')
    if members > MAX_MEMBERS:
        raise ValueError(f'it holds more than {MAX_MEMBERS} members')
