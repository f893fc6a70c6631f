"""The options of a strategy: its class has them, as a section of the config (`Strategy.Options`)."""

from collections.abc import Collection
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from distrib import plugins, targets
from distrib.config_section import Section, explain, nearest
from distrib.errors import ConfigError, did_you_mean


def options(name: str, given: dict[str, Any], common: Collection[str] = ()) -> Section:
    """The section of options of the strategy `name`, made from the keys that are `given`.

    For `auto`, which may become any strategy, the section is empty, and each key must fit one of distrib's own.
    A key of other strategies may be given with the value that it has by default there: a run folder from before
    options belonged to strategies holds all keys. `common`: the keys that every strategy has. Raises ConfigError.
    """
    require_known(name)
    section = Section if name == "auto" else _section(name)
    if twice := [key for key in section.model_fields if key in common]:
        raise ConfigError(f"strategy.name: {name}: its Options have {twice[0]}, which every strategy has; rename it")
    own = {key: value for key, value in given.items() if key in section.model_fields}
    for key, value in given.items():
        if key in own and _accepts(section, key, value):
            continue
        others = {other: _section(other) for other in plugins.OWN[plugins.STRATEGIES]}
        knowing = {other: section for other, section in others.items() if key in section.model_fields}
        accepting = [other for other, section in knowing.items() if _accepts(section, key, value)]
        if key not in own and not knowing:
            allowed = [
                *common,
                *section.model_fields,
                *sorted({key for one in others.values() for key in one.model_fields}),
            ]
            raise ConfigError(f"strategy.{key}: unknown key{nearest(f'strategy.{key}', dict.fromkeys(allowed))}")
        if key not in own and any(_default(section, key) == value for section in knowing.values()):
            continue
        if name == "auto" and accepting:
            continue
        if accepting:
            raise ConfigError(
                f"strategy.{key}: {_text(value)}is for {', '.join(accepting)}, and the strategy is {name}; leave it "
                "out, or take one of those"
            )
        if key not in own:
            _validated(next(iter(knowing.values())), {key: value})
    return _validated(section, own)


def require_known(name: str) -> None:
    """Raise ConfigError if there is no strategy of this name. Imports none of them."""
    if name != "auto" and ":" not in name and name not in plugins.OWN[plugins.STRATEGIES] and name not in _installed():
        known = ["auto", *_installed()]
        allowed = ", ".join(repr(one) for one in known)
        raise ConfigError(
            f"strategy.name: {name!r}: input should be {allowed}, or module:Class{did_you_mean(name, known)}; or "
            "install the package that has it"
        )


def find(name: str) -> Any:
    """Import the class of a strategy: one of a known name, or `module:Class` of the user's own. Raises ConfigError."""
    base = import_module("distrib.strategies.base").Strategy
    if ":" in name:
        return targets.find(name, "strategy.name", base)
    try:
        return plugins.load(plugins.STRATEGIES, name, base)
    except plugins.PluginError as error:
        raise ConfigError(f"strategy.name: {error}") from None


def _installed() -> list[str]:
    try:
        return list(plugins.plugins(plugins.STRATEGIES))
    except plugins.PluginError as error:
        raise ConfigError(f"strategy.name: {error}") from None


def known_keys() -> list[str]:
    """The options of distrib's own strategies, dotted."""
    sections = [_section(name) for name in plugins.OWN[plugins.STRATEGIES]]
    return list(dict.fromkeys(f"strategy.{key}" for section in sections for key in section.model_fields))


def _text(value: Any) -> str:
    """As in YAML, and a space; nothing for a value that is long."""
    if isinstance(value, dict | list):
        return ""
    return f"{str(value).lower() if isinstance(value, bool) else value} "


def _section(name: str) -> type[Section]:
    found: Any = find(name).Options
    if not isinstance(found, type) or not issubclass(found, Section):
        raise ConfigError(f"strategy.name: {name}: its Options must derive from Strategy.Options")
    return found


def _default(section: type[Section], key: str) -> Any:
    return section.model_fields[key].get_default(call_default_factory=True)


def _accepts(section: type[Section], key: str, value: Any) -> bool:
    """Return whether the section takes this value, whatever it says of keys that are missing."""
    try:
        section.model_validate({key: value})
    except ValidationError as error:
        return all(one["loc"][:1] != (key,) for one in error.errors())
    return True


def _validated(section: type[Section], values: dict[str, Any]) -> Section:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"strategy.{explain(error, section)}") from None
