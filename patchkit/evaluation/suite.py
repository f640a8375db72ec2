"""Runs a comparison: every prompt and seed through every variant, measured, kept, and summed up."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkit.evaluation import keys, learned, measures, pictures, reporting
from patchkit.evaluation.cases import Case
from patchkit.evaluation.counting import counting, peak_memory
from patchkit.evaluation.learned import Learned
from patchkit.evaluation.measures import Result
from patchkit.evaluation.progress import Clock, Progress
from patchkit.evaluation.request import Request
from patchkit.evaluation.store import Store
from patchkit.evaluation.summary import summarise
from patchkit.locking import alone_in
from patchkit.runs import calls, loading, measure, running
from patchkit.runs.loading import Loaded
from patchkit.runs.running import Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One call that is to be made. ``dense`` is the key of the unpatched sample of the same prompt and seed."""

    variant: Variant
    case: Case
    seed: int
    key: str
    dense: str

    @property
    def what(self) -> str:
        return f"{self.variant.label}, {self.case.prompt!r}, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """What a comparison measured and wrote."""

    files: dict[str, Path]
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"files": {n: str(p) for n, p in self.files.items()}, "summary": self.summary, "notes": self.notes}


def run(
    request: Request,
    *,
    say: Callable[[str], None] = logger.info,
    progress: Callable[[Progress], None] = lambda progress: None,
    bars: bool = False,
) -> Comparison:
    """Carry out a comparison, or go on with one that was stopped.

    Args:
        request: from :func:`patchkit.evaluation.request.make`.
        say: is told what is being done, one line each.
        progress: is told before each sample how far it is.
        bars: whether the model's own bars may be shown on a terminal.

    Raises:
        PatchkitError: something is wrong, another run writes to this folder, or the pipeline failed. The model is
            unpatched then; what was finished is kept, and the same call goes on from there.
    """
    spec = request.job.file.model
    assert spec is not None
    say(f"loading {spec.id}")
    loaded = loading.load(spec, quiet=not bars)
    running.check_plan(request.job, loaded)
    runner = _Runner(request, loaded, learned.prepare(request.clip, request.dino, loaded.device))
    samples = list(runner.samples())
    with alone_in(request.output, "a comparison"):
        notes = [*request.notes, *runner.take_up(samples)]
        runner.compute(samples, say, progress, bars, notes)
        runner.store.tidy()
        rows = [runner.store.rows[sample.key] for sample in samples]
        notes += sorted({f"{row['variant']}, {caution}" for row in rows for caution in row["cautions"]})
        summary = summarise(request, rows, runner.learned.missing)
        summary |= runner.facts()
        say("writing the page")
        files = reporting.write(request, runner.store, rows, summary, notes)
    return Comparison(files, summary, notes)


class _Runner:
    """The state of one run."""

    def __init__(self, request: Request, loaded: Loaded, networks: Learned) -> None:
        self.request, self.loaded, self.learned = request, loaded, networks
        self.store = Store(request.output)
        self.inputs = {"seed": 0, **(loaded.defaults or {}), **request.job.file.inputs}
        self.base_seed = int(self.inputs["seed"])
        self.circumstances = measure.circumstances(loaded)
        self.measuring = keys.of(
            {
                "code": keys.measuring_code(),
                "world": request.world.name if request.world else None,
                "networks": [request.clip, request.dino, sorted(networks.missing)],
            }
        )

    # --- which samples ----------------------------------------------------------------------------------------

    def samples(self) -> Iterator[Sample]:
        """All samples, those of a prompt and seed together: the unpatched one first, the others take turns."""
        shared = {
            "model": dataclasses.asdict(self.request.job.file.model),  # type: ignore[arg-type]
            "weights": keys.weights(self.loaded.target),
            "device": measure.device_name(self.loaded.device),
            "versions": keys.versions(),
            "code": keys.calling_code(),
        }
        dense, *others = self.request.variants
        turn = 0
        for case in self.request.cases:
            for repeat in range(self.request.seeds):
                seed = case.seed(self.base_seed, repeat)
                first = self._sample(dense, case, seed, shared, "")
                yield dataclasses.replace(first, dense=first.key)
                for variant in others[turn:] + others[:turn]:
                    yield self._sample(variant, case, seed, shared, first.key)
                turn = (turn + 1) % max(1, len(others))

    def _sample(self, variant: Variant, case: Case, seed: int, shared: dict[str, Any], dense: str) -> Sample:
        inputs = self.request.inputs(variant, case, self.inputs, seed)
        content = shared | {"variant": variant.label, "inputs": inputs, "media": self._digests(inputs)}
        if variant.recipes:
            content["mechanism"] = keys.mechanism_code()
            content["recipes"] = [(r.name, r.options(defaults=True), keys.recipe_code(r)) for r in variant.recipes]
        return Sample(variant, case, seed, keys.of(content), dense)

    def _digests(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found = calls.media_paths(inputs, self.request.job.extra)
        listed = {name: paths if isinstance(paths, list) else [paths] for name, paths in found.items()}
        return {name: [keys.file_digest(path) for path in paths] for name, paths in listed.items()}

    def take_up(self, samples: list[Sample]) -> list[str]:
        """Read what is finished, and forget what was computed otherwise than it would be now; tells of both."""
        self.store.read()
        wanted: set[str] = {sample.key for sample in samples}
        places = {(s.variant.label, s.case.prompt, s.seed) for s in samples}
        stale = [
            key
            for key, row in self.store.rows.items()
            if key not in wanted and (row["variant"], row["prompt"], row["seed"]) in places
        ]
        self.store.drop(stale)
        kept = len(wanted & set(self.store.rows))
        notes = [f"{kept} of {len(samples)} samples were finished before and are taken as they are"] if kept else []
        if stale:
            notes.append(f"{len(stale)} samples of before were of other options, code, versions or weights: left out")
        return notes

    # --- computing --------------------------------------------------------------------------------------------

    def compute(
        self,
        samples: list[Sample],
        say: Callable[[str], None],
        progress: Callable[[Progress], None],
        bars: bool,
        notes: list[str],
    ) -> None:
        """Compute what is missing, and measure again what was measured otherwise."""
        missing = [s for s in samples if s.key not in self.store.rows]
        self._warm_up(missing, say, bars, notes)
        clock = Clock([s.variant.label for s in missing])
        finished = len(samples) - len(missing)
        try:
            for sample in samples:
                row = self.store.rows.get(sample.key)
                if row is None:
                    progress(Progress(finished, len(samples), sample.what, clock.left()))
                    with clock.timing(sample.variant.label):
                        self._make(sample, bars)
                    finished += 1
                elif row["measured"] != self._measured(sample):
                    figures = self._figures(sample, self.store.result(row))
                    self.store.add(row | figures, self.store.result(row))
        except BaseException:
            if finished:
                say(f"{finished} of {len(samples)} samples are kept in {self.store.folder}; the same command goes on")
            raise

    def _warm_up(self, missing: list[Sample], say: Callable[[str], None], bars: bool, notes: list[str]) -> None:
        """So that no variant pays for first-time costs when it is timed."""
        if not missing:
            return
        variants = {s.variant.label: s.variant for s in missing}
        first = missing[0]
        inputs = {**self.inputs, **first.case.inputs, "prompt": first.case.prompt, "seed": first.seed}
        job = dataclasses.replace(self.request.job, variants=tuple(variants.values()))
        running.warm_up(job, self.loaded, calls.load_media(inputs, job.extra), say, bars, notes)

    def _make(self, sample: Sample, bars: bool) -> None:
        inputs = self.request.inputs(sample.variant, sample.case, self.inputs, sample.seed)
        arguments = calls.load_media(inputs, self.request.job.extra)
        report = None
        with (
            counting(self.loaded.target) as evaluations,
            running.patched(self.loaded, sample.variant) as patch,
            peak_memory(self.loaded.device) as memory,
        ):
            made = calls.call(self.loaded, arguments, label=sample.variant.label, bars=bars)
            report = patch.report() if patch is not None else None
        result = measures.result_of(made.kind, made.items[0])
        row = {
            "key": sample.key,
            "variant": sample.variant.label,
            "prompt": sample.case.prompt,
            "case": sample.case.number,
            "seed": sample.seed,
            "kind": made.kind,
            "recipes": [{"name": r.name, "options": r.options(defaults=True)} for r in sample.variant.recipes],
            "shape": measure.shape(made),
            "costs": measures.costs(made, memory, evaluations),
            "memory_means": memory.meaning,
            "density": measure.densities(report.to_dict()) if report is not None else None,
            "cautions": report.cautions() if report is not None else [],
            "drawn": {t: pictures.still(p) for t, p in (report.pictures() if report is not None else {}).items()},
            **self.circumstances,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        self.store.add(row | self._figures(sample, result), result)

    def _measured(self, sample: Sample) -> str:
        """What the figures of a sample depend on besides its pixels."""
        case = sample.case
        files = [keys.file_digest(p) if p else None for p in (case.source, case.mask)]
        return keys.of({"measuring": self.measuring, "dense": sample.dense, "edit": files})

    def _figures(self, sample: Sample, result: Result) -> dict[str, Any]:
        dense = None if sample.key == sample.dense else self.store.result(self.store.rows[sample.dense])
        shape = (0,) if result.pixels is None else tuple(result.pixels.shape)
        edit = measures.read_edit(sample.case.source, sample.case.mask, shape)
        found = measures.figures(result, dense, sample.case.prompt, self.request.world, self.learned, edit)
        return {"measured": self._measured(sample), **found}

    def facts(self) -> dict[str, Any]:
        """Where and with what it was measured."""
        return {
            "pipeline": type(self.loaded.target).__name__,
            "inputs": {n: v for n, v in self.inputs.items() if n not in ("prompt", "seed")},
            "first_seed": self.base_seed,
            **self.circumstances,
        }
