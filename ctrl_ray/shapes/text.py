"""The tokenizer and the text encoders of the pipelines that `ctrl_ray.shapes.make` makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ctrl_ray.offline.shapes import PROMPTS

MAX_PROMPT_TOKENS = 8
"""Start, three words, end, and three more, which a word in pieces takes up."""

Encoder = TypeVar("Encoder", bound=PreTrainedModel)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocabulary and merges that turn a word of the prompts into one token, any other into its bytes.

    "green" stays in four pieces, because the "re" of "red" is merged first. It fits: no prompt has over 8 tokens.
    """
    alphabet = list(bytes_to_unicode().values())
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(word for prompt in PROMPTS for word in prompt.split(" ")):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    merges = list(dict.fromkeys(merges))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_PROMPT_TOKENS)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer, kind: type[Encoder], width: int = 64) -> Encoder:
    """Two layers."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
