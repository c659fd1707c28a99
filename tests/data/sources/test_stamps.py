"""The stamps: a small folder of the same form, and the real one where it has been fetched."""

import numpy as np
import pytest
from PIL import Image

from research.core import registry
from research.core.errors import UsageError
from research.core.files import data_folder
from research.data import splits
from research.data.sources.stamps import FOLDER, stamps

STAMPS = {
    'animals/frog': ('A frog.\nde.utf8=Ein Frosch.\nfr.utf8=Une grenouille.\n', 'RGBA'),
    'animals/birds/duck': ('A duck.\nde.utf8=\nfr.utf8=Un canard.\n', 'RGB'),
    'food/apple': ('A frog.\nde.utf8=Noch ein Frosch.', 'LA'),
}


@pytest.fixture
def folder(tmp_path):
    """Three pictures with captions, a drawing without one and a caption without a picture."""
    for name, (text, mode) in STAMPS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix('.txt').write_text(text, encoding='utf-8')
        Image.new(mode, (40, 20), {'RGBA': (255, 0, 0, 255), 'RGB': (0, 0, 255), 'LA': (0, 0)}[mode]).save(f'{path}.png')
    (tmp_path / 'food' / 'drawing.txt').write_text('A drawing.')
    (tmp_path / 'food' / 'drawing.svg').write_text('<svg/>')
    Image.new('RGB', (4, 4)).save(tmp_path / 'food' / 'silent.png')
    return tmp_path


def whole(data):
    return data.splits['all'][np.arange(len(data.splits['all']))]


def test_pictures_captions_and_kinds(folder):
    data = stamps(dir=str(folder), size=16, languages=('en', 'de'))
    block = whole(data)
    assert (data.name, data.class_names) == ('stamps', ('animals', 'food'))
    assert block['caption'].tolist() == ['A duck.', 'A frog.', 'A frog.']
    assert block['caption_de'].tolist() == ['A duck.', 'Ein Frosch.', 'Noch ein Frosch.']  # without a translation: English
    assert block['label'].tolist() == [0, 0, 1] == data.splits['all'].labels().tolist()
    assert (block['image'].shape, block['image'].dtype) == ((3, 16, 16, 3), np.uint8)


def test_pictures_keep_their_proportions_on_white(folder):
    duck, frog, apple = whole(stamps(dir=str(folder), size=16))['image']
    for picture, colour in ((duck, (0, 0, 255)), (frog, (255, 0, 0))):
        np.testing.assert_array_equal(picture[4:12], np.broadcast_to(np.uint8(colour), (8, 16, 3)))
        np.testing.assert_array_equal(picture[[0, 3, 12, 15]], 255)
    np.testing.assert_array_equal(apple, 255)  # all transparent


def test_one_caption_is_one_key_whatever_the_language(folder):
    duck, frog, apple = stamps(dir=str(folder), size=8).splits['all'].keys()
    assert frog == apple != duck
    german = stamps(dir=str(folder), size=16, languages=('de',))
    np.testing.assert_array_equal(german.splits['all'].keys(), [duck, frog, apple])
    assert whole(german)['caption'].tolist() == ['A duck.', 'Ein Frosch.', 'Noch ein Frosch.']


def test_what_is_missing(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no stamp has a caption in 'du'\n  fix: known: de, en, fr"):
        stamps(dir=str(folder), languages=('en', 'du'))
    with pytest.raises(UsageError, match='no stamp has a caption in'):
        stamps(dir=str(folder), languages=())
    monkeypatch.setenv('FULCRUM_DATA', str(tmp_path / 'none'))
    with pytest.raises(UsageError, match=r'there are no stamps in .*\n  fix: python -m bench.data fetch stamps'):
        registry.component('source', 'stamps', 'config.data.source').build()


@pytest.mark.skipif(not (data_folder() / FOLDER).is_dir(), reason='python -m bench.data fetch stamps')
def test_the_real_folder_is_as_documented():
    data = stamps(size=8)
    assert len(data.splits['all']) == 785
    assert len(np.unique(data.splits['all'].keys())) == len(set(whole(data)['caption'])) == 674
    parts = splits.split(data, 0.1, 0.2)
    captions = {name: set(part[np.arange(len(part))]['caption']) for name, part in parts.items()}
    assert not captions['train'] & captions['test'] and not captions['train'] & captions['validation']
