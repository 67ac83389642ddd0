"""The variables `SLATEWISE_*` that are no settings: mistyped ones, those of the client, and service links.

Called by: `settings.py` and `main.py`. Calls: nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

PREFIX = "SLATEWISE_"
# Variables of the client. Both may be set where a server starts, but a lone API_KEY is taken for a mistyped API_KEYS:
# a server without the keys that its operator meant would be open.
CLIENT_VARIABLES = ("SLATEWISE_URL", "SLATEWISE_API_KEY")
KEYS_VARIABLES = {"SLATEWISE_API_KEYS", "SLATEWISE_API_KEYS_FILE"}
# Settings of before, and what took their place.
REPLACED = {"SLATEWISE_MAX_OUTSTANDING_TOKENS": "SLATEWISE_MAX_QUEUE_MS, a time in milliseconds"}
# Kubernetes and Docker set such variables for each Service or link whose name begins with "slatewise".
SERVICE_LINK = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)", re.IGNORECASE
)
LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


def is_link_address(value: object) -> bool:
    return isinstance(value, str) and LINK_ADDRESS.match(value) is not None


def unknown_variables(environment: Mapping[str, str], settings: Collection[str]) -> list[str]:
    """Return a message for each `SLATEWISE_*` variable that is neither one of `settings` nor a service link."""
    known = set(settings)
    names = {name.upper() for name in environment}
    known |= {name for name in CLIENT_VARIABLES if name != "SLATEWISE_API_KEY" or names & KEYS_VARIABLES}
    messages = []
    for name, value in sorted(environment.items()):
        if not name.upper().startswith(PREFIX) or name.upper() in known or SERVICE_LINK.fullmatch(name):
            continue
        if name.upper().endswith("_PORT") and is_link_address(value):
            continue
        if name.upper() in REPLACED:
            messages.append(f"{name} is no setting any more; use {REPLACED[name.upper()]}")
            continue
        nearest = difflib.get_close_matches(name.upper(), known - {*CLIENT_VARIABLES}, 1, 0.0)[0]
        messages.append(f"{name} is not a setting; did you mean {nearest}?")
    return messages
