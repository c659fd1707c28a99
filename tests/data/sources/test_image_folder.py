"""Image folders written here with Pillow: exact where the format is lossless, by colour where it is not."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from research.core.errors import UsageError
from research.data.bad_records import BadRecordError
from research.data.source import key_of
from research.data.sources.image_folder import decode_image, image_folder

RNG = np.random.default_rng(0)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


@pytest.fixture
def pets(tmp_path):
    """Two splits, two classes, PNG images of the final size, so that their bytes must come back."""
    root = tmp_path / 'pets'
    names = ['train/cat/b.png', 'train/cat/a.PNG', 'train/dog/c.png', 'val/cat/d.png', 'val/dog/e.bmp']
    return root, {name: save(root / name, noise(8, 8, 3)) for name in names}


def test_splits_classes_order_and_bytes(pets):
    root, arrays = pets
    (root / 'train' / 'cat' / 'notes.txt').write_text('not an image')
    (root / 'train' / '.cache').mkdir()
    found = image_folder(dir=str(root), image_size=8)
    assert (found.name, list(found.splits), found.class_names) == ('pets', ['train', 'validation'], ('cat', 'dog'))
    source = found.splits['train']
    order = ['train/cat/a.PNG', 'train/cat/b.png', 'train/dog/c.png']
    block = source[np.array([2, 0, 1, 2])]
    np.testing.assert_array_equal(block['image'], [arrays[order[i]] for i in (2, 0, 1, 2)])
    np.testing.assert_array_equal(block['label'], np.array([1, 0, 0, 1], np.int32))
    np.testing.assert_array_equal(source.labels(), [0, 0, 1])
    assert source.keys().tolist() == [key_of(name) for name in order]
    assert source.keys().dtype == np.uint64
    assert source[np.arange(0)]['image'].shape == (0, 8, 8, 3)


def test_one_folder_of_classes_even_if_one_is_called_train(tmp_path):
    for name in ('bus', 'train'):
        save(tmp_path / name / '1.png', noise(4, 4, 3))
    found = image_folder(dir=str(tmp_path), image_size=4)
    assert (list(found.splits), found.class_names) == (['all'], ('bus', 'train'))


def test_a_source_can_be_sent_to_a_worker_process(pets):
    source = image_folder(dir=str(pets[0]), image_size=8).splits['train']
    indices = np.arange(3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[indices]['image'], source[indices]['image'])


def test_shorter_side_is_scaled_and_the_centre_cut_out(tmp_path):
    wide = save(tmp_path / 'wide.png', noise(20, 60, 3))
    save(tmp_path / 'tall.png', wide.transpose(1, 0, 2))
    scaled = np.asarray(Image.fromarray(wide).resize((30, 10), Image.Resampling.BILINEAR))[:, 10:20]
    np.testing.assert_array_equal(decode_image(tmp_path / 'wide.png', 10, 3, 'a'), scaled)
    np.testing.assert_array_equal(decode_image(tmp_path / 'tall.png', 10, 3, 'a'), scaled.transpose(1, 0, 2))


def test_downscaling_averages_instead_of_skipping(tmp_path):
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    save(tmp_path / 'a.png', checks.astype(np.uint8))
    found = decode_image(tmp_path / 'a.png', 8, 1, 'a')
    assert np.abs(found.astype(float) - 127.5).max() <= 2


def test_exif_orientation(tmp_path):
    left_bright = np.zeros((16, 32, 3), np.uint8)
    left_bright[:, :16] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to view": what was left is then on top
    save(tmp_path / 'a.jpg', left_bright, exif=exif, quality=95)
    turned = decode_image(tmp_path / 'a.jpg', None, 3, 'a')
    assert turned.shape == (32, 16, 3)
    assert turned[:12].mean() > 240 > 10 > turned[20:].mean()
    assert decode_image(tmp_path / 'a.jpg', None, 3, 'a', orient=False).shape == (16, 32, 3)


def test_a_large_jpeg_is_decoded_small_and_still_right(tmp_path):
    ramp = np.repeat(np.linspace(0, 255, 512).astype(np.uint8)[None, :, None], 384, 0).repeat(3, 2)
    save(tmp_path / 'a.jpg', ramp, quality=95)
    found = decode_image(tmp_path / 'a.jpg', 32, 3, 'a').astype(float)
    want = ramp[0, 64:448, 0].reshape(32, 12).mean(1)  # the middle 384 of 512 columns, 12 to a pixel
    assert np.abs(found - want[None, :, None]).max() < 2


def test_a_jpeg_little_larger_than_asked_for_keeps_its_detail(tmp_path):
    save(tmp_path / 'a.jpg', noise(100, 100, 3), quality=95)
    with Image.open(tmp_path / 'a.jpg') as whole:
        want = np.asarray(whole.resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(tmp_path / 'a.jpg', 64, 3, 'a'), want)


@pytest.mark.parametrize(('channels', 'want'), [(1, [[[255], [76]]]), (3, [[[255] * 3, [255, 0, 0]]]), (4, None)])
def test_channels_and_transparency(tmp_path, channels, want):
    pixels = np.array([[[0, 0, 0, 0], [255, 0, 0, 255]]], np.uint8)  # transparent black, red
    save(tmp_path / 'a.png', pixels)
    found = decode_image(tmp_path / 'a.png', None, channels, 'a')
    np.testing.assert_array_equal(found, pixels if want is None else want)


def test_grey_and_palette_files_become_colour(tmp_path):
    grey = save(tmp_path / 'grey.png', noise(4, 4))
    np.testing.assert_array_equal(decode_image(tmp_path / 'grey.png', 4, 3, 'a'), grey[..., None].repeat(3, -1))
    colours = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)
    Image.fromarray(colours).convert('P', palette=Image.Palette.ADAPTIVE).save(tmp_path / 'palette.png')
    np.testing.assert_array_equal(decode_image(tmp_path / 'palette.png', None, 3, 'a'), colours)


def test_unreadable_files_are_named(pets):
    root, _ = pets
    data = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(data, 'JPEG')
    for content in (b'', b'text', data.getvalue()[:-500]):
        (root / 'train' / 'dog' / 'c.png').write_bytes(content)
        source = image_folder(dir=str(root), image_size=8).splits['train']
        source[np.array([0, 1])]
        with pytest.raises(BadRecordError, match=r'train/dog/c\.png, record 2: cannot be decoded'):
            source[np.arange(3)]


def test_sixteen_bit_files_are_refused_not_clipped(tmp_path):
    save(tmp_path / 'a.png', np.full((4, 4), 3000, np.uint16))
    with pytest.raises(UsageError, match='a has more than 8 bits a channel'):
        decode_image(tmp_path / 'a.png', 4, 1, 'a')


def test_folders_that_are_not_a_data_set(tmp_path, pets):
    root, _ = pets
    with pytest.raises(UsageError, match='there is no folder'):
        image_folder(dir=str(tmp_path / 'none'), image_size=8)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UsageError, match='empty holds no images'):
        image_folder(dir=str(tmp_path / 'empty'), image_size=8)
    save(root / 'val' / 'fox' / '1.png', noise(8, 8, 3))
    with pytest.raises(UsageError, match=r'train and .*val have different classes: fox in one of them only'):
        image_folder(dir=str(root), image_size=8)
    (root / 'train' / 'fox').mkdir()
    with pytest.raises(UsageError, match=r'the class folders fox of .*train hold no images'):
        image_folder(dir=str(root), image_size=8)


@pytest.mark.parametrize('arguments', [{'image_size': 0}, {'image_size': 8, 'channels': 2}, {'image_size': 8, 'workers': 0}])
def test_arguments_out_of_range(pets, arguments):
    with pytest.raises(UsageError, match='out of range'):
        image_folder(dir=str(pets[0]), **arguments)


def test_importing_the_sources_is_light():
    names = ['digits', 'idx', 'npz', 'table', 'image_folder', 'tfds']
    code = f'import sys\nfrom research.data.sources import {", ".join(names)}\nprint(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {'jax', 'sklearn', 'tensorflow_datasets', 'pyarrow', 'PIL', 'tensorflow'} & set(loaded)
