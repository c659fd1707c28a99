"""Faults of a space shuttle's radiators (Statlog shuttle): 49,097 readings of nine sensors, 3,511 of them (7.15 %) anomalies.

The copy inside the Python package river (0.26.1, BSD-3): `python -m bench.data fetch shuttle` brings it without installing it.

    shuttle().splits['all'][np.array([0, 1])]     # {'numeric': float32 (2, 9), 'label': int32 [1, 0]}
    # numeric[0] = 50, 21, 77, 0, 28, 0, 27, 48, 22

No two readings are equal in all nine sensors; if they were, their hash would put them into the same split.
"""

import pathlib

from research.core.errors import UsageError
from research.core.files import data_folder
from research.data.source import DataSet
from research.data.sources.table import table

FILE = pathlib.Path('pip/river/datasets/shuttle.csv.gz')
CLASSES = ('normal', 'anomaly')


def shuttle(*, dir: str | None = None) -> DataSet:  # noqa: A002  the config's word
    """The readings in one split 'all': 'numeric' float32 (9,), 'label' int32: 0 normal, 1 anomaly.

    Args:
      dir: folder of shuttle.csv.gz; None: where `python -m bench.data fetch shuttle` puts it.

    Raises:
      UsageError: it is not there.
    """
    file = data_folder() / FILE if dir is None else pathlib.Path(dir).expanduser() / FILE.name
    if not file.is_file():
        raise UsageError(f'there is no {file}', 'python -m bench.data fetch shuttle')
    readings = table(path=str(file), target='anomaly', typed=True)
    return DataSet('shuttle', readings.splits, CLASSES)
