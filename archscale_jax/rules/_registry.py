"""Rules as objects, by name; and the parts of the numbers that they give."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from archscale_jax._architecture import Arrangement
from archscale_jax._errors import unknown

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable)

DEPRECATED: dict[str, dict[str, str]] = {
    "initialization rule": {
        "none": "he_normal",
        "target": "target_in_degree",
        "source": "source_in_degree",
        "moment": "second_moment",
        "author_code": "chen2024_code",
    },
    "learning-rate rule": {"author_code": "chen2024_code"},
    "measured rule": {
        "measured": "standardized_update",
        "relative": "relative_update",
        "absolute": "absolute_update",
    },
}
"""Names of rules in version 0.1, by kind, and their names now."""


class Part(NamedTuple):
    """What one equation contributes to the number of a parameter.

    Attributes:
      value: a multiplier, or the standard deviation.
      rule: name of the rule, with its kind where one name is of several.
      place: the role or place of the parameter that decides, "" where there is none.
      symbols: the numbers that enter the equation, by their symbols.
      citation: source of the equation, such as `[AAS Eq. 12]`.
    """

    value: Any
    rule: str
    place: str = ""
    symbols: Mapping[str, float] = {}
    citation: str = ""

    @property
    def kind(self) -> tuple:
        """All but the numbers."""
        return self.rule, self.place, tuple(self.symbols), self.citation

    def at(self, place: str) -> "Part":
        """Returns the part with more said of its place."""
        return self._replace(place=f"{self.place}, {place}" if self.place else place)


class Explained(NamedTuple):
    """A number of a parameter, and the parts of which it is the product."""

    value: Any
    parts: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Rule(Generic[Result]):
    """A rule: its equation as a function, and what must be known to use it. Callable.

    Attributes:
      name: its name; `rule f` of a function f that is not registered.
      function: the equation, from architecture, graphs, parameter or measurement.
      equation: the same as text, such as `C = 1 / (d_in(v) ρ)`.
      citation: its source, such as `[AAS Eq. 12]`.
      summary: one sentence; the first line of the function's docstring unless given.
      needs_base: a learning-rate rule that compares with a base graph.
      scales: False of the learning-rate rule that leaves all rates alone.
      answers_for_depth: a learning-rate rule that lowers rates with depth, which a depth rule does
        too.
      sums_paths: a learning-rate rule that sums over paths, whose number residual additions double.
      blind_to_skips: an initialization rule under which residual additions grow the second moment.
      reads_source: an initialization rule whose equation has the in-degree of a layer's source.
      arrangement: the arrangement of which an initialization rule is the default.
      compares: what a measured rule compares: `UpdateSize`, `eigenvalue`, or "" if not known.
    """

    name: str
    function: Callable[..., Result]
    equation: str = ""
    citation: str = ""
    summary: str = ""
    needs_base: bool = False
    scales: bool = True
    answers_for_depth: bool = False
    sums_paths: bool = False
    blind_to_skips: bool = False
    reads_source: bool = False
    arrangement: Arrangement | None = None
    compares: str = ""

    def __post_init__(self) -> None:
        said = (inspect.getdoc(self.function) or "").partition("\n")[0].rstrip(".")
        object.__setattr__(self, "summary", self.summary or said)

    def __call__(self, *arguments: Any, **options: Any) -> Result:
        """Evaluates the rule; an option that it does not have raises TypeError."""
        for option in options:
            accepted = [*self.parameters][len(arguments) :]
            takes_any = any(one.kind == one.VAR_KEYWORD for one in self.parameters.values())
            if option not in accepted and not takes_any:
                raise TypeError(unknown(f"option of the rule {self.name}:", option, accepted))
        return self.function(*arguments, **options)

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the function by name: what the rule reads, and its options."""
        return inspect.signature(self.function).parameters

    def option(self, name: str, options: Mapping[str, Any]) -> Any:
        """Returns the value of an option among those given, or its default; None without one."""
        default = self.parameters[name].default if name in self.parameters else None
        return options.get(name, default)


class Registry(Generic[Result]):
    """The rules of one kind by name; iterating gives the names in order of registration."""

    def __init__(self, kind: str):
        self._kind = kind
        self._rules: dict[str, Rule[Result]] = {}

    def register(self, name: str, **fields: Any) -> Callable[[Function], Function]:
        """Returns a decorator that makes a function a rule of this name, and returns it unchanged.

        Args:
          name: the name.
          **fields: fields of `Rule`, such as `equation` and `citation`.

        Raises:
          ValueError: the name is taken.
        """

        def decorate(function: Function) -> Function:
            if name in self:
                raise ValueError(f"{self._kind} {name!r} is registered already")
            self._rules[name] = Rule(name, function, **fields)
            return function

        return decorate

    @property
    def _deprecated(self) -> Mapping[str, str]:
        return DEPRECATED.get(self._kind, {})

    def canonical(self, name: str) -> str:
        """Returns the name of a rule by that name or by the one it had before, which warns.

        Raises:
          ValueError: no rule has this name.
        """
        if name in self._deprecated:
            _warn_once(self._kind, name, self._deprecated[name])
            return self._deprecated[name]
        if name not in self._rules:
            raise ValueError(unknown(self._kind, name, self))
        return name

    def resolve(self, rule: str | Callable[..., Result]) -> Rule[Result]:
        """Returns the rule of a name, or of a function or a `functools.partial` of one.

        Raises:
          TypeError: neither a name nor a function.
          ValueError: no rule has this name.
        """
        if isinstance(rule, Rule):
            return rule
        if isinstance(rule, str):
            return self._rules[self.canonical(rule)]
        if isinstance(rule, functools.partial):
            known = self.resolve(rule.func)
            bound = functools.partial(known.function, *rule.args, **rule.keywords)
            return dataclasses.replace(known, function=bound)
        if not callable(rule):
            raise TypeError(f"a {self._kind} is a name or a function, found {rule!r}")
        new = Rule(f"rule {getattr(rule, '__name__', type(rule).__name__)}", rule)
        return next((one for one in self._rules.values() if one.function is rule), new)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __contains__(self, name: object) -> bool:
        return name in self._rules or name in self._deprecated


@functools.cache
def _warn_once(kind: str, old: str, new: str) -> None:
    warnings.warn(
        f"the {kind} {old!r} is now {new!r}; the old name is removed in version 0.3",
        DeprecationWarning,
        stacklevel=4,
    )
