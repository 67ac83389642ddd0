"""The keys that must have signed a bundle, from the setting `bundle_keys`: for the server and for commands.

Called by: `main.py`, `check.py`, `local/ranker.py`. Calls: `signature.py`, and the settings.
"""

from __future__ import annotations

import os

from pydantic import ValidationError

from slatewise.bundle.signature import PublicKeys, SignatureFault
from slatewise.flags import explain
from slatewise.security_settings import SecuritySettings
from slatewise.settings import SettingsError, listed, variable

VARIABLE = variable("bundle_keys")


def trusted_keys(text: str) -> PublicKeys:
    """Return the keys in the text of the setting. Raises SettingsError."""
    try:
        return PublicKeys(listed(SecuritySettings(bundle_keys=text).bundle_keys))
    except ValidationError as error:
        raise SettingsError(explain(error, ())) from None
    except SignatureFault as error:
        raise SettingsError([f"{VARIABLE} (--bundle-keys): {error}"]) from None


def keys_of_environment() -> PublicKeys:
    """Return the keys in the variable of the setting, for who has no other settings. Raises SettingsError."""
    found = {name.upper(): value for name, value in os.environ.items()}  # as settings are read
    return trusted_keys(found.get(VARIABLE, ""))
