"""The captions of the stamps: the first line is English, the folder is the class, a repeated caption counts once."""

import numpy as np
import pytest

from research.core.errors import UsageError
from research.data.sources.stamp_captions import FOLDER, stamp_captions


def test_captions_and_their_folders_are_read(tmp_path, monkeypatch):
    for name, text, picture in (
        ('food/a', 'A bun. \nde.utf8=Ein Brötchen.', '.png'),
        ('animals/wild/b', 'A frog.\n', '.svg'),
        ('seasonal/c', 'A frog.', '.png'),
        ('food/d', 'No picture.', '.ogg'),
    ):
        path = tmp_path / FOLDER / f'{name}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
        path.with_suffix(picture).touch()
    monkeypatch.setenv('FULCRUM_DATA', str(tmp_path))
    data = stamp_captions()
    assert data.class_names == ('animals', 'food')
    block = data.splits['all'][np.arange(2)]
    assert block['text'].tolist() == ['A frog.', 'A bun.']
    assert block['label'].tolist() == [0, 1]
    with pytest.raises(UsageError, match='there are no stamps in'):
        stamp_captions(dir=str(tmp_path / 'nothing'))
