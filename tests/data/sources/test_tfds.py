"""TFDS without TensorFlow: own builders, and the CIFAR and MNIST routes from a loopback server to decoded batches."""

import gzip
import hashlib
import http.server
import io
import socket
import struct
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as builders
from PIL import Image
from tensorflow_datasets.core import registered
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import cifar, mnist

from research.core.errors import UsageError
from research.data.sources import tfds_readers
from research.data.sources.tfds import tfds

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (9, 6, 7, 3), np.uint8)
F = builders.features


@pytest.fixture(autouse=True)
def _never_tensorflow():
    yield
    assert 'tensorflow' not in sys.modules


def make_builder(name, features, examples, splits=('train', 'test')):
    """A builder class whose split i holds examples[i::2]."""

    def _info(self):
        return builders.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: iter([(i, examples[i]) for i in range(k, len(examples), 2)]) for k, split in enumerate(splits)}

    def _generate_examples(self):
        raise NotImplementedError

    fields = {'VERSION': builders.core.Version('1.0.0'), '_info': _info, '_split_generators': _split_generators}
    with registered.skip_registration():
        return type(name, (builders.core.GeneratorBasedBuilder,), {**fields, '_generate_examples': _generate_examples})


@pytest.fixture
def own(tmp_path):
    features = {
        'image': F.Image(shape=(6, 7, 3)),
        'label': F.ClassLabel(names=['ant', 'bee', 'cow']),
        'weight': F.Tensor(shape=(2,), dtype=np.float64),
        'caption': F.Text(),
        'mask': F.Image(shape=(6, 7, 1)),
        'boxes': F.Sequence(F.BBoxFeature()),
    }
    examples = [
        {
            'image': Image.fromarray(image),
            'label': i % 3,
            'weight': np.array([i, i / 2]),
            'caption': f'number {i}',
            'mask': Image.fromarray(image[..., 0]),
            'boxes': [],
        }
        for i, image in enumerate(IMAGES)
    ]
    builder = make_builder('OwnSet', features, examples)(data_dir=tmp_path, file_format='array_record')
    builder.download_and_prepare()
    return str(tmp_path)


def whole(source):
    return source[np.arange(len(source))]


@pytest.mark.parametrize('in_memory', [None, True, False])
def test_own_builder(own, in_memory):
    found = tfds(dataset='own_set', data_dir=own, in_memory=in_memory)
    assert (found.name, sorted(found.splits), found.class_names) == ('own_set', ['test', 'train'], ('ant', 'bee', 'cow'))
    for k, split in enumerate(('train', 'test')):
        source = found.splits[split]
        block = whole(source)
        assert sorted(block) == ['image', 'label', 'weight']
        assert [block[n].dtype for n in ('image', 'label', 'weight')] == [np.uint8, np.int32, np.float32]
        order = block['weight'][:, 0].astype(int)  # TFDS shuffles while it prepares
        assert sorted(order) == list(range(k, 9, 2))
        np.testing.assert_array_equal(block['image'], IMAGES[order])
        np.testing.assert_array_equal(block['label'], order % 3)
        np.testing.assert_array_equal(source.labels(), order % 3)
        np.testing.assert_array_equal(source[np.array([2, 0])]['image'], IMAGES[order[[2, 0]]])
        assert len(set(source.keys().tolist())) == len(source)
        assert source.keys().dtype == np.uint64


def test_random_access_source_keeps_its_labels_on_disk(own):
    sources = [tfds(dataset='own_set', data_dir=own, in_memory=False).splits['train'] for _ in range(2)]
    first = sources[0].labels()
    sources[1]._records = None  # nothing is left to read from
    np.testing.assert_array_equal(sources[1].labels(), first)
    assert set(sources[0].keys().tolist()).isdisjoint(
        tfds(dataset='own_set', data_dir=own, in_memory=False).splits['test'].keys()
    )


def test_many_images_keep_their_order(tmp_path):
    images = RNG.integers(0, 256, (300, 4, 4, 1), np.uint8)
    examples = [{'image': Image.fromarray(image[..., 0]), 'place': i} for i, image in enumerate(images)]
    features = {'image': F.Image(shape=(4, 4, 1)), 'place': np.int32}
    make_builder('Many', features, examples)(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    found = tfds(dataset='many', data_dir=str(tmp_path))
    block = whole(found.splits['train'])
    np.testing.assert_array_equal(block['image'], images[block['place']])
    assert (found.class_names, found.splits['train'].labels()) == (None, None)


def test_images_of_varying_size_need_a_size(tmp_path):
    examples = [{'image': Image.new('RGB', (8 + i, 30), (i, 0, 0)), 'label': 0.5} for i in range(4)]
    features = {'image': F.Image(), 'label': np.float32}
    make_builder('Varying', features, examples)(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    with pytest.raises(UsageError, match='the images of varying vary in size\n  fix: set image_size'):
        tfds(dataset='varying', data_dir=str(tmp_path))
    found = tfds(dataset='varying', data_dir=str(tmp_path), image_size=5)
    block = whole(found.splits['train'])
    assert block['image'].shape == (2, 5, 5, 3)
    assert sorted(block['image'][:, 0, 0, 0]) == [0, 2]
    assert (block['label'].dtype, found.splits['train'].labels(), found.class_names) == (np.float32, None, None)


def test_only_text_is_refused(tmp_path):
    examples = [{'text': 'a', 'label': 0}] * 2
    features = {'text': F.Text(), 'label': F.ClassLabel(num_classes=2)}
    make_builder('OnlyText', features, examples)(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    with pytest.raises(UsageError, match='only_text has neither images nor numbers of a fixed shape, only label, text'):
        tfds(dataset='only_text', data_dir=str(tmp_path))


def test_tfrecord_is_answered_with_the_command(own, tmp_path):
    info = tmp_path / 'own_set' / '1.0.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(UsageError, match=r'as tfrecord, without random access\n  fix: .*tfds convert_format .*array_record'):
        tfds(dataset='own_set', data_dir=own)


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        ('cifar01', r"TFDS has no data set 'cifar01'\n  fix: did you mean 'cifar10'"),
        ('emnist/nope', "TFDS cannot open 'emnist/nope': BuilderConfig nope not found"),
        ('mnist:9.9.9', "TFDS cannot open 'mnist:9.9.9': Dataset mnist cannot be loaded at version 9.9.9"),
    ],
)
def test_unknown_names(tmp_path, dataset, message):
    with pytest.raises(UsageError, match=message):
        tfds(dataset=dataset, data_dir=str(tmp_path))


def test_not_prepared_and_not_to_be_downloaded(tmp_path):
    with pytest.raises(UsageError, match=f'mnist is not prepared in {tmp_path}\n  fix: set download=True'):
        tfds(dataset='mnist', data_dir=str(tmp_path), download=False)


@pytest.fixture
def server(monkeypatch):
    """A loopback server of `server.files`."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = httpd.files[self.path.rpartition('/')[2]]
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        httpd.files, httpd.url = {}, f'http://127.0.0.1:{httpd.server_port}/'
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join(5)


def register(monkeypatch, builder, url, files):
    """Gives a stock builder the checksums of `files` under `url`."""
    infos = {
        url + name: checksums.UrlInfo(size=len(data), checksum=hashlib.sha256(data).hexdigest(), filename=name)
        for name, data in files.items()
    }
    monkeypatch.setattr(builder, 'url_infos', infos)


def make_tar(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w:gz') as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def cifar_rows(n, labels):
    """n rows of CIFAR's binary format with the given number of label bytes: (labels, images (n, 32, 32, 3), bytes)."""
    label, planes = RNG.integers(0, 3, (n, labels), np.uint8), RNG.integers(0, 256, (n, 3, 32, 32), np.uint8)
    return label, planes.transpose(0, 2, 3, 1), np.concatenate([label, planes.reshape(n, -1)], 1).tobytes()


def serve_cifar(monkeypatch, server, builder, files):
    name = f'{builder.name}-binary.tar.gz'
    data = make_tar(files)
    server.files[name] = data
    stock = builder._cifar_info
    monkeypatch.setattr(builder, '_cifar_info', property(lambda b: stock.fget(b)._replace(url=server.url + name)))
    register(monkeypatch, builder, server.url, {name: data})
    return name


def test_cifar10_from_the_archive_to_the_batch(tmp_path, server, monkeypatch, capsys):
    parts = [cifar_rows(n, 1) for n in (3, 2, 2, 2, 2, 4)]
    names = [*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin']
    files = {f'cifar-10-batches-bin/{name}': part[2] for name, part in zip(names, parts, strict=True)}
    classes = [f'class{i}' for i in range(10)]
    files['cifar-10-batches-bin/batches.meta.txt'] = '\n'.join([*classes, '', '']).encode()
    serve_cifar(monkeypatch, server, cifar.Cifar10, files)
    found = tfds(dataset='cifar10', data_dir=str(tmp_path))
    assert found.class_names == tuple(classes)
    for split, used in (('train', parts[:5]), ('test', parts[5:])):
        labels, images = np.concatenate([p[0][:, 0] for p in used]), np.concatenate([p[1] for p in used])
        block = whole(found.splits[split])
        assert sorted(block) == ['image', 'label']
        want = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        assert {image.tobytes(): label for image, label in zip(block['image'], block['label'], strict=True)} == want
        assert len(block['label']) == len(labels)
    server.files.clear()  # from here on everything must come from the prepared folder
    np.testing.assert_array_equal(
        whole(tfds(dataset='cifar10', data_dir=str(tmp_path)).splits['test'])['image'], block['image']
    )
    stock = builders.data_source('cifar10', split='test', data_dir=tmp_path)
    np.testing.assert_array_equal([stock[i]['image'] for i in range(4)], block['image'])
    assert sorted(stock[i]['id'] for i in range(4)) == [f'test_{i:05d}'.encode() for i in range(4)]
    assert capsys.readouterr().out == ''


def test_cifar100_keeps_both_labels(tmp_path, server, monkeypatch):
    train, test = cifar_rows(3, 2), cifar_rows(2, 2)
    files = {'train.bin': train[2], 'test.bin': test[2]}
    files |= {'coarse_label_names.txt': b'\n'.join(b'c%d' % i for i in range(20))}
    files |= {'fine_label_names.txt': b'\n'.join(b'f%d' % i for i in range(100))}
    serve_cifar(monkeypatch, server, cifar.Cifar100, {f'cifar-100-binary/{name}': data for name, data in files.items()})
    found = tfds(dataset='cifar100', data_dir=str(tmp_path))
    block = whole(found.splits['train'])
    assert found.class_names == tuple(f'f{i}' for i in range(100))
    rows = sorted(zip(block['coarse_label'], block['label'], strict=True))
    assert rows == sorted(map(tuple, train[0]))


def test_a_wrong_checksum_is_refused_before_extraction(tmp_path, server, monkeypatch):
    name = serve_cifar(monkeypatch, server, cifar.Cifar10, {'../evil': b'x'})
    good = server.files[name]
    server.files[name] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(UsageError, match=r'has SHA-256 .*, expected'):
        tfds(dataset='cifar10', data_dir=str(tmp_path))
    server.files[name] = good
    with pytest.raises(UsageError, match=r"'\.\./evil' leaves the folder"):
        tfds(dataset='cifar10', data_dir=str(tmp_path))
    assert not list(tmp_path.rglob('*evil*'))
    assert not (tmp_path / 'cifar10' / '3.0.2').exists()


def test_a_torn_cifar_file_is_named(tmp_path, server, monkeypatch):
    files = {f'data_batch_{i}.bin': bytes(3072) for i in range(1, 6)} | {'test_batch.bin': b'', 'batches.meta.txt': b'a'}
    files['batches.meta.txt'] = b'\n'.join(b'%d' % i for i in range(10))
    serve_cifar(monkeypatch, server, cifar.Cifar10, {f'cifar-10-batches-bin/{name}': data for name, data in files.items()})
    with pytest.raises(UsageError, match=r'data_batch_1\.bin has 3072 bytes, not a multiple of 3073'):
        tfds(dataset='cifar10', data_dir=str(tmp_path))


@pytest.mark.parametrize('dataset', ['mnist', 'fashion_mnist'])
def test_mnist_from_four_files_to_the_batch(tmp_path, server, monkeypatch, dataset):
    builder = {'mnist': mnist.MNIST, 'fashion_mnist': mnist.FashionMNIST}[dataset]
    images, labels = RNG.integers(0, 256, (7, 28, 28), np.uint8), np.arange(7, dtype=np.uint8)
    for prefix, part in (('train', slice(0, 4)), ('t10k', slice(4, 7))):
        n = len(labels[part])
        header = struct.pack('>HBB3I', 0, 8, 3, n, 28, 28), struct.pack('>HBBI', 0, 8, 1, n)
        server.files[f'{prefix}-images-idx3-ubyte.gz'] = gzip.compress(header[0] + images[part].tobytes())
        server.files[f'{prefix}-labels-idx1-ubyte.gz'] = gzip.compress(header[1] + labels[part].tobytes())
    monkeypatch.setattr(builder, 'URL', server.url)
    register(monkeypatch, builder, server.url, server.files)
    found = tfds(dataset=dataset, data_dir=str(tmp_path))
    assert len(found.class_names) == 10
    assert found.class_names[9] == {'mnist': '9', 'fashion_mnist': 'Ankle boot'}[dataset]
    for split, count in (('train', 4), ('test', 3)):
        block = whole(found.splits[split])
        assert len(block['label']) == count
        np.testing.assert_array_equal(block['image'][..., 0], images[block['label']])


def test_no_network_is_answered_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{taken.getsockname()[1]}/'
    files = {f'{p}-{k}-ubyte.gz': b'x' for p in ('train', 't10k') for k in ('images-idx3', 'labels-idx1')}
    monkeypatch.setattr(mnist.MNIST, 'URL', url)
    register(monkeypatch, mnist.MNIST, url, files)
    start = time.monotonic()
    with pytest.raises(UsageError) as raised:
        tfds(dataset='mnist', data_dir=str(tmp_path))
    assert time.monotonic() - start < 5
    assert raised.value.message.startswith(f'cannot download {url}t')
    assert '--config.data.source.data_dir=DIR' in raised.value.fix
    assert not (tmp_path / 'mnist' / '3.0.1').exists()


def test_a_url_without_a_checksum_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist.MNIST, 'URL', 'http://127.0.0.1:1/')
    monkeypatch.setattr(mnist.MNIST, 'url_infos', None)
    with pytest.raises(UsageError, match=r'TFDS knows no checksum for http://127\.0\.0\.1:1/'):
        tfds(dataset='mnist', data_dir=str(tmp_path))


def test_a_builder_whose_code_needs_tensorflow_is_answered_with_the_command(tmp_path, capsys, monkeypatch):
    def examples(self, *_, **__):
        yield 0, {'image': np.zeros((28, 28, 1), np.uint8), 'label': 0}  # TFDS encodes arrays with TensorFlow

    monkeypatch.setattr(mnist.MNIST, '_split_generators', lambda self, _: {'train': self._generate_examples()})
    monkeypatch.setattr(mnist.MNIST, '_generate_examples', examples)
    monkeypatch.setattr(tfds_readers, 'READERS', {})
    command = f'tfds build mnist --file_format=array_record --data_dir={tmp_path}'
    with pytest.raises(UsageError, match='its builder needs tensorflow') as raised:
        tfds(dataset='mnist', data_dir=str(tmp_path))
    assert raised.value.fix == f'run once where tensorflow is installed: {command}'
    assert capsys.readouterr().out == ''


def test_files_to_fetch_by_hand_are_answered_with_the_folder(tmp_path):
    with pytest.raises(
        UsageError, match=r'imagenet2012 needs files that are fetched by hand: .*\n  fix: put them into .*/manual'
    ):
        tfds(dataset='imagenet2012', data_dir=str(tmp_path), image_size=64)


def test_only_one_process_prepares_at_a_time(tmp_path):
    entered = threading.Event()

    def enter():
        with tfds_readers._only_process(tmp_path / 'lock'):
            entered.set()

    thread = threading.Thread(target=enter)
    with tfds_readers._only_process(tmp_path / 'lock'):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    thread.join(5)


def test_a_community_data_set_is_refused():
    with pytest.raises(UsageError, match='would run code from elsewhere'):
        tfds(dataset='huggingface:some/thing')
