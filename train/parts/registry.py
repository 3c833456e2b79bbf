"""Parts of training that a configuration chooses by `kind:`. A module named in `plugins` adds its own."""

import difflib
from collections.abc import Callable
from typing import Any


class Parts:
    """The parts of one sort by their kind: the section that configures each, and what builds it.

    `key` is where the configuration names one, such as loss.view, or with `several` a list of them.
    """

    def __init__(self, key: str, several: bool = False):
        self.key, self.several = key, several
        self.kinds: dict[str, tuple[type, Callable]] = {}

    def register(self, section: type) -> Callable[[Callable], Callable]:
        """Decorator for a function that builds a part from a `section`, whose `kind` defaults to the part's name.

        Raises ValueError if another part has that name.
        """
        kind = section.__pydantic_fields__["kind"].default

        def add(build: Callable) -> Callable:
            taken = self.kinds.get(kind)
            if taken is not None and taken[0].__module__ != section.__module__:
                raise ValueError(
                    f"{self.key}.kind: {kind!r} is the name of another part; allowed: a name that is not taken"
                )
            self.kinds[kind] = (section, build)
            return build

        return add

    def section(self, values: Any, key: str) -> type:
        """The section for the mapping `values`, by its `kind`. Raises ValueError naming `key`."""
        kind = values.get("kind") if isinstance(values, dict) else None
        if not isinstance(kind, str) or kind not in self.kinds:
            near = difflib.get_close_matches(str(kind)[:80], self.kinds, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            shown = repr(values if kind is None else kind)[:60]
            raise ValueError(f"{key}.kind: {shown}; allowed: {', '.join(self.kinds)}{meant}")
        return self.kinds[kind][0]

    def build(self, config: Any, run: Any) -> Any:
        """Build the part that the section `config` describes; `run` is the whole `train.config.Config`."""
        return self.kinds[config.kind][1](config, run)


BOTTLENECKS = Parts("model.bottleneck")
VIEWS = Parts("loss.view")
TERMS = Parts("loss.terms", several=True)
SORTS = {parts.key: parts for parts in (BOTTLENECKS, VIEWS, TERMS)}
