"""The tiny CLIP tokenizer and text encoder of the mini GLIGEN."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from reasonpix_mini import world

WIDTH = 64
"""Of the text states; the phrase embedding (`pooler_output`) has the same width."""

LENGTH = 24
"""Longest text, in tokens with start and end."""

START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> CLIPTokenizer:
    """A byte-level BPE with one token for each word of the world.

    Every other word is spelled by pieces, at worst byte by byte, so any text encodes.
    """
    words = {"a", "an", "and", ",", "the", "picture", "photo", "of", "with"}
    for category in world.categories().values():
        for name in (category.name, category.plural, *category.synonyms):
            words.update(name.lower().split())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))  # type: ignore[call-arg]
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(sorted(words), trainer)
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens last.
    merges = [line.split() for line in _merges(bpe)]
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(m) for m in merges)]
    vocabulary = {
        token: number for number, token in enumerate([*dict.fromkeys(tokens), START, END])
    }
    return CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(merge) for merge in merges], model_max_length=LENGTH
    )


def _merges(bpe: Tokenizer) -> list[str]:
    import json

    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: two layers, `WIDTH` wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
