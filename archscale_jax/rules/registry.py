"""Rules by name."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Rule = TypeVar("Rule", bound=Callable)
Function = TypeVar("Function", bound=Callable)


class Registry(Generic[Rule]):
    """Names for the rules of one kind; iterating gives the names in order of registration."""

    def __init__(self, kind: str):
        self._kind = kind
        self._rules: dict[str, Rule] = {}

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
        if rule not in self._rules:
            raise ValueError(f"unknown {self._kind} {rule!r}; accepted are {', '.join(self)}")
        return self._rules[rule]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)
