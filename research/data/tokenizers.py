"""Tokenizers: between text and token ids. What each of the four kinds is, and how it is saved and loaded.

Shape letters: V vocabulary, T tokens of one text.

    tokenizer = Bytes()                                  # ids 0..255 are the bytes, 256.. the special tokens; V = 264
    tokenizer.encode(['hé'])                             # [array([104, 195, 169], dtype=int32)]
    tokenizer.decode([104, 195, 169, tokenizer.eos])     # 'hé'
    tokenizer.save('folder')
    load('folder').fingerprint == tokenizer.fingerprint  # True

`encode` never adds a special token and never makes one from text: a document that holds the words '<eos>' gets the ids of
those five characters. `byte_lengths` says how many bytes of UTF-8 each token stands for, so that a loss in nats becomes bits
per byte whatever the tokenizer. For byte-level kinds (`Bytes`, byte-level BPE) the lengths of a text's tokens add up to
`len(text.encode())` exactly. Kinds that normalise lose bytes: WordPiece drops white space (and case and accents where it
lowers), `Characters` and others write an unknown token of length 0 for what they do not know, SentencePiece adds a space in
front; what is lost makes bits per byte look worse, not better.

The components that configs name (`byte`, `bpe`, ...) are in `tokenizer_training.py`.
"""

import importlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.core import files
from research.core.errors import UsageError
from research.data.source import Tokenizer

ROLES = ('pad', 'bos', 'eos', 'unknown', 'mask', 'cls', 'sep')
OWN_FILE = 'fulcrum_tokenizer.json'  # kind and special ids, beside the kind's own file
SPACE = '▁'  # how SentencePiece and its kin write a space


class Base:
    """What all kinds share; a kind adds `encode` and `decode`.

    Attributes:
      kind: the name under which `load` finds the class.
      file: the name of the file that holds `definition`.
      definition: everything the kind is made of, as the bytes of that file.
      special: id of each special token by role; a role that is missing is None as an attribute.
    """

    kind = ''
    file = 'definition.json'

    def __init__(self, definition: bytes, special: Mapping[str, int], byte_lengths: np.ndarray):
        self.definition, self.special = definition, dict(special)
        self.byte_lengths = byte_lengths.astype(np.int32)  # (V,)
        self.vocabulary_size = len(byte_lengths)
        self.pad, self.bos, self.eos, self.unknown = (special.get(role) for role in ROLES[:4])
        self.mask, self.cls, self.sep = (special.get(role) for role in ROLES[4:])
        self.fingerprint = files.digest([self.kind, json.dumps(self.special, sort_keys=True), definition])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (T,) int32, without special tokens."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special tokens are left out."""
        raise NotImplementedError

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the definition and the special ids into `folder`, which is made where it is missing."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file).write_bytes(self.definition)
        files.write_json(folder / OWN_FILE, {'kind': self.kind, 'special': self.special, 'fingerprint': self.fingerprint})


class Bytes(Base):
    """The bytes of UTF-8 themselves: ids 0..255, then the special tokens in the order of `ROLES`, one id unused; V = 264."""

    kind, file = 'bytes', 'bytes.json'

    def __init__(self, definition: bytes = b'{}', special: Mapping[str, int] | None = None):
        roles = {role: 256 + i for i, role in enumerate(ROLES) if role != 'unknown'}  # no byte is unknown
        super().__init__(definition, special or roles, np.repeat([1, 0], [256, 8]))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The bytes of each text, (T,) int32."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64)
        return bytes(ids[ids < 256].astype(np.uint8)).decode(errors='replace')


class Characters(Base):
    """One id a character: the special tokens first, then the characters of the definition in its order.

    The definition is JSON: {"characters": "etaoin...", "lowercase": false}. A character that is not in it becomes `unknown`.
    """

    kind, file = 'characters', 'characters.json'

    def __init__(self, definition: bytes, special: Mapping[str, int]):
        fields = json.loads(definition)
        self.characters, self.lowercase = fields['characters'], fields['lowercase']
        first = len(ROLES)
        lengths = [0] * first + [len(character.encode()) for character in self.characters]
        super().__init__(definition, special, np.array(lengths))
        self._ids = np.full(0x110000, special['unknown'], np.int32)  # by code point: 4.5 MB
        self._ids[_code_points(self.characters)] = np.arange(first, first + len(self.characters))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text's characters, (T,) int32."""
        return [self._ids[_code_points(text.lower() if self.lowercase else text)] for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The characters; special and unknown tokens are left out."""
        first = len(ROLES)
        return ''.join(
            self.characters[i - first] for i in np.asarray(ids, np.int64).tolist() if first <= i < self.vocabulary_size
        )


class HuggingFace(Base):
    """A tokenizer of the `tokenizers` library; the definition is its tokenizer.json.

    Truncation and padding that the file asks for are switched off: they belong to a batch, not to a text.
    """

    kind, file = 'huggingface', 'tokenizer.json'

    def __init__(self, definition: bytes, special: Mapping[str, int]):
        import tokenizers  # imported late: most runs need none

        self._library = tokenizers.Tokenizer.from_str(definition.decode())
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # '<eos>' in a text is text
        super().__init__(definition, special, _byte_lengths(json.loads(definition), self._library.get_vocab()))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (T,) int32; the library goes over the texts in threads."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` as the file's decoder joins it; special tokens are left out."""
        return self._library.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)


class SentencePiece(Base):
    """A model of the `sentencepiece` library (an extra); the definition is the .model file."""

    kind, file = 'sentencepiece', 'tokenizer.model'

    def __init__(self, definition: bytes, special: Mapping[str, int] | None = None):
        try:
            library = importlib.import_module('sentencepiece')
        except ImportError as error:
            raise UsageError("tokenizer 'sentencepiece' needs the library of that name", 'pip install sentencepiece') from error
        self._model = library.SentencePieceProcessor(model_proto=definition)
        lengths = [self._byte_length(i) for i in range(self._model.get_piece_size())]
        super().__init__(definition, special or self._special(), np.array(lengths))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (T,) int32."""
        return [np.array(ids, np.int32) for ids in self._model.encode(list(texts))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; control and unknown tokens are left out."""
        ids = np.asarray(ids, np.int64)
        left_out = [i for i in self.special.values() if i is not None]
        return self._model.decode(ids[~np.isin(ids, left_out)].tolist())

    def _byte_length(self, token: int) -> int:
        model = self._model
        if model.is_byte(token):
            return 1
        silent = model.is_control(token) or model.is_unknown(token) or model.is_unused(token)
        return 0 if silent else len(model.id_to_piece(token).replace(SPACE, ' ').encode())

    def _special(self) -> dict[str, int]:
        """The ids that the model itself declares, and those of the usual names."""
        model = self._model
        declared = {'pad': model.pad_id(), 'bos': model.bos_id(), 'eos': model.eos_id(), 'unknown': model.unk_id()}
        pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size()) if model.is_control(i)}
        named = special_ids(pieces, {})
        return named | {role: i for role, i in declared.items() if i >= 0}


class TokenIds(Base):
    """Numbers instead of text: '7 12' is [7, 12]. No token stands for bytes, so there are no bits per byte."""

    kind, file = 'token_ids', 'token_ids.json'

    def __init__(self, definition: bytes, special: Mapping[str, int]):
        super().__init__(definition, special, np.zeros(json.loads(definition)['vocabulary_size']))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The numbers in each text, (T,) int32."""
        return [np.array(text.split(), np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The ids, written out; special tokens are left out."""
        return ' '.join(str(i) for i in np.asarray(ids, np.int64).tolist() if i not in self.special.values())


KINDS = {kind.kind: kind for kind in (Bytes, Characters, HuggingFace, SentencePiece, TokenIds)}

NAMES = {  # the names by which published vocabularies call their special tokens, most telling first
    'pad': ('[PAD]', '<pad>', '<|pad|>', '<|finetune_right_pad_id|>'),
    'bos': ('[BOS]', '<bos>', '<s>', '<|begin_of_text|>', '<|startoftext|>', '<|endoftext|>'),
    'eos': ('[EOS]', '<eos>', '</s>', '<|end_of_text|>', '<|endoftext|>'),
    'unknown': ('[UNK]', '<unk>', '<unknown>'),
    'mask': ('[MASK]', '<mask>'),
    'cls': ('[CLS]', '<cls>'),
    'sep': ('[SEP]', '<sep>'),
}
ENTRIES = {'unknown': 'unk_token'} | {role: f'{role}_token' for role in ROLES if role != 'unknown'}  # in the published files


def special_ids(vocabulary: Mapping[str, int], declared: Mapping[str, str]) -> dict[str, int]:
    """The id of each role: the token that `declared` names for it, else the first of the usual names that exists."""
    found = {}
    for role in ROLES:
        names = (declared[role],) if role in declared else NAMES[role]
        present = [vocabulary[name] for name in names if name in vocabulary]
        found |= {role: present[0]} if present else {}
    return found


def load(folder: str | pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`.

    Raises:
      UsageError: there is none, or its files do not belong together.
    """
    folder = pathlib.Path(folder)
    if not (folder / OWN_FILE).is_file():
        raise UsageError(
            f'{folder} holds no tokenizer ({OWN_FILE} is missing)', 'give the folder that a tokenizer was saved to'
        )
    record = files.read_json(folder / OWN_FILE)
    kind: Any = KINDS[record['kind']]
    tokenizer = kind((folder / kind.file).read_bytes(), record['special'])
    if tokenizer.fingerprint != record['fingerprint']:
        raise UsageError(f'the tokenizer in {folder} is not the one that was saved: {kind.file} was changed', 'save it again')
    return tokenizer


def _code_points(text: str) -> np.ndarray:
    """The code point of each character, (T,) uint32."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')


def _byte_lengths(definition: dict[str, Any], vocabulary: Mapping[str, int]) -> np.ndarray:
    """The bytes each token of a tokenizer.json stands for, (V,) int32."""
    model = definition['model']
    unknown = model.get('unk_token') if model.get('unk_id') is None else model['vocab'][model['unk_id']][0]
    is_special = {token['content']: token['special'] for token in definition['added_tokens']}
    byte_level = _mentions_byte_level([definition['pre_tokenizer'], definition['decoder']])
    prefix, suffix = model.get('continuing_subword_prefix') or '', model.get('end_of_word_suffix') or ''
    lengths = np.zeros(1 + max(vocabulary.values()), np.int32)
    for token, place in vocabulary.items():
        if is_special.get(token) or token == unknown:
            continue
        if token in is_special:  # added as plain text
            lengths[place] = len(token.encode())
        elif byte_level:  # each character of such a token writes one byte
            lengths[place] = len(token.removesuffix(suffix))
        elif model.get('byte_fallback') and re.fullmatch('<0x[0-9A-F]{2}>', token):
            lengths[place] = 1
        else:
            lengths[place] = len(token.removeprefix(prefix).removesuffix(suffix).replace(SPACE, ' ').encode())
    return lengths


def _mentions_byte_level(part: Any) -> bool:
    """Whether a pre-tokenizer or decoder is, or is made of, a byte-level one."""
    if isinstance(part, dict):
        return part.get('type') == 'ByteLevel' or any(_mentions_byte_level(value) for value in part.values())
    return isinstance(part, list) and any(_mentions_byte_level(value) for value in part)
