"""Imports what a config names as `module:Class`, and checks it before anything is called."""

import functools
import importlib
import importlib.util
import inspect
import os
import site
import sys
import sysconfig
import typing
from collections.abc import Callable
from typing import Any

from distrib.errors import ConfigError, did_you_mean
from distrib.tracebacks import first_line, place


def build(target: str, arguments: dict[str, Any], key: str, kind: type[Any], factories: bool = False) -> Any:
    """Find what `target` names and call it with keyword arguments. `key`, `kind` and `factories` as for `find`."""
    made = call(find(target, f"{key}.target", kind, factories), arguments, key)
    if not isinstance(made, kind):
        raise ConfigError(f"{key}.target: {target} is not {_with_article(kind)} but {type(made).__name__}")
    return made


def call(function: Callable[..., Any], arguments: dict[str, Any], key: str) -> Any:
    """Return `function(**arguments)`. Raises ConfigError if it does not accept these arguments."""
    require_arguments(function, arguments, key)
    return function(**arguments)


def require_arguments(function: Callable[..., Any], arguments: dict[str, Any], key: str) -> None:
    """Raise ConfigError if the function does not accept these arguments. The message lists those it accepts."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-ins have no signature
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        valid = ", ".join(signature.parameters) or "no arguments"
        name = getattr(function, "__name__", repr(function))
        raise ConfigError(f"{key}: {name} does not take what is given: {error}; it takes: {valid}") from None


def find(target: str, key: str, kind: type[Any], factories: bool = False) -> Callable[..., Any]:
    """Import `target`, written `module:name`, and return it: a subclass of `kind`.

    The working directory is searched first. `key`: the config key that holds the target, for messages. If `factories`
    is true, `target` may also be a function: one of the user's own, or an installed one that is annotated to return a
    `kind`. Anything else is refused, so that a config cannot run an arbitrary program. Raises ConfigError.
    """
    module_name, name = _split_target(target, key)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if _is_standard_library(module_name):
        raise ConfigError(f"{key}: {target} is a part of Python itself, not {_with_article(kind)}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{key}: there is no module {error.name!r}, neither in {os.getcwd()} nor installed"
            ) from None
        raise ConfigError(f"{key}: {module_name} cannot be imported: {first_line(error)}{place(error)}") from error
    found = getattr(module, name, None)
    if found is None:
        hint = did_you_mean(name, dir(module), shown=lambda close: f"{module_name}:{close}")
        raise ConfigError(f"{key}: module {module_name!r} has no {name!r}{hint}")
    if isinstance(found, type):
        if issubclass(found, kind):
            return found
        raise ConfigError(f"{key}: {target} is not {_with_article(kind)} but a class {found.__name__}")
    if not factories or not inspect.isfunction(found):
        wanted = _with_article(kind) + (", nor a function that makes one" if factories else "")
        raise ConfigError(f"{key}: {target} is not {wanted}, it is a {type(found).__name__}")
    if not _may_make(found, kind):
        raise ConfigError(
            f"{key}: {target} is not annotated to return {_with_article(kind)}; call it in a function of your "
            "own, and name that"
        )
    return found


def hidden_by(library: str) -> str | None:
    """Return the user's folder or file that shadows the installed library of this name, or None."""
    spec = importlib.util.find_spec(library)
    origin = None if spec is None or not spec.has_location else spec.origin
    own = origin is not None and not _is_installed(origin) and os.path.realpath(origin).startswith(os.getcwd() + os.sep)
    return origin if own else None


def _with_article(kind: type[Any]) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIO' else 'a'} {kind.__name__}"


def _split_target(target: str, key: str) -> tuple[str, str]:
    """Split `module:name`. Raises ConfigError, and suggests what was probably meant."""
    module, colon, name = target.partition(":")
    if colon and name.isidentifier() and not module.endswith(".py") and _is_dotted(module):
        return module, name
    path, name = (module, name) if colon else target.rpartition(".")[::2]
    meant = ".".join(part for part in path.removesuffix(".py").replace(os.sep, ".").split(".") if part)
    known = name.isidentifier() and _is_dotted(meant)
    example = f"write {meant}:{name}" if known else "for example my_file:MyTask"
    raise ConfigError(f"{key}: {target!r} is not of the form module:Class; {example}")


def _is_dotted(module: str) -> bool:
    return all(part.isidentifier() for part in module.split("."))


def _is_standard_library(module: str) -> bool:
    """Return whether the module is from the standard library. A user's file of the same name takes precedence."""
    top = module.partition(".")[0]
    if top not in sys.stdlib_module_names:
        return False
    spec = importlib.util.find_spec(top)
    origin = None if spec is None else spec.origin
    return origin in (None, "built-in", "frozen") or str(origin).startswith(sysconfig.get_path("stdlib") + os.sep)


def _may_make(function: Callable[..., Any], kind: type[Any]) -> bool:
    """Return whether the function is the user's own, or annotated to return a `kind`."""
    origin = inspect.unwrap(function)
    if not _is_installed(inspect.getfile(origin)) and not _is_standard_library(origin.__module__):
        return True
    try:
        returned = typing.get_type_hints(origin).get("return")
    except Exception:  # evaluating an annotation can raise anything
        return False
    returned = typing.get_origin(returned) or returned
    return isinstance(returned, type) and issubclass(returned, kind)


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(os.path.realpath(folder) + os.sep for folder in folders)


def _is_installed(file: str) -> bool:
    return file.startswith("<") or os.path.realpath(file).startswith(_installed())
