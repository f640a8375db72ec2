"""What a recipe is: a frozen dataclass of options that wraps up to three calls."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import Tensor

from patchkit.errors import InvalidOption, nearest
from patchkit.selection import Indices, StepWindow

if TYPE_CHECKING:
    from PIL.Image import Image

    from patchkit.bound import Attachment
    from patchkit.context import AttentionCall, BlockCall, BlockInput, DenoiseCall, RunCall
    from patchkit.listening import What
    from patchkit.sites import Site

Effect = Literal["replaces", "adjusts"]
R = TypeVar("R", bound="Recipe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Base of all recipes. Subclass it with a frozen dataclass whose fields are the method's options.

    Override any of :meth:`attend`, :meth:`block`, :meth:`denoise` and :meth:`run`. Each gets a context object and
    ``next``, the rest of the chain, and may change the inputs, call ``next`` once, many times or never, and change the
    result. :meth:`enter` only looks. A method that is not overridden costs nothing.

    The fields below are common to all recipes and say where and when it works.

    Args:
        layers: block numbers in execution order, for instance ``"0,5-10,-1"``, ``"5-"`` or ``"2:-1"``; None = all.
        heads: head numbers, same grammar; only recipes that work per head use it.
        steps: when: ``(start, stop)`` as fractions of the run (floats) or step numbers (ints); None = always.
        targets: peft's grammar over module names: a list of name endings, or one regular expression for the full name.
        exclude: same grammar; wins over ``targets``.
    """

    layers: str | int | list[int] | None = None
    heads: str | int | list[int] | None = None
    steps: tuple[int | float, int | float] | None = None
    targets: str | list[str] | None = None
    exclude: str | list[str] | None = None

    name: ClassVar[str] = ""  # set by @recipe
    summary: ClassVar[str] = ""  # one line
    paper: ClassVar[str] = ""  # title and arXiv id
    effect: ClassVar[Effect] = "adjusts"  # "replaces": computes the op itself; two of those cannot share a site
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross", "joint")  # attention kinds it can work on
    families: ClassVar[tuple[str, ...]] = ("diffusers", "transformers")
    models: ClassVar[tuple[str, ...]] = ()  # pipelines it is tested on, by adapter name; () = no promise
    before: ClassVar[tuple[str, ...]] = ()  # stands outside these recipes
    after: ClassVar[tuple[str, ...]] = ()  # stands inside these
    conflicts: ClassVar[tuple[str, ...] | dict[str, str]] = ()  # others' names, better with the reason: {name: why}
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # named sets of options; `preset="..."` chooses one
    arguments: ClassVar[dict[str, str]] = {}  # extra arguments of pipe(...), name -> what it is
    uses_heads: ClassVar[bool] = False  # whether the option `heads` means anything to it

    def __post_init__(self) -> None:
        for name, adapter in _adapters(type(self)).items():
            object.__setattr__(self, name, _checked(type(self), name, adapter, getattr(self, name)))
        where = f"recipe {self.name or type(self).__name__!r}"
        Indices.parse(self.layers, f"{where}, option 'layers'")
        self.head_numbers(f"{where}, option 'heads'")
        StepWindow.parse(self.steps, f"{where}, option 'steps'")
        if self.heads is not None and not self.uses_heads:
            raise InvalidOption("this recipe does not work per head", f"{where}, option 'heads'", "leave it out")
        self.validate()

    # --- for the author of a recipe to override ---------------------------------------------------------------

    def validate(self) -> None:
        """Check options against each other. Types and ranges are checked before; raise :class:`InvalidOption`."""

    def accepts(self, site: Site) -> str | None:
        """Why this site cannot be patched, or None if it can. Called once per selected site, at apply."""
        return None

    def listens(self, site: Site) -> frozenset[What]:
        """What its :meth:`attend` needs of a site's module besides the op's inputs.

        ``"hidden"``: what the module is given, then ``call.hidden``. ``"queries"``: what its query projection makes,
        before any norm, then ``call.queries`` (see :func:`patchkit.listening.projection_name`).
        """
        return frozenset()

    def prepare(self, target: Any, sites: list[Site]) -> Any:
        """Look at the model before anything is changed; raise if the recipe cannot work on it.

        What it returns, calls at ops and blocks find again as ``call.prepared``.
        """

    def attach(self, target: Any, sites: list[Site]) -> Attachment | None:
        """Put parts of its own on the model, such as a trained adapter, before anything else is installed.

        Whatever goes wrong must leave the model as it was. None = there are no such parts.
        """
        return None

    def tuning(self, lora: dict[str, Any] | None) -> Any:
        """The peft configuration that tunes a model for this recipe, with LoRA layers beside; see `patchkit train`."""
        raise NotImplementedError

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        """Stand around one attention op. Returns (B, H, Nq, D)."""
        raise NotImplementedError  # never installed unless overridden

    def block(self, call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
        """Stand around one transformer block. Returns what the block returns.

        Called for every block of the components in which the recipe has selected sites. Inside a model that is compiled
        whole it is not called, which the report says.
        """
        raise NotImplementedError

    def enter(self, call: BlockInput) -> None:
        """Look at the hidden states that enter a transformer block in which the recipe has selected sites.

        Nothing can be changed here; in return it is also called inside models that are compiled whole.
        """
        raise NotImplementedError

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        """Stand around one denoiser forward. Returns what the denoiser returns."""
        raise NotImplementedError

    def check_call(self, call: RunCall) -> None:
        """Check the arguments of a pipeline call (``call.options`` are this recipe's own), before anything is computed.

        Called before each pipeline call for every recipe that overrides it or :meth:`run`.
        Raise :class:`InvalidOption`, or :class:`Conflict` where an argument asks for what cannot go together.
        """

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        """Stand around one pipeline call. Returns what the pipeline returns."""
        raise NotImplementedError

    def attention_cost(self, tokens: int, total: int) -> float:
        """Predicted attention FLOPs as a share of dense ones, over ``total`` steps at ``tokens`` tokens."""
        return 1.0

    def added_forwards(self, sites: list[Site]) -> float:
        """Predicted forwards of the denoiser that a step takes beyond the pipeline's own, on the selected ``sites``."""
        return 0.0

    def figures(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Figures for the report that follow from ``counts``, ``seconds`` and ``means`` of all calls together."""
        return {}

    @classmethod
    def pictures(cls, account: Mapping[str, Any]) -> dict[str, Image]:
        """Pictures of what the recipe did, title -> picture, few and small.

        Made from its entry in the report, so that they can be made from a report that was kept; a recipe notes what
        they need with ``call.ledger.note``. Empty where there is nothing to draw.
        """
        return {}

    def head_numbers(self, where: str = "heads") -> Indices:
        """The heads that the option ``heads`` selects in every layer. Override it where it means something else."""
        return Indices.parse(self.heads, where)

    # --- for everybody ----------------------------------------------------------------------------------------

    def wraps(self, level: str) -> bool:
        """Whether this recipe overrides ``level``, the name of one of the methods above."""
        return getattr(type(self), level) is not getattr(Recipe, level)

    def selects(self) -> bool:
        """Whether its options leave out some sites."""
        return any(option is not None for option in (self.layers, self.targets, self.exclude))

    def options(self, *, defaults: bool = False) -> dict[str, Any]:
        """The options by name; without ``defaults`` only those that differ from their default."""
        out = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            default = f.default if f.default is not dataclasses.MISSING else None
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            if defaults or value != default:
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def option_names(cls) -> list[str]:
        """What :meth:`build` takes: the fields, and ``preset`` where there are presets."""
        return [f.name for f in dataclasses.fields(cls)] + (["preset"] if cls.presets else [])

    @classmethod
    def build(cls: type[R], options: dict[str, Any], where: str = "") -> R:
        """Make a recipe from options, naming unknown ones with the nearest known option."""
        known = cls.option_names()
        if "preset" in options and cls.presets:
            options = dict(options)
            place = ", ".join(filter(None, (where or f"recipe {cls.name!r}", "option 'preset'")))
            options = cls._preset(options.pop("preset"), place) | options
        for name in options:
            if name not in known:
                place = where or f"recipe {cls.name!r}"
                raise InvalidOption(f"recipe {cls.name!r} has no option {name!r}", place, nearest(str(name), known))
        try:
            return cls(**options)
        except InvalidOption as error:
            if where:
                raise InvalidOption(error.what, f"{where}, {error.where}", error.remedy) from None
            raise

    @classmethod
    def preset(cls: type[R], name: str, **options: Any) -> R:
        """The recipe with the options of a preset; ``options`` win over them."""
        return cls.build({"preset": name, **options})

    @classmethod
    def _preset(cls, name: Any, where: str) -> dict[str, Any]:
        if name not in cls.presets:
            raise InvalidOption(f"recipe {cls.name!r} has no preset {name!r}", where, nearest(str(name), cls.presets))
        return dict(cls.presets[name])

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """JSON schema of the options."""
        properties: dict[str, Any] = {}
        if cls.presets:
            properties["preset"] = {"enum": list(cls.presets)}
        for f in dataclasses.fields(cls):
            entry = dict(_adapters(cls)[f.name].json_schema())
            if f.default is not dataclasses.MISSING:
                entry["default"] = list(f.default) if isinstance(f.default, tuple) else f.default
            properties[f.name] = entry
        return {"type": "object", "properties": properties, "additionalProperties": False}


_adapters_of: dict[type, dict[str, Any]] = {}


def _adapters(cls: type[Recipe]) -> dict[str, Any]:
    """One validator an option; made once a class, because making them is slow."""
    from pydantic import TypeAdapter

    if cls not in _adapters_of:
        hints = typing.get_type_hints(cls, include_extras=True)
        _adapters_of[cls] = {f.name: TypeAdapter(hints[f.name]) for f in dataclasses.fields(cls)}
    return _adapters_of[cls]


def _checked(cls: type[Recipe], name: str, adapter: Any, value: Any) -> Any:
    from pydantic import ValidationError

    where = f"recipe {cls.name or cls.__name__!r}, option {name!r}"
    kinds = str(typing.get_type_hints(cls)[name])
    parts = value if isinstance(value, list | tuple) else [value]
    if "bool" not in kinds and any(isinstance(v, bool) for v in parts):  # pydantic would read True as 1
        raise InvalidOption(f"{value} is not a value for {name!r}", where, f"give {_readable(kinds)}")
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        reasons = sorted({e["msg"][0].lower() + e["msg"][1:] for e in error.errors()}, key=len)
        raise InvalidOption(
            f"{value!r} is not a value for {name!r}", where, f"{reasons[0]} (takes {_readable(kinds)})"
        ) from None


def _readable(hint: str) -> str:
    return hint.replace("typing.", "").replace("<class '", "").replace("'>", "").replace("NoneType", "None")
