"""From text to token numbers, with the characters that each token stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch


class Tokens(NamedTuple):
    """ids and, for each, its characters (start, end), end exclusive; (0, 0) for tokens such as [CLS]."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class CharTokenizer:
    """One token a character; number 0 pads, 1 stands for every character outside the vocabulary.

    >>> tokenizer = CharTokenizer("ab")
    >>> tokenizer("abc").ids
    [2, 3, 1]
    """

    PADDING, UNKNOWN = 0, 1
    specials = 0  # tokens that it adds to a text

    def __init__(self, characters: Sequence[str]):
        self.characters = list(characters)
        self._ids = {character: i for i, character in enumerate(self.characters, 2)}

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, min_count: int = 2) -> CharTokenizer:
        """The characters that occur at least ``min_count`` times; rarer ones train the unknown character."""
        counts = Counter(character for text in texts for character in text)
        return cls(sorted(character for character, n in counts.items() if n >= min_count))

    def __len__(self) -> int:
        return 2 + len(self.characters)

    def pairs(self, texts: Iterable[str], *, min_count: int = 2) -> torch.Tensor:
        """The pairs of neighbouring tokens that occur at least ``min_count`` times: int64, first * len(self) + second."""
        counts: Counter[tuple[int, int]] = Counter()
        for text in texts:
            counts.update(pairwise(self(text).ids))
        codes = [a * len(self) + b for (a, b), n in counts.items() if n >= min_count]
        return torch.tensor(sorted(codes), dtype=torch.int64)

    def __call__(self, text: str) -> Tokens:
        ids = [self._ids.get(character, self.UNKNOWN) for character in text]
        return Tokens(ids, [(i, i + 1) for i in range(len(text))])


class PretrainedTokenizer:
    """A fast Hugging Face tokenizer, which alone knows the characters of each token."""

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"supy.events: {type(tokenizer).__name__} is a slow tokenizer, expected a fast one, "
                "because only fast tokenizers give the characters of each token"
            )
        self.tokenizer = tokenizer
        self.PADDING = tokenizer.pad_token_id or 0
        self.specials = tokenizer.num_special_tokens_to_add()

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: str) -> Tokens:
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        return Tokens(encoded["input_ids"], [tuple(pair) for pair in encoded["offset_mapping"]])

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
