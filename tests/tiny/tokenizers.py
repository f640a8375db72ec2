"""Tokenizers written out in code: one token a byte or character, no merges, no files."""

from __future__ import annotations

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, LlamaTokenizer, Qwen2Tokenizer, T5Tokenizer

PRINTABLE = [chr(code) for code in range(33, 127)]
SPACE = "\u2581"  # how sentencepiece writes a space

QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def byte_symbols() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def clip() -> CLIPTokenizer:
    """514 ids: every byte, every byte that ends a word, begin 512, end 513."""
    symbols = byte_symbols()
    words = symbols + [symbol + "</w>" for symbol in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def t5() -> T5Tokenizer:
    """98 ids: pad 0, end 1, unknown 2, space 3, then printable ASCII. Serves T5 and UMT5."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -2.0)]
    return T5Tokenizer(vocab=pieces + [(character, -3.0) for character in PRINTABLE], extra_ids=0)


def qwen2() -> Qwen2Tokenizer:
    """263 ids: 256 bytes, end of text 256, then the chat and vision marks (image pad 261, video pad 262)."""
    words = [*byte_symbols(), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.add_tokens(QWEN_SPECIAL, special_tokens=True)
    return tokenizer


def llama() -> LlamaTokenizer:
    """354 ids: unknown 0, begin 1, end 2, byte fall-backs, space, printable ASCII. Serves Llama and Gemma."""
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + [SPACE, *PRINTABLE]
    tokenizer = LlamaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer
