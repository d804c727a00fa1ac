"""Rules by name, and what they say of themselves."""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from archscale_jax._errors import unknown

Rule = TypeVar("Rule", bound=Callable)
Function = TypeVar("Function", bound=Callable)


class Explained(NamedTuple):
    """A number and why it is what it is, in one line."""

    value: float
    reason: str


class Description(NamedTuple):
    """What is told of a rule.

    Attributes:
      name: its name; `rule f` of a function f that is not registered.
      summary: the first line of its docstring, "" without one.
      source: what the summary cites, `[AAS Eq. 12]` or `(theory §3)`, "" without.
    """

    name: str
    summary: str
    source: str


class Registry(Generic[Rule]):
    """Names for the rules of one kind; iterating gives the names in order of registration."""

    def __init__(self, kind: str):
        self._kind = kind
        self._rules: dict[str, Rule] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str) -> Callable[[Function], Function]:
        """Returns a decorator that gives a rule a name.

        Raises:
          ValueError: the name is taken.
        """

        def decorate(rule: Function) -> Function:
            if name in self._rules:
                raise ValueError(f"{self._kind} {name!r} is registered already")
            self._rules[name] = rule  # pyright: ignore[reportArgumentType]  (keeps its own type)
            return rule

        return decorate

    def alias(self, name: str, rule: str) -> None:
        """Lets a rule be called by another name too."""
        self._aliases[name] = rule

    def resolve(self, rule: str | Rule) -> Rule:
        """Returns the rule of a name; a function is its own rule.

        Raises:
          TypeError: neither a name nor a function.
          ValueError: no rule has this name.
        """
        if callable(rule):
            return rule
        if not isinstance(rule, str):
            raise TypeError(f"a {self._kind} is a name or a function, found {rule!r}")
        rule = self._aliases.get(rule, rule)
        if rule not in self._rules:
            raise ValueError(unknown(self._kind, rule, self))
        return self._rules[rule]

    def describe(self, rule: str | Rule) -> Description:
        """Returns what is told of a rule; its docstring's first line shall be its equation.

        Raises:
          TypeError, ValueError: see `resolve`.
        """
        function: Any = self.resolve(rule)
        while isinstance(function, functools.partial):
            function = function.func
        called = getattr(function, "__name__", type(function).__name__)
        names = (name for name, known in self._rules.items() if known is function)
        summary = (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")
        source = re.search(r"\[[^]]+\]|\(theory §\d+\)", summary)
        return Description(next(names, f"rule {called}"), summary, source[0] if source else "")

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)
