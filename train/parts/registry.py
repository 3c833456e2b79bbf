"""`BOTTLENECKS`, `VIEWS`, `TERMS`: what `kind:` can choose. Modules that `plugins` names register more."""

import difflib
from collections.abc import Callable
from typing import Any


class Parts:
    """The parts of one sort, such as views: kind -> (the section that configures it, the function that builds it).

    key: the key of the configuration that chooses a part, such as loss.view; with `several` it is a list of parts.
    """

    def __init__(self, key: str, several: bool = False):
        self.key, self.several = key, several
        self.kinds: dict[str, tuple[type, Callable]] = {}

    def register(self, section: type) -> Callable[[Callable], Callable]:
        """Decorator for a function `(section, config) -> part`, which makes the part available to configurations.

        section: a `train.settings.section` class, whose key `kind` has the part's name as its default. config: the
        whole `train.config.Config` of the run. Raises ValueError if a part of another module has that name.
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
        """The section class for the kind that the mapping `values` names. Raises ValueError, which names `key`."""
        kind = values.get("kind") if isinstance(values, dict) else None
        if not isinstance(kind, str) or kind not in self.kinds:
            near = difflib.get_close_matches(str(kind)[:80], self.kinds, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            shown = repr(values if kind is None else kind)[:60]
            raise ValueError(f"{key}.kind: {shown}; allowed: {', '.join(self.kinds)}{meant}")
        return self.kinds[kind][0]

    def build(self, config: Any, run: Any) -> Any:
        """Build the part that the section `config` describes. run: the whole `train.config.Config` of the run."""
        return self.kinds[config.kind][1](config, run)


BOTTLENECKS = Parts("model.bottleneck")
VIEWS = Parts("loss.view")
TERMS = Parts("loss.terms", several=True)
SORTS = {parts.key: parts for parts in (BOTTLENECKS, VIEWS, TERMS)}
