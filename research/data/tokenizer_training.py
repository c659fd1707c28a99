"""The tokenizers a config can name: trained on the training texts, or read from a file.

    config.data.tokenizer = 'byte'
    config.data.tokenizer = 'bpe(vocabulary_size=4096)'                 # byte-level, as GPT-2's; exact on any text
    config.data.tokenizer = 'huggingface(path="gpt2/tokenizer.json")'

Each component is called with the training texts (any iterable of str that can be gone through again). The same texts and
arguments give the same tokenizer on every machine, for any number of threads; what was trained is kept in the private cache
folder under a digest of the texts, the arguments and the library's version. Trained vocabularies begin with seven special
tokens in the order pad 0, bos 1, eos 2, unknown 3, mask 4, cls 5, sep 6 (byte-level kinds leave `unknown` out).

On 40 MB of English `bpe(vocabulary_size=8192)` trains in 24 s of processor time and encodes about 2 MB a second and core;
`wordpiece` 1.3 MB, `characters` 50 MB and `byte` 100 MB (a shared 2.8 GHz Xeon).
"""

import collections
import importlib
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from research.core import files
from research.core.errors import UsageError, nearest
from research.data.source import Tokenizer
from research.data.tokenizers import ENTRIES, ROLES, Bytes, Characters, HuggingFace, SentencePiece, TokenIds, special_ids

BYTE_LEVEL_NAMES: dict[str, str] = {role: f'<{role}>' for role in ROLES if role != 'unknown'}
WORDPIECE_NAMES: dict[str, str] = dict(
    zip(ROLES, ('[PAD]', '[BOS]', '[EOS]', '[UNK]', '[MASK]', '[CLS]', '[SEP]'), strict=True)
)
ALPHABET_LIMIT = 1000  # as in BERT's training: rarer characters are unknown, however often a text repeats them

log = logging.getLogger(__name__)


def byte(texts: Iterable[str], /) -> Tokenizer:
    """The bytes of UTF-8: nothing to train, nothing unknown, V = 264."""
    return Bytes()


def bpe(texts: Iterable[str], /, *, vocabulary_size: int = 8192, min_frequency: int = 2) -> Tokenizer:
    """Byte-level byte-pair encoding with GPT-2's splitting (Sennrich et al., 2016; Radford et al., 2019, section 2.2).

    Args:
      texts: the training texts.
      vocabulary_size: V at most: 6 special tokens, 256 bytes, and merges as long as a pair occurs often enough.
      min_frequency: how often a pair must occur to be merged.

    Raises:
      UsageError: fewer than 263 tokens.
    """
    _check_size('bpe', vocabulary_size, len(BYTE_LEVEL_NAMES) + 256 + 1)
    arguments = {'vocabulary_size': vocabulary_size, 'min_frequency': min_frequency}
    return _trained('bpe', texts, arguments, _train_bpe, BYTE_LEVEL_NAMES)


def wordpiece(texts: Iterable[str], /, *, vocabulary_size: int = 8192, lowercase: bool = True) -> Tokenizer:
    """WordPiece with BERT's splitting and normalisation (Devlin et al., 2019): words, and '##' before what continues one.

    Args:
      texts: the training texts.
      vocabulary_size: V at most.
      lowercase: lower the case and strip accents, as the uncased models do.

    Raises:
      UsageError: fewer tokens than special ones.
    """
    _check_size('wordpiece', vocabulary_size, len(ROLES) + 1)
    arguments = {'vocabulary_size': vocabulary_size, 'lowercase': lowercase}
    return _trained('wordpiece', texts, arguments, _train_wordpiece, WORDPIECE_NAMES)


def characters(texts: Iterable[str], /, *, vocabulary_size: int = 8192, lowercase: bool = False) -> Tokenizer:
    """One id for each of the most frequent characters; the others are unknown.

    Args:
      texts: the training texts.
      vocabulary_size: V at most; characters of equal count are taken in the order of their code points.
      lowercase: lower the case.

    Raises:
      UsageError: fewer tokens than special ones.
    """
    _check_size('characters', vocabulary_size, len(ROLES) + 1)
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text.lower() if lowercase else text)
    kept = ''.join(_most_frequent(counts, vocabulary_size - len(ROLES)))
    definition = json.dumps({'characters': kept, 'lowercase': lowercase}).encode()
    return Characters(definition, {role: i for i, role in enumerate(ROLES)})


def huggingface(texts: Iterable[str], /, *, path: str) -> Tokenizer:
    """A tokenizer.json of the `tokenizers` library, as published models bring one.

    Args:
      texts: not read.
      path: the file, or a folder that holds tokenizer.json. tokenizer_config.json and special_tokens_map.json beside it tell
        which token has which role; without them the usual names do ('[PAD]', '<s>', '<|endoftext|>', ...).

    Raises:
      UsageError: there is no such file, or it is no tokenizer.
    """
    file = _file_at(path, 'tokenizer.json')
    definition = file.read_bytes()
    try:
        vocabulary = _vocabulary(json.loads(definition))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'{file} is not a tokenizer of the library tokenizers', 'give the tokenizer.json of a model'
        ) from error
    return HuggingFace(definition, special_ids(vocabulary, _declared(file.parent)))


def sentencepiece(texts: Iterable[str], /, *, path: str) -> Tokenizer:
    """A model of the `sentencepiece` library, which must be installed.

    Args:
      texts: not read.
      path: the .model file, or a folder that holds tokenizer.model.

    Raises:
      UsageError: there is no such file, it is no model, or the library is missing.
    """
    file = _file_at(path, 'tokenizer.model')
    try:
        return SentencePiece(file.read_bytes())
    except RuntimeError as error:
        raise UsageError(f'{file} is not a model of the library sentencepiece', 'give the .model file') from error


def token_ids(texts: Iterable[str], /, *, vocabulary_size: int, eos: int | None = None) -> Tokenizer:
    """Ids without text, for token files whose tokenizer is not at hand (`tokens_memmap`): 7 decodes to '7'.

    Args:
      texts: not read.
      vocabulary_size: V; what the model's embedding needs.
      eos: the id that ends a document, if one does.
    """
    _check_size('token_ids', vocabulary_size, 1)
    definition = json.dumps({'vocabulary_size': vocabulary_size}).encode()
    return TokenIds(definition, {} if eos is None else {'eos': eos})


def _check_size(name: str, size: int, least: int) -> None:
    if size < least:
        raise UsageError(f'tokenizer {name!r}: vocabulary_size={size} is too small', f'give at least {least}')


def _trained(
    name: str, texts: Iterable[str], arguments: dict[str, Any], train: Callable[..., str], names: dict[str, str]
) -> Tokenizer:
    """The tokenizer that `train(texts, names, **arguments)` defines, from the cache where it has been trained before."""
    version = importlib.import_module('tokenizers').__version__
    digest = files.digest(itertools.chain([name, json.dumps(arguments, sort_keys=True), version], texts))
    folder = files.cache_folder('tokenizers')
    problem = files.problem_of_folder(folder)
    path = folder / f'{digest}.json'
    if problem is None and path.is_file():
        definition = path.read_text(encoding='utf-8')
    else:
        definition = train(texts, names, **arguments)
        if problem is None:
            files.write_atomically(path, definition)
        else:
            log.warning('the trained tokenizer is not kept: %s', problem)
    return HuggingFace(definition.encode(), special_ids(_vocabulary(json.loads(definition)), names))


def _train_bpe(texts: Iterable[str], names: dict[str, str], vocabulary_size: int, min_frequency: int) -> str:
    """The tokenizer.json of a byte-level BPE."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=min_frequency,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library.to_str()


def _train_wordpiece(texts: Iterable[str], names: dict[str, str], vocabulary_size: int, lowercase: bool) -> str:
    """The tokenizer.json of a WordPiece.

    The library numbers the pieces '##x' as it meets them in a hash table, so two trainings differ. Here they are given to the
    trainer in a fixed order (as special tokens, the only way) and are ordinary pieces of the tokenizer that is built after it.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library = Library(models.WordPiece(unk_token=names['unknown']))
    library.normalizer, library.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(''.join(normalizer.normalize_str(text).split()))
    alphabet = sorted(_most_frequent(counts, min(ALPHABET_LIMIT, max(1, (vocabulary_size - len(names)) // 2))))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*names.values(), *(f'##{character}' for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return _with_vocabulary(library.get_vocab(), names, normalizer, decoders.WordPiece())


def _with_vocabulary(vocabulary: dict[str, int], names: dict[str, str], normalizer: Any, decoder: Any) -> str:
    """The tokenizer.json of a WordPiece with this vocabulary, in which only `names` are special."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    built = Library(models.WordPiece(vocab=vocabulary, unk_token=names['unknown'], max_input_chars_per_word=100))
    built.normalizer, built.pre_tokenizer, built.decoder = normalizer, pre_tokenizers.BertPreTokenizer(), decoder
    built.add_special_tokens(list(names.values()))
    return built.to_str()


def _most_frequent(counts: collections.Counter[str], limit: int) -> list[str]:
    """The `limit` most frequent characters, those of equal count by code point."""
    return [character for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]]


def _vocabulary(definition: dict[str, Any]) -> dict[str, int]:
    """Token to id of a tokenizer.json, added tokens included."""
    vocabulary = definition['model']['vocab']
    if isinstance(vocabulary, list):  # a unigram model lists its pieces with their scores
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    return vocabulary | {token['content']: token['id'] for token in definition['added_tokens']}


def _declared(folder: pathlib.Path) -> dict[str, str]:
    """The special tokens by role that the files beside a tokenizer.json declare."""
    found = {}
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
        entries = files.read_json(folder / name) if (folder / name).is_file() else {}
        for role, entry in ENTRIES.items():
            token = entries.get(entry)
            token = token.get('content') if isinstance(token, dict) else token
            found |= {role: token} if token else {}
    return found


def _file_at(path: str, name: str) -> pathlib.Path:
    """The file at `path`, or `name` in the folder at `path`."""
    file = pathlib.Path(path).expanduser()
    file = file / name if file.is_dir() else file
    if not file.is_file():
        there = [p.name for p in file.parent.iterdir() if p.is_file()] if file.parent.is_dir() else []
        raise UsageError(f'there is no tokenizer file {file}', nearest(file.name, there))
    return file
