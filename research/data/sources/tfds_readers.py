"""Preparing a TFDS data set once, without TensorFlow: downloads, the classic readers, and clear errors for the rest.

TFDS reads prepared data without TensorFlow, but its download manager and many builders' file readers need it. Here are a
download manager that does not (see research/data/download.py: checksums before extraction, safe extraction, an answer in
seconds when there is no network) and readers for the MNIST and CIFAR families. They are subclasses that keep the stock
builder's name, version and features, so what they prepare is what the stock name reads, here and anywhere else.

    prepare(tfds.builder('cifar10', data_dir=d))     # d/cifar10/3.0.2/cifar10-train.array_record-00000-of-00001, ...
"""

import contextlib
import fcntl
import io
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from research.core.errors import UsageError
from research.data import download
from research.data.sources.idx import read_idx

CIFAR_SHAPE = (3, 32, 32)
EXTRACTION = {
    'TAR': 'tar',
    'TAR_GZ': 'tar',
    'TAR_STREAM': 'tar',
    'TAR_GZ_STREAM': 'tar',
    'ZIP': 'zip',
    'GZIP': 'gz',
    'BZIP2': 'bz2',
}

log = logging.getLogger(__name__)


def prepare(builder: Any) -> None:
    """Downloads and prepares the data set of a stock `builder` as array_record files, unless another process just did.

    Raises:
      UsageError: no network, a checksum that does not match, files that must be fetched by hand, or a builder whose own code
        needs TensorFlow (or another package) to read its files.
    """
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    ours = _with_reader(builder)
    ours._make_download_manager = lambda **_: Downloads(builder)
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    with _only_process(builder.data_dir_root / 'downloads' / f'.{builder.name}.lock'):
        if ours.data_path.exists():
            return
        log.info('preparing %s in %s', builder.info.full_name, ours.data_path)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints advice on TensorFlow there
                ours.download_and_prepare(file_format='array_record', download_config=settings)
        except ImportError as error:
            package = _package(error)
            raise UsageError(
                f'{builder.name} is not prepared, and its builder needs {package} for that',
                f'run once where {package} is installed: {build_command(builder)}',
            ) from error


def build_command(builder: Any) -> str:
    """The command that prepares a data set where TensorFlow is installed."""
    name = '/'.join(filter(None, (builder.name, builder.builder_config.name if builder.builder_config else None)))
    return f'tfds build {name} --file_format=array_record --data_dir={builder.data_dir_root}'


class Downloads:
    """What a builder's `_split_generators` gets: TFDS's download manager in the parts that builders use.

    Files are kept where TFDS keeps them (data_dir/downloads), so what it has downloaded is found, checked and used.
    """

    def __init__(self, builder: Any):
        self._builder = builder
        self._known = builder.url_infos or {}
        self.download_dir = builder.data_dir_root / 'downloads'
        self.downloaded_size = 0
        self.register_checksums = False

    def download(self, url_or_urls: Any) -> Any:
        """The path of each URL's file, in the structure that the URLs came in."""
        return _map(self._download, url_or_urls)

    def extract(self, path_or_paths: Any) -> Any:
        """The path of each archive's folder (of the unpacked file for .gz and .bz2)."""
        return _map(self._extract, path_or_paths)

    def download_and_extract(self, url_or_urls: Any) -> Any:
        """`extract` of `download`."""
        return self.extract(self.download(url_or_urls))

    def iter_archive(self, archive: Any) -> Iterator[tuple[str, Any]]:
        """(path inside, open file) of each file of an archive."""
        folder = pathlib.Path(self._extract(archive))
        for path in sorted(p for p in folder.rglob('*') if p.is_file()):
            with path.open('rb') as file:
                yield path.relative_to(folder).as_posix(), file

    @property
    def manual_dir(self) -> Any:
        """The folder of files that the user must fetch by hand."""
        folder = self.download_dir / 'manual'
        if not folder.is_dir() or not any(folder.iterdir()):
            how = ' '.join((self._builder.MANUAL_DOWNLOAD_INSTRUCTIONS or '').split())
            raise UsageError(f'{self._builder.name} needs files that are fetched by hand: {how}', f'put them into {folder}')
        return folder

    def _download(self, url: Any) -> Any:
        from tensorflow_datasets.core.download import resource

        url = url if isinstance(url, str) else url.url
        info = self._known.get(url)
        if info is None:
            raise UsageError(f'TFDS knows no checksum for {url}, and nothing is downloaded unchecked', self._fix)
        path = self.download_dir / self._builder.name / resource.get_dl_fname(url, info.checksum)
        self.downloaded_size += info.size
        download.fetch(url, path, sha256=info.checksum, size=info.size, fix=self._fix)
        return path

    def _extract(self, archive: Any) -> Any:
        from tensorflow_datasets.core.download import resource

        is_path = not isinstance(archive, resource.Resource)
        path = type(self.download_dir)(archive if is_path else archive.path)
        method = (resource.guess_extract_method(path.name) if is_path else archive.extract_method).name
        if method not in EXTRACTION:
            return path
        to = self.download_dir / 'extracted' / f'{method}.{path.name}'
        download.extract(path, to, EXTRACTION[method])
        return to

    @property
    def _fix(self) -> str:
        return 'prepare it where there is network, then --config.data.source.data_dir=DIR'


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` of every leaf of nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    return type(tree)(_map(function, value) for value in tree) if isinstance(tree, (list, tuple)) else function(tree)


def read_mnist(data_path: Any, label_path: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    """The examples of one split of the MNIST family, from two IDX files."""
    from PIL import Image

    images, labels = read_idx(pathlib.Path(data_path)), read_idx(pathlib.Path(label_path))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield i, {'image': Image.fromarray(image), 'label': int(label)}


def read_cifar(prefix: str, paths: Iterable[Any], label_keys: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """The examples of one split of the CIFAR family: each row is the labels, one byte each, and 3072 bytes (C, H, W)."""
    from PIL import Image

    start, width = 0, len(label_keys) + 3072
    for path in paths:
        data = np.fromfile(path, np.uint8)
        if len(data) % width:
            raise UsageError(f'{path} has {len(data)} bytes, not a multiple of {width}', 'delete it and prepare again')
        for i, row in enumerate(data.reshape(-1, width), start):
            image = row[len(label_keys) :].reshape(CIFAR_SHAPE).transpose(1, 2, 0)  # (32, 32, 3)
            labels = dict(zip(label_keys, row.tolist(), strict=False))
            yield i, {'id': f'{prefix}{i:05d}', 'image': Image.fromarray(image.copy()), **labels}
        start += len(data) // width


def _mnist_examples(self: Any, num_examples: int, data_path: Any, label_path: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    del self, num_examples  # the files say it
    return read_mnist(data_path, label_path)


def _cifar_examples(self: Any, split_prefix: str, filepaths: Iterable[Any]) -> Iterable[tuple[int, dict[str, Any]]]:
    return read_cifar(split_prefix, filepaths, self._cifar_info.label_keys)


READERS: dict[str, Callable[..., Any]] = {
    'tensorflow_datasets.image_classification.mnist': _mnist_examples,  # MNIST, Fashion-MNIST, KMNIST, EMNIST
    'tensorflow_datasets.image_classification.cifar': _cifar_examples,  # CIFAR-10, CIFAR-100
}


def _with_reader(builder: Any) -> Any:
    """`builder`, or one like it whose files are read without TensorFlow. Name, version, features and splits stay."""
    from tensorflow_datasets.core import registered

    stock = type(builder)
    if stock.__module__ not in READERS:
        return builder
    with registered.skip_registration():
        fields = {'_generate_examples': READERS[stock.__module__], '__module__': stock.__module__, 'name': stock.name}
        ours = type(stock.__name__, (stock,), fields)
    config = builder.builder_config.name if builder.builder_config else None
    return ours(data_dir=builder.data_dir_root, config=config)


def _package(error: ImportError) -> str:
    """The top-level package that could not be imported; TFDS wraps the error that names it."""
    while not error.name and isinstance(error.__cause__, ImportError):
        error = error.__cause__
    return (error.name or str(error)).partition('.')[0]


@contextlib.contextmanager
def _only_process(path: Any) -> Iterator[None]:
    """Lets one process in at a time: hosts and workers that start together must not prepare the same folder twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
