"""The settings of keys, TLS and signatures: a part of `settings.py`.

Called by: settings.py. Calls: pydantic.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import BaseModel, Field, SecretStr, ValidationInfo, field_validator


class SecuritySettings(BaseModel):
    """Each field has the variable `SLATEWISE_<NAME>` and the flag `--<name>`."""

    bundle_keys: str = Field(
        "",
        description="Public keys of those who may sign bundles, separated by commas, as `slatewise sign` prints them; "
        "empty: bundles need no signature.",
    )
    api_keys_file: str = Field(
        "",
        description="File with further keys, one a line, read again when it changes; `#` begins a comment. A key may "
        "be given as `sha256:` and its digest, and limits may follow it.",
    )
    key_max_in_flight: int = Field(
        0,
        ge=0,
        description="Requests in flight of one key, above which its next ones get 429, for keys whose line in "
        "`api_keys_file` has no `in_flight`; 0: no limit.",
    )
    key_max_rate: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Requests a second of one key, above which its next ones get 429, for keys whose line in "
        "`api_keys_file` has no `rate`; 0: no limit.",
    )
    most_important_priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="Most important priority of requests without a key, and of keys whose line in `api_keys_file` has "
        "no `priority`; a smaller number in a request is raised to it. -100: clients may choose any.",
    )
    metrics_key: SecretStr = Field(
        SecretStr(""),
        description="Key of `GET /metrics`, for `Authorization: Bearer`; empty: `/metrics` is open.",
    )
    tls_certificate: str = Field(
        "",
        description="PEM file with the certificate of the server and its chain, read again when it changes; empty: no "
        "TLS.",
    )
    tls_key: str = Field("", validate_default=True, description="PEM file with the private key of the certificate.")
    tls_client_ca: str = Field(
        "",
        validate_default=True,
        description="PEM file with the authorities that issue the certificates of clients (mutual TLS); empty: clients "
        "need none.",
    )
    tls_least_version: Literal["1.2", "1.3"] = Field("1.2", description="Oldest version of TLS that clients may use.")

    @field_validator("bundle_keys")
    @classmethod
    def signatures_can_be_checked(cls, keys: str) -> str:
        if keys and not keys.strip(" ,"):
            raise ValueError("is set but contains no key")
        if keys and importlib.util.find_spec("cryptography") is None:
            raise ValueError("needs a package for signatures: pip install 'slatewise[signing]'")
        return keys

    @field_validator("tls_key")
    @classmethod
    def certificate_has_a_key(cls, key: str, info: ValidationInfo) -> str:
        if bool(info.data.get("tls_certificate")) != bool(key):
            raise ValueError("must be set when tls_certificate is, and only then")
        return key

    @field_validator("tls_client_ca")
    @classmethod
    def client_ca_has_a_certificate(cls, path: str, info: ValidationInfo) -> str:
        if path and not info.data.get("tls_certificate"):
            raise ValueError("needs tls_certificate: without TLS no client shows a certificate")
        return path

    @field_validator("metrics_key")
    @classmethod
    def metrics_key_is_a_key(cls, key: SecretStr) -> SecretStr:
        if (text := key.get_secret_value()) and ("," in text or not text.strip()):
            raise ValueError("must be one key; unset it to leave /metrics open")
        return key
