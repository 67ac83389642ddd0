"""Flags and variables to settings.

Called by: main.py, commands/doctor.py. Calls: settings.py, environment.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping

from pydantic import SecretStr, ValidationError

from slatewise.environment import unknown_variables
from slatewise.settings import Settings, SettingsError, variable


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting.

    A flag that is not given is absent from the result, so its variable or default applies.
    """
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory else field.get_default()
        shown = str(default.get_secret_value() if isinstance(default, SecretStr) else default)
        parser.add_argument(
            flag(name),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{field.description} [{variable(name)}{f'; default: {shown}' if shown else ''}]".replace("%", "%%"),
        )


def read_settings(flags: Mapping[str, str]) -> Settings:
    """Read each setting from `flags` (texts by field name), or else from the environment. Raises SettingsError."""
    if unknown := unknown_variables(os.environ, [variable(name) for name in Settings.model_fields]):
        raise SettingsError(unknown)
    try:
        return Settings(**flags)  # type: ignore[arg-type]  # texts: pydantic converts them as it does variables
    except ValidationError as error:
        raise SettingsError(explain(error, flags)) from None


def explain(error: ValidationError, flags: Iterable[str]) -> list[str]:
    """Return a line for each fault, with the flag or variable and the meaning of the setting, but without the value."""
    lines = []
    for fault in error.errors(include_url=False, include_input=False):
        name = str(fault["loc"][0])
        source = flag(name) if name in flags else variable(name)
        reason = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{source}: {reason[0].lower()}{reason[1:]}. {Settings.model_fields[name].description}")
    return lines
