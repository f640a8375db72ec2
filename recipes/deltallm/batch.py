"""Attention of a batch, whose samples may begin at different places: one past for those that begin together."""

from __future__ import annotations

from torch import Tensor

from patchkit.recipes.deltallm.runs import Past, Rule


def by_start(starts: list[int]) -> dict[int, list[int]]:
    """Start -> the samples that begin there."""
    found: dict[int, list[int]] = {}
    for sample, start in enumerate(starts):
        found.setdefault(start, []).append(sample)
    return found


def attend_at_once(
    q: Tensor, k: Tensor, v: Tensor, starts: list[int], rule: Rule, scale: float | None
) -> tuple[Tensor, list[Past]]:
    """Attention from the last tokens of whole keys, in two phases; keeps nothing. Rows of padding are 0.

    Returns:
        (B, H, L, D), and the pasts, for what they say about themselves.
    """
    out, pasts = q.new_zeros(*q.shape[:3], v.shape[-1]), []
    offset = k.shape[2] - q.shape[2]
    for start, samples in by_start(starts).items():
        past = Past.new(samples, start, k, v)
        mine = _rows(k, samples), _rows(v, samples)
        before = max(0, offset - start)
        if before:
            past.extend(mine[0][:, :, start:offset], mine[1][:, :, start:offset], room=k.shape[2] - offset)
            past.prompt = k.shape[2] - start
        skip = max(0, start - offset)  # queries that are padding
        keys, values = (x[:, :, offset + skip :] for x in mine)
        asked = _rows(q, samples)[:, :, skip:]
        _put(out, samples, skip, past.attend(asked, keys, values, rule, scale, keep=False))
        pasts.append(past)
    return out, pasts


def _rows(x: Tensor, samples: list[int]) -> Tensor:
    return x if samples == list(range(x.shape[0])) else x[samples]


def _put(out: Tensor, samples: list[int], skip: int, result: Tensor) -> None:
    if samples == list(range(out.shape[0])):
        out[:, :, skip:] = result
    else:
        out[samples, :, skip:] = result


def begin(starts: list[int], k: Tensor, v: Tensor, room: int) -> list[Past]:
    """Pasts of a batch, with keys and values that there are already, (B, Hkv, columns, D), and room for more."""
    pasts = []
    for start, samples in by_start(starts).items():
        past = Past.new(samples, start, k, v)
        if k.shape[2] > start:
            keys, values = (_rows(x, samples)[:, :, start:] for x in (k, v))
            past.extend(keys, values, room=room)
        pasts.append(past)
    return pasts


def attend_pasts(
    pasts: list[Past], q: Tensor, k: Tensor, v: Tensor, seen: int, rule: Rule, scale: float | None
) -> Tensor:
    """Attention from new columns over what is kept, which takes them in; ``seen``: how many columns came before."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for past in pasts:
        skip = max(0, past.start - seen)
        asked, keys, values = (_rows(x, past.samples)[:, :, skip:] for x in (q, k, v))
        _put(out, past.samples, skip, past.attend(asked, keys, values, rule, scale))
    return out


def select(pasts: list[Past], sources: list[int]) -> list[Past]:
    """Pasts of a batch whose sample i was sample ``sources[i]`` before."""
    chosen = []
    for past in pasts:
        pairs = [(past.samples.index(old), new) for new, old in enumerate(sources) if old in past.samples]
        if pairs:
            places, samples = zip(*pairs, strict=True)
            chosen.append(past.select(list(places), list(samples)))
    return chosen


def expand(pasts: list[Past], columns: int) -> tuple[Tensor, Tensor]:
    """Whole keys and values of a batch, (B, Hkv, columns, D), 0 where padding was."""
    batch = sum(len(past.samples) for past in pasts)
    like = pasts[0].keys, pasts[0].values
    out = tuple(x.new_zeros(batch, x.shape[1], columns, x.shape[3]) for x in like)
    for past in pasts:
        for target, x in zip(out, past.expanded(), strict=True):
            target[past.samples, :, past.start :] = x
    return out[0], out[1]
