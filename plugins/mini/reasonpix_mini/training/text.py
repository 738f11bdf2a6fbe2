"""The tiny CLIP tokenizers and text encoders of the mini diffusion models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from reasonpix_mini import lexicon, world

WIDTH = 64
"""Of the text states; the phrase embedding (`pooler_output`) has the same width."""

LENGTH = 24
"""Longest prompt of the mini GLIGEN, in tokens with start and end."""

START, END = "<|startoftext|>", "<|endoftext|>"


def names() -> set[str]:
    """The words that captions and phrases are made of."""
    words = {"a", "an", "and", ",", "the", "picture", "photo", "of", "with"}
    for category in world.categories().values():
        for name in (category.name, category.plural, *category.synonyms):
            words.update(name.lower().split())
    return words


def instructions() -> set[str]:
    """The words and marks of instructions, direct and reasoning; not those of held-out hints."""
    texts = [*lexicon.templates()]
    for category in world.categories().values():
        texts += [*category.references, *category.hints]
    return set(re.findall(r"[a-z]+|[^a-z\s]", " ".join(texts).lower()))


def tokenizer(words: Iterable[str], length: int = LENGTH) -> CLIPTokenizer:
    """A byte-level BPE with one token for each of `words`, and texts of at most `length` tokens.

    Every other word is spelled by pieces, at worst byte by byte, so any text encodes.
    """
    merges = _merges(sorted(words))
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens last.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, merges)]
    ordered = [*dict.fromkeys(tokens), START, END]
    vocabulary = {token: number for number, token in enumerate(ordered)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until each word is one token, the most frequent pair first.

    Written out because the trainer of `tokenizers` breaks ties differently from run to run.
    """
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in spelled:
            for place in range(len(pieces) - 1, 0, -1):
                if (pieces[place - 1], pieces[place]) == best:
                    pieces[place - 1 : place + 1] = ["".join(best)]
    return merges


def encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: two layers, `WIDTH` wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            projection_dim=WIDTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
