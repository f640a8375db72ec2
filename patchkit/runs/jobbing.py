"""What `patchkit VERB FILE` does: check everything, load the model, and call the verb's job."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

from patchkit import jobs
from patchkit.jobs import JobCall, JobProgress, JobResult
from patchkit.recipe_files import sections
from patchkit.recipe_files.files import RecipeFile
from patchkit.runs import calls, loading

logger = logging.getLogger(__name__)


def run(
    file: RecipeFile,
    verb: str,
    *,
    say: Callable[[str], None] = logger.info,
    progress: Callable[[JobProgress], None] = lambda progress: None,
    bars: bool = True,
) -> JobResult:
    """Carry out a verb.

    Args:
        file: a checked recipe file; its section for the verb may be missing where all options have defaults.
        verb: its name.
        say: is told what is being done, one line each.
        progress: is told how far it is.
        bars: whether the libraries may show their own bars while they load.

    Raises:
        PatchkitError: something is wrong with the request (before any compute), or the job failed.
    """
    known = jobs.get(verb)
    job = known.load()
    options = file.jobs.get(verb)
    if options is None and file.document is not None:
        options = sections.check(file.document, known)
    file.require(prompt=False, output=False)
    assert file.model is not None
    loading.check(file.model, file.where("model"))
    cls = loading.pipeline_class(file.model)
    if cls is not None:
        extra = {name for recipe in file.recipes for name in recipe.arguments}
        loading.check_inputs(cls, dict(file.inputs), extra, lambda name: file.where("inputs", name))
    call = JobCall(
        target=None,
        tokenizer=None,
        model=file.model.id,
        recipes=file.recipes,
        inputs=dict(file.inputs),
        options=options if options is not None else job.options(),
        loaded_as=file.model.chosen(),
        output=file.output.path if file.output is not None else None,
        in_folder=file.output is not None and file.output.folder,
        device=file.model.device or loading.default_device(),
        say=say,
        progress=progress,
        where=lambda *path: file.where(*known.path, *path),
    )
    job.check(call)
    say(f"loading {file.model.id}")
    loaded = loading.load(file.model, quiet=not bars)
    call = dataclasses.replace(
        call,
        target=loaded.target,
        tokenizer=loaded.tokenizer,
        inputs={**(loaded.defaults or {}), **file.inputs},
        device=loaded.device,
        encode=None if loaded.kind == "pipeline" else functools.partial(calls.encoded, loaded),
        reads_pictures=loaded.kind == "chat",
    )
    return job.run(call)
