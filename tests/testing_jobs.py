"""Verbs and objectives for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InvalidOption
from patchkit.jobs import Job, JobCall, JobProgress, JobResult
from patchkit.media import replacing


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    samples: int = Field(default=4, ge=1, description="how many")
    wish: str = ""


def run(call: JobCall) -> JobResult:
    if call.options.wish == "fail":
        raise RuntimeError("the model fell over")
    if call.options.wish == "impossible":
        raise InvalidOption("that wish is impossible", call.where("wish"), "wish for something else")
    for i in range(call.options.samples):
        call.progress(JobProgress(i, call.options.samples, "counting", 1.5))
    path = Path(call.output or "counted.json")
    with replacing(path) as part:
        part.write_text(f"{call.options.samples} {type(call.target).__name__} {call.recipes[0].name}")
    return JobResult({"count": path}, {"samples": call.options.samples}, "all counted", ("done already",))


JOB = Job("Count to SAMPLES.", Options, run)
NO_JOB = "just a text"

stop_at: int | None = None  # the call at which `size` behaves as if Ctrl-C were pressed
calls = 0


def size(image: Any, prompt: str) -> float:
    """An objective on whatever a pipeline returns."""
    global calls
    calls += 1
    if calls == stop_at:
        raise KeyboardInterrupt
    import numpy as np

    return float(np.asarray(image, dtype=np.float64).std())
