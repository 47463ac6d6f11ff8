"""The miniature's tokenizer: CLIP's byte-pair kind, its vocabulary learnt from captions to keep it small.

A word of the world is one token; any other word falls apart into letters, so every prompt can be read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from deploy.miniatures import world

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # tokens of a block, as CLIP has


def build() -> Tokenizer:
    """Learn the merges from 4,000 captions; the same on every run."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=[START, END],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_captions(), trainer)
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """The tokenizer kept in `folder`, learnt first where there is none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        build().save(str(path))
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """A block of 77 ids: start, the words, end, and the end again to fill it."""
    start, end = (tokenizer.token_to_id(mark) for mark in (START, END))
    ids = [start, *tokenizer.encode(text, add_special_tokens=False).ids[: LENGTH - 2]]
    return ids + [end] * (LENGTH - len(ids))


def batch(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Ids [B, 77] of several texts."""
    return torch.tensor([encode(tokenizer, text) for text in texts])


def _captions() -> list[str]:
    dice = random.Random(0)
    grounds, words = list(world.GROUNDS), list(world.OBJECTS)
    drawn = [
        world.caption(dice, dice.sample(words, dice.randint(1, 3)), dice.choice(grounds)) for _ in range(4000)
    ]
    # A letter at the end of a word is a token of its own: else unknown words could not be spelt.
    return drawn + [letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for _ in range(3)]
