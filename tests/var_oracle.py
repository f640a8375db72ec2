"""VAR a second time, by the explicit attention map: hooks and an attention function of its own, nothing of patchkit.

Written from the formula (arXiv 2503.03321) to be compared with the recipe. Slow and plain.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from tiny.vlms import VLMS
from torch import Tensor

NAME = "var_oracle"
SPIKE = 100.0


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The blocks of the language model, in order."""
    found = [m for n, m in model.named_modules() if re.search(r"(language_model|text_model)\.layers\.\d+$", n)]
    assert found
    return found


def image_mask(model: Any, ids: Tensor) -> Tensor:
    marks = [getattr(model.config, n) for n in ("image_token_id", "video_token_id") if hasattr(model.config, n)]
    return torch.isin(ids, torch.tensor([m for m in marks if m is not None]))


def phi(x: Tensor, dims: list[int]) -> Tensor:
    x = x.float()
    return x[..., dims].abs().amax(-1) / (x.pow(2).mean(-1) + 1e-6).sqrt()


class Planted:
    """While it stands, chosen tokens of a prompt (B, N bool) carry a spike in one channel when they enter block 0."""

    def __init__(self, model: Any, where: Tensor, channel: int, size: float = SPIKE) -> None:
        self.where, self.channel, self.size = where, channel, size
        self.handle = decoder_layers(model)[0].register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        here = self.where[:, past : past + hidden.shape[1]]
        here = torch.nn.functional.pad(here, (0, hidden.shape[1] - here.shape[1]))
        if len(here) < len(hidden):  # beams
            here = here.repeat_interleave(len(hidden) // len(here), 0)
        hidden = hidden.clone()
        hidden[..., self.channel] += self.size * here
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def __enter__(self) -> Planted:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


class Oracle:
    """The method itself, for models whose prompt is given as ``input_ids``."""

    def __init__(
        self,
        model: Any,
        dims: list[int],
        layers: range | list[int],
        *,
        tau: float = 20.0,
        rho: float = 0.5,
        recycle: float = 0.6,
        min_visual: float = 0.2,
        require: bool = True,
        track: bool = False,
    ) -> None:
        self.model, self.dims, self.layers = model, dims, set(layers)
        self.tau, self.rho, self.recycle, self.least = tau, rho, recycle, min_visual
        self.require, self.track = require, track
        self.sinks: dict[int, Tensor] = {}
        self.selected: dict[int, Tensor] = {}
        self.rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # before, after, sink keys, target keys

    def __enter__(self) -> Oracle:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        self.before = self.model.config.get_text_config()._attn_implementation
        self.model.set_attn_implementation({"text_config": NAME})
        blocks = decoder_layers(self.model)
        self.handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self.handles += [
            b.register_forward_pre_hook(lambda m, a, k, i=i: self._enter(i, a, k), with_kwargs=True)
            for i, b in enumerate(blocks)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.model.set_attn_implementation({"text_config": self.before})

    def _begin(self, module: Any, args: Any, kwargs: Any) -> None:
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        new = image_mask(self.model, ids) & (ids.shape[1] > 1)
        self.visual = new if not self.past else torch.cat((self.visual[:, : self.past], new), 1)
        mask = kwargs.get("attention_mask")
        total = self.past + ids.shape[1]
        if mask is None or mask.ndim != 2:
            assert mask is None or not self.past or mask.ndim == 4
            fresh = torch.ones_like(ids, dtype=torch.bool)
            mask = fresh if not self.past else torch.cat((self.real[:, : self.past], fresh), 1)
        self.real = mask[:, :total].bool()

    def _enter(self, layer: int, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        new = phi(hidden, self.dims) >= self.tau
        if hidden.shape[1] == 1 and self.past and not self.track:
            new = torch.zeros_like(new)
        known = self.sinks.get(layer) if self.past else None
        self.sinks[layer] = new if known is None else torch.cat((known[:, : self.past], new), 1)

    def _attention(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1).float(), v.repeat_interleave(group, 1).float()
        s = q.float() @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is not None:
            s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask
        elif q.shape[2] > 1:
            s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        w = torch.softmax(s, -1).nan_to_num(0.0)
        if module.layer_idx in self.layers:
            w = self._edited(w, module.layer_idx)
        return (w @ v).to(q.dtype).transpose(1, 2), None

    def _edited(self, w: Tensor, layer: int) -> Tensor:
        n, keys = w.shape[2:]
        total = self.visual.shape[1]
        gone = max(0, total - keys)

        def fit(x: Tensor) -> Tensor:
            x = x[:, gone : gone + keys]
            return torch.nn.functional.pad(x, (0, keys - x.shape[1]))

        real, visual = fit(self.real), fit(self.visual & self.real)
        sink = fit(self.sinks[layer]) & real
        target = visual & ~sink
        rows = ~self.visual[:, total - n :] & self.real[:, total - n :]  # text queries
        if self.require:
            rows = rows & (sink & visual).any(1)[:, None]
        out = w.clone()
        selected = torch.zeros(w.shape[:3], dtype=torch.bool)
        for b in range(w.shape[0]):
            for h in range(w.shape[1]):
                for i in rows[b].nonzero()[:, 0].tolist():
                    a = w[b, h, i]
                    a_n, a_v = a[target[b]].sum(), a[visual[b]].sum()
                    if a_v < self.least or a_n < self.rho * a_v or a_n == 0:
                        continue
                    selected[b, h, i] = True
                    budget = self.recycle * a[sink[b]].sum()
                    out[b, h, i, sink[b]] = (1 - self.recycle) * a[sink[b]]
                    out[b, h, i, target[b]] = a[target[b]] + budget * a[target[b]] / a_n
                    self.rows.append((a, out[b, h, i], sink[b], target[b]))
        self.selected[layer] = selected
        return out


def attentive(channel: int) -> Any:
    """A LLaVA whose keys grow with one channel of the hidden state and whose queries like that."""
    model = VLMS["llava"].build()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            # rotary embedding leaves the slowest pair of each head nearly alone; queries get it from every channel
            attention.k_proj.weight.mul_(0.2)
            for head in range(2):
                attention.k_proj.weight[head * 8 + 3, channel] = 2.0
            for head in range(4):
                attention.q_proj.weight[head * 8 + 3] = 0.0
                attention.q_proj.weight[head * 8 + 3, channel + 1] = 3.0
            for part in (layer.mlp.down_proj, attention.o_proj):
                part.weight.mul_(0.2)
    return model


class Sinks:
    """Plants sinks by what a prompt holds: the first token, and every eighth patch."""

    def __init__(self, model: Any, *, images: bool = True, text: bool = True, even: float = 0.0) -> None:
        self.model, self.images, self.text, self.even = model, images, text, even

    def __enter__(self) -> None:
        self.planted = Planted(self.model, torch.zeros(1, 1, dtype=torch.bool), 5, size=60.0)
        self.handle = self.model.register_forward_pre_hook(self._hook, with_kwargs=True)
        layer = self.model.model.language_model.layers[0]
        self.likes = layer.register_forward_pre_hook(self._likes, with_kwargs=True)

    def _hook(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        image = image_mask(module, ids)
        where = image & (image.cumsum(1) % 8 == 3) & self.images
        where[:, 0] |= self.text
        self.planted.where = where
        self.image = image

    def _likes(self, module: Any, args: Any, kwargs: Any) -> Any:
        """All tokens look for sinks, and half of them lie between the modes if that is asked for."""
        hidden = args[0].clone()
        hidden[..., 6] += 3.0
        hidden[:, ::2, 5] += self.even
        return (hidden, *args[1:]), kwargs

    def __exit__(self, *_: object) -> None:
        for handle in (self.planted.handle, self.handle, self.likes):
            handle.remove()
