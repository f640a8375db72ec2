from __future__ import annotations
from typing import Any
import numpy as np, torch
from torch import Tensor
def as_tensor(video: Any) -> Tensor:
    if isinstance(video, Tensor):
        return video
    if isinstance(video, (list, tuple)):
        video = np.stack([np.asarray(f) for f in video])
    t = torch.as_tensor(np.asarray(video))
    t = t.float()/255 if t.dtype == torch.uint8 else t.float()
    return t.movedim(-1, -3)
