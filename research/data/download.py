"""Downloads that are checked before anything reads them, and archives that cannot write outside their folder.

A file is fetched into a temporary neighbour, its size and SHA-256 are compared, and only then it takes its name; an archive
is unpacked into a temporary folder that is renamed when it is complete and on the disk. So a path that exists is whole and
right. Without network the answer comes in seconds: a connection that cannot be made is not tried again.

    path = fetch('https://host/a.tar.gz', 'downloads/a.tar.gz', sha256='c4a3...', size=170052171)
    folder = extract(path, 'downloads/a')           # checked: no links, no paths that leave the folder, enough disk space

`extract` is the only place that unpacks archives, since an archive is written by strangers. Of a tar and a zip it takes plain
files and folders, each name once, without owners and without set-user-id bits; sizes are counted while they are unpacked.
"""

import bz2
import contextlib
import errno
import gzip
import hashlib
import http.client
import io
import logging
import lzma
import os
import pathlib
import secrets
import shutil
import stat
import struct
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from research.core.errors import UsageError

Path = str | os.PathLike[str]

TIMEOUT_S = 15.0  # to connect, and for each read
ATTEMPTS = 3  # for transfers that break off and for servers that are busy
BLOCK_BYTES = 1 << 20
MAX_MEMBERS = 10_000_000
MAX_BYTES = 1 << 41  # 2 TiB unpacked
MAX_HEADER_BYTES = 1 << 20  # of one read: tarfile reads files by 16 KiB, but a long name or a pax header in one piece
MAX_TAIL_BYTES = 1 << 26  # of padding behind a tar's end mark
TAR_SUFFIXES = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tbz', '.tb2', '.tar.xz')
OFFLINE_FIX = 'check the network; where there is none, bring the prepared data from a machine that has one'

# What damaged and hostile archives raise: zipfile gives RuntimeError for passwords and unknown methods, tarfile OverflowError
# for impossible times, bz2 an OSError without a number.
DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, ValueError, RuntimeError, OverflowError, OSError),
)
OF_THE_ARCHIVE = (None, errno.EINVAL, errno.ENAMETOOLONG)  # a place before the file's start, a name that no file can have

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
        except DAMAGED as error:
            if isinstance(error, OSError) and error.errno not in OF_THE_ARCHIVE:  # it is the disk's fault
                raise
            raise UsageError(f'{archive} cannot be unpacked: {error}', f'delete {archive} and download it again') from error
        os.sync()  # a name that outlives a power cut must not stand for files that do not; one call for a million files
        try:
            os.replace(temporary, to)
        except OSError:
            if not to.is_dir():  # else another process has unpacked the same meanwhile
                raise
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
    """A path beside `path` to write to; what is still there at the end (a failure, Ctrl-C) is removed.

    The name is new each time: in containers two processes, or one and its killed predecessor, often have the same number.
    """
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.part')
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
    with _decompressed(archive) as file, tarfile.open(fileobj=(careful := _Careful(file)), mode='r:') as tar:
        to.mkdir()
        members = Members(room)
        for member in tar:  # one pass, so a bomb is met before it is unpacked, and before the whole list is in memory
            kind = stat.S_IFDIR if member.isdir() else stat.S_IFREG if member.isfile() else stat.S_IFLNK
            members.check(member.name, kind, member.size)
            tar.extract(member, to, filter='data')  # the filter clears owners, set-user-id and others' right to write
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - else it keeps them all in memory
        careful.check_end()


def _decompressed(archive: pathlib.Path) -> Any:
    """The bytes of a tar that may be packed with gzip, bzip2 or xz."""
    with archive.open('rb') as packed:
        magic = packed.read(6)
    if magic.startswith(b'\x1f\x8b'):
        return gzip.open(archive, 'rb')
    if magic.startswith(b'BZh'):
        return bz2.open(archive, 'rb')
    return lzma.open(archive, 'rb') if magic == b'\xfd7zXZ\0' else archive.open('rb')


class _Careful(io.RawIOBase):
    """A tar's bytes, in pieces that fit the memory: the header of a bomb may announce a name of gigabytes."""

    def __init__(self, file: Any):
        self._file = file
        self._last = b''  # the block that was read last

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f'a header of {size} bytes')
        self._last = self._file.read(size)
        return self._last

    def check_end(self) -> None:
        """tarfile takes a damaged header, and an archive cut off between two members, for the end: the end mark tells."""
        if self._last != bytes(tarfile.BLOCKSIZE):
            raise ValueError('it has no end: it is cut off or damaged')
        left = MAX_TAIL_BYTES
        while block := self._file.read(MAX_HEADER_BYTES):  # to the end, where gzip and xz keep their checksums
            left -= len(block)
            if left < 0:
                raise ValueError(f'it has more than {MAX_TAIL_BYTES} bytes behind its end')

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()


def _unzip(archive: pathlib.Path, to: pathlib.Path, room: int) -> None:
    """Unpacks files and folders only. A size that lies is noticed by zipfile, which reads no more than it."""
    with zipfile.ZipFile(archive) as file:
        members = Members(room)
        for member in file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16) or (stat.S_IFDIR if member.is_dir() else stat.S_IFREG)
            members.check(member.filename, kind, member.file_size)
        to.mkdir()
        file.extractall(to)  # noqa: S202  every member was checked above


class Members:
    """Checks the members of an archive one by one; `room` is how many bytes they may have together."""

    def __init__(self, room: int):
        self._room, self._number = room, 0
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def check(self, name: str, kind: int, size: int) -> None:
        """Raises ValueError for a member that may not be unpacked; `kind` is its type as in `st_mode`."""
        parts = name.replace('\\', '/').split('/')
        if name.startswith(('/', '\\')) or '..' in parts:
            raise ValueError(f'{name!r} leaves the folder it is unpacked to')
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f'{name!r} is a link or a device')
        if size < 0:
            raise ValueError(f'{name!r} has {size} bytes')
        self._room, self._number = self._room - size, self._number + 1
        _check_room(self._room, self._number)
        self._check_is_new([part for part in parts if part not in ('', '.')], name, kind)

    def _check_is_new(self, parts: list[str], name: str, kind: int) -> None:
        """Folders may come again, files may not: the second would overwrite what was checked before."""
        path, above = '/'.join(parts), ['/'.join(parts[:i]) for i in range(1, len(parts))]
        is_file = kind == stat.S_IFREG
        if path in self._files or (is_file and (path in self._folders or not path)) or not self._files.isdisjoint(above):
            raise ValueError(f'{name!r} is there twice')
        self._folders.update(above if is_file else [*above, path])
        if is_file:
            self._files.add(path)


def _decompress(archive: pathlib.Path, to: pathlib.Path, room: int) -> None:
    """Unpacks one gzip or bzip2 file."""
    with archive.open('rb') as packed:
        is_gzip = packed.read(2) == b'\x1f\x8b'
    with (gzip.open if is_gzip else bz2.open)(archive, 'rb') as opened, to.open('wb') as target:
        while block := opened.read(BLOCK_BYTES):
            room -= target.write(block)
            _check_room(room, 1)


def _check_room(room: int, members: int) -> None:
    if room < 0:
        raise ValueError('it holds more than the disk has free, or more than is allowed')
    if members > MAX_MEMBERS:
        raise ValueError(f'it holds more than {MAX_MEMBERS} members')
