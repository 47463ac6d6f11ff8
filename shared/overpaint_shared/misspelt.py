"""Variables of the environment that look like a setting and are none: told, since they have no effect.

A name that resembles no setting is somebody else's: a deployment has `OVERPAINT_` names of its own.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Final

from overpaint_shared.settings import CONFIG_VARIABLE, ENV_PREFIX, Settings, environment_variable

ALIKE: Final = 0.78
"""Share of letters that two names have in common, in order, from which one is taken for the other."""


def misspelt(environment: Mapping[str, str] | None = None, options: Iterable[str] = ()) -> list[str]:
    """A sentence for each such variable, by name. Values, which may be secrets, are not shown.

    `environment`: by default this process's. `options`: further variables that the program reads.
    """
    names = os.environ if environment is None else environment
    known = {CONFIG_VARIABLE, *map(environment_variable, Settings.model_fields), *options}
    strange = sorted(name for name in names if name.startswith(ENV_PREFIX) and name not in known)
    found = [(name, _nearest(name, known)) for name in strange]
    return [f"{name} is no setting and has no effect. Did you mean {near}?" for name, near in found if near]


def _nearest(name: str, known: Iterable[str]) -> str | None:
    short = {other.removeprefix(ENV_PREFIX): other for other in known}
    near = difflib.get_close_matches(name.removeprefix(ENV_PREFIX)[:100], short, n=1, cutoff=ALIKE)
    return short[near[0]] if near else None
