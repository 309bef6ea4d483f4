"""What a setting that cannot be raises: a ValueError to who calls the library, one line to who types a command."""

from common.config import ConfigError


class SettingError(ConfigError, ValueError):
    """A setting of the method that cannot be."""


def require(allowed_now: bool, name: str, value: object, allowed: str) -> None:
    """Raise `SettingError` "<name> must be <allowed>, got <value>" unless `allowed_now`."""
    if not allowed_now:
        raise SettingError(f"{name} must be {allowed}, got {value!r}")
