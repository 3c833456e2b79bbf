"""Compare the configuration of a continued run with the one that it was started with.

Most keys may change between two starts: steps, rates, weights, intervals. Other data, another seed or another
network make it a different run, to which the steps so far do not belong. Such changes are refused.
"""

from pathlib import Path
from typing import Any

import yaml

from ...config import Config, build, dotted, to_yaml
from ..schedules import LearningRate

UNCOMPARED = ("output_dir", "resume")  # the folder may be moved, and `resume` only says how to continue
# Another value of one of these keys, or of a key below it, makes it another run: another task, network, order or
# set of samples. Not among them are the resolutions, since recipes of several parts enlarge the crops.
ANOTHER_RUN = (
    "task",
    "seed",
    "model",
    *(f"data.{key}" for key in ("train", "split", "image_column", "label_column", "labels", "streaming")),
)
# The same holds for these, but only if data.validation was null: held-out images were then taken from data.train.
HELD_OUT = ("data.validation", "data.validation_images")
NOTABLE = 0.01  # relative change of a learning rate above which it is printed


def read_config(path: Path) -> dict[str, Any] | None:
    """Read a run's config.yaml: its keys and values, or None if it is missing or cannot be parsed."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) else None


def compare(before: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (value before, value now), for the keys that both have and whose values differ."""
    old, new = dotted(before), dotted(yaml.safe_load(to_yaml(config)))
    return {
        key: (old[key], new[key])
        for key in new
        if key in old and old[key] != new[key] and key.split(".")[0] not in UNCOMPARED
    }


def makes_another_run(key: str, before: dict[str, Any]) -> bool:
    """Whether another value of `key` makes it another run; `before`: the configuration of the run so far."""
    if key in HELD_OUT:
        return before.get("data", {}).get("validation") is None
    return key in ANOTHER_RUN or key.split(".")[0] in ANOTHER_RUN


def refuse_another_run(
    before: dict[str, Any], config: Config, checkpoint: Path, sources: tuple[dict | None, dict | None]
) -> list[str]:
    """Return a line for each key that has changed.

    before: the configuration of the run so far. sources: the fingerprints of the training images before and now,
    None where unknown: a folder that was only moved is the same source, one that holds other images is not. Raises
    ValueError if a change makes it another run, unless `resume.force` is set.
    """
    changed = compare(before, config)
    other = [(key, *pair) for key, pair in changed.items() if makes_another_run(key, before)]
    if None not in sources:
        moved = sources[0] == sources[1]
        other = [entry for entry in other if not (moved and entry[0] == "data.train")]
        if not moved and "data.train" not in changed:
            other.append(("data.train", *map(_images, sources)))
    if other and not config.resume.force:
        key, old, new = other[0]
        more = f" (and {', '.join(key for key, *_ in other[1:4])})" if other[1:] else ""
        raise ValueError(
            f"{key}: {_shown(new)}, but {checkpoint.parent.parent} was trained with {_shown(old)}{more}; allowed: "
            "another output_dir, or resume.force=true to go on all the same"
        )
    pairs = changed | {key: (old, new) for key, old, new in other}
    return [f"{key}: {_shown(old)} -> {_shown(new)}" for key, (old, new) in pairs.items()]


def rate_jump(before: dict[str, Any], config: Config, ranks_before: int, ranks: int, step: int) -> str | None:
    """Return a line if the change of configuration or ranks moves the rate of `step` by more than `NOTABLE`.

    Otherwise, and for a configuration that this version cannot read, returns None.
    """
    try:
        old = build(Config, before)
    except ValueError:  # written by another version of this program
        return None
    rates = [LearningRate(old, ranks_before)(step), LearningRate(config, ranks)(step)]
    if abs(rates[1] - rates[0]) <= NOTABLE * max(rates):
        return None
    if step >= old.train.steps:
        why = f"the run had ended at step {old.train.steps}"
    else:
        why = "by train.steps and the keys of optimizer and batch"
    return f"the learning rate jumps from {rates[0]:.3g} to {rates[1]:.3g} at step {step} ({why})"


def _images(source: dict) -> str:
    things = " and ".join(f"{n} {what}" for what, n in source.items() if what != "sha256")
    return f"{things}, names {source['sha256'][:8]}"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"...{text[-57:]}"  # the end of a path tells more than its start
