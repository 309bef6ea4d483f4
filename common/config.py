"""Dataclass configurations from YAML and the command line, and the errors a user may meet.

Every wrong key, type or value ends in one line that names the key, its value and what is allowed, and exit status 2,
before anything is computed or written.
"""

import argparse
import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

C = TypeVar("C")


class UserError(Exception):
    """An error the user can mend: its message is one line; `status` is the exit status of the command."""

    status = 2


class ConfigError(UserError):
    """A configuration that cannot be: unknown key, wrong type or impossible value."""


def require(allowed_now: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` "<name> must be <allowed>, got <value>" unless `allowed_now`."""
    if not allowed_now:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")


def parse(
    config_class: type[C],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
    without: Sequence[str] = (),
) -> C:
    """A `config_class` from `--config FILE.yaml` (optional) and dotted overrides such as `--data.fraction 0.1`.

    Args:
        config_class: a dataclass whose fields are plain values or other dataclasses; its `__post_init__` checks values.
        argv: the command line without the program's name; `sys.argv[1:]` if None.
        prog: the command as the user types it, for the help text.
        description: one line for the help text.
        without: sections that the command reads past, left out of the help text.

    Raises:
        ConfigError: on any key, type or value that is not allowed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _check_files(argv, config_class)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the line under a field is its help text
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--option VALUE ...]",
        description=description,
        formatter_class=_Help,
        exit_on_error=False,
        parser_mode="yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file; later options override it")
    parser.add_class_arguments(config_class)
    for action in parser._actions:
        if action.help == "Path to a configuration file." or action.dest.partition(".")[0] in without:
            action.help = argparse.SUPPRESS
    try:
        config = parser.instantiate(parser.parse_args(argv))
        values = {field.name: config[field.name] for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
        return config_class(**values)
    except ConfigError:
        raise
    except (ArgumentError, ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise ConfigError(_one_line(error, config_class)) from error


class _Help(DefaultHelpFormatter):  # type: ignore[misc]
    """Types are told where the option does not list its values anyway."""

    def _get_help_string(self, action: Any) -> str:
        text: str = super()._get_help_string(action)
        return text.replace("type: %(type)s, ", "") if str(action.metavar).startswith("{") else text


def load(config_class: type[C], path: Path) -> C:
    """The configuration saved by `dump` at `path`. Raises `ConfigError` where it is missing, broken or foreign."""
    return parse(config_class, ["--config", str(path)], prog=str(path))


class _PlainLoader(yaml.SafeLoader):
    """Plain data only, and no key twice in a mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} twice in one section")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read as plain data and never executed. Raises `ConfigError`."""
    try:
        tree = _PlainLoader(path.read_text()).get_single_data()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no text, no such date
        reason = getattr(error, "strerror", None) or re.sub(r"\s+", " ", str(error))
        raise ConfigError(f"{path}: not a readable YAML file of plain data ({reason})") from error
    require(isinstance(tree, dict), str(path), tree, "a YAML mapping of sections to settings")
    return tree


def dump(config: Any) -> str:
    """The complete configuration as YAML that `load` reads back to an equal object."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main`; an error the user can mend becomes one line on stderr and an exit status (2, or 1 in mid-run)."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}" if error.status < 128 else str(error), file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}".replace(" :", ""), file=sys.stderr)
        sys.exit(1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check_files(argv: Sequence[str], config_class: Any) -> None:
    """Keys and sections of the YAML files on the command line."""
    for option, following in zip(argv, [*argv, ""][1:], strict=True):
        if option == "--config" or option.startswith("--config="):
            _check_tree(read_yaml(Path(option.partition("=")[2] or following)), config_class, "")


def _check_tree(tree: dict[str, Any], config_class: Any, prefix: str) -> None:
    kinds = typing.get_type_hints(config_class)
    for key, value in tree.items():
        if key not in kinds:
            raise ConfigError(_unknown(f"{prefix}{key}", config_class, prefix))
        if dataclasses.is_dataclass(kinds[key]):
            require(isinstance(value, dict), f"{prefix}{key}", value, "a section of settings")
            _check_tree(value, kinds[key], f"{prefix}{key}.")
        elif value is None and type(None) not in typing.get_args(kinds[key]):
            raise ConfigError(f"{prefix}{key} must have a value, got none")


def _unknown(key: str, config_class: Any, prefix: str) -> str:
    known = list(typing.get_type_hints(config_class))
    near = difflib.get_close_matches(key.removeprefix(prefix).partition(".")[0], known, n=1, cutoff=0.5)
    return f"unknown key '{key}'; " + (f"did you mean '{prefix}{near[0]}'?" if near else f"allowed: {', '.join(known)}")


def _one_line(error: Exception, config_class: Any) -> str:
    """jsonargparse's message in our words, in one line, with the nearest key that exists where a key does not."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    if unknown := re.search(r"unrecognized arguments: --([\w.]+)", text):
        *sections, _ = unknown[1].split(".")
        inner, prefix = config_class, ""
        for section in sections:
            kind = typing.get_type_hints(inner).get(section)
            if not dataclasses.is_dataclass(kind):
                break
            inner, prefix = kind, f"{prefix}{section}."
        return _unknown(unknown[1], inner, prefix)
    if wrong := re.match(r"Parser key \"([^\"]+)\": Expected an? (.+?)\. Got value: (.*)$", text):
        kind = re.sub(r"<class '(\w+)'>", r"\1", wrong[2]).replace("typing.", "")
        kind = re.sub(r"Literal\[(.*?)\]", lambda found: f"one of {found[1]}".replace("'", ""), kind)
        return f"{wrong[1]} must be {kind}, got {wrong[3]!r}"
    return text
