"""`slatewise doctor`: checks the machine, the installation, the settings, the bundles, Redis and the port.

Each check is one line: ok, warn or fail. No line contains a secret, so the output can be pasted into an issue.
Called by: cli.py. Calls: the module of each check; none of them changes anything.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import resource
import ssl
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from slatewise import VERSION
from slatewise.bundle.loader import check_files, check_variant_files
from slatewise.bundle.manifest import ManifestError, read_manifest, versions
from slatewise.bundle.signature import PublicKeys, SignatureFault
from slatewise.flags import add_flags, read_settings
from slatewise.http.keys import KeysError, open_keys
from slatewise.http.server import AddressError, bind
from slatewise.http.tls import TlsError, TlsFiles, make_context
from slatewise.process import CPUINFO, available_cpus, cpu_name, cpu_quota, memory_limit
from slatewise.settings import Settings, SettingsError, listed
from slatewise.store.client import connect_async, disconnect, split

State = Literal["ok", "warn", "fail"]

PACKAGES = (
    ("numpy", "base"),
    ("onnxruntime", "base"),
    ("pydantic", "base"),
    ("httpx", "base"),
    ("fastapi", "serve"),
    ("uvicorn", "serve"),
    ("redis", "serve"),
    ("prometheus-client", "serve"),
    ("polars", "train"),
    ("torch", "train"),
)
FAST_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
REDIS_SECONDS = 2.0
SPARE_DESCRIPTORS = 256  # for graphs, Redis, logs and libraries


class Line(NamedTuple):
    check: str
    state: State
    text: str


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 1 if a check failed."""
    parser = argparse.ArgumentParser(
        "slatewise doctor",
        usage="%(prog)s [--json] [--setting VALUE ...]",
        description="Check the machine, the installation, the settings, the bundles, Redis and the port.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    add_flags(parser)
    flags = vars(parser.parse_args(argv))
    as_json = flags.pop("json")
    lines = []
    for line in examine(flags):
        lines.append(line)
        if not as_json:
            print(f"{line.state:<4}  {line.check:<12}  {line.text}", flush=True)
    if as_json:
        print(json.dumps([line._asdict() for line in lines], indent=1))
    failed = [line.check for line in lines if line.state == "fail"]
    if failed:
        print(f"slatewise doctor: {len(failed)} of {len(lines)} checks failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def examine(flags: dict[str, str]) -> Iterator[Line]:
    """Yield the lines. Wrong settings are lines; the checks that need one of them then use its default."""
    yield Line("slatewise", "ok", f"{VERSION}, Python {platform.python_version()}, {platform.platform()}")
    yield packages()
    yield telemetry()
    yield cpu()
    yield quota()
    try:
        settings = read_settings(flags)
        yield Line("settings", "ok", "every flag and variable is valid")
    except SettingsError as error:
        for fault in error.faults:
            yield Line("settings", "fail", fault)
        settings = valid_settings(flags)
    yield memory(settings)
    yield descriptors(settings)
    yield keys(settings)
    yield tls(settings)
    yield from bundles(settings.bundles, listed(settings.bundle_keys))
    yield redis(settings.redis_url.get_secret_value())
    yield port(settings)


def valid_settings(flags: dict[str, str]) -> Settings:
    """Read the settings with the defaults in place of wrong values, so that a wrong one does not hide the others."""
    values: dict[str, Any] = dict(flags)
    for _ in Settings.model_fields:
        try:
            return Settings(**values)
        except ValidationError as error:
            for fault in error.errors(include_url=False, include_input=False):
                name = str(fault["loc"][0])
                values[name] = Settings.model_fields[name].get_default(call_default_factory=True)
    return Settings.model_construct()


def packages() -> Line:
    found = []
    missing: dict[str, list[str]] = {}
    for name, extra in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.setdefault(extra, []).append(name)
    text = ", ".join(found)
    needed = [name for extra in ("base", "serve") for name in missing.get(extra, [])]
    if needed:
        remedy = "pip install 'slatewise[serve]' (in a clone: pip install '.[serve]')"
        return Line("packages", "fail", f"{text}; missing: {', '.join(needed)}; run: {remedy}")
    return Line("packages", "ok", text + ("; no training: extra `train` is absent" if "train" in missing else ""))


def telemetry() -> Line:
    if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":
        return Line("telemetry", "ok", "ONNX Runtime sends none: ORT_DISABLE_TELEMETRY=1")
    text = "ORT_DISABLE_TELEMETRY is not 1, so ONNX Runtime may write a device id and look up its collector; unset it"
    return Line("telemetry", "warn", text)


def cpu(cpuinfo: Path = CPUINFO) -> Line:
    flags: set[str] = set()
    if cpuinfo.exists():
        rows = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        flags = {flag for name, _, text in rows if name.strip() in ("flags", "Features") for flag in text.split()}
    fast = [flag for flag in FAST_FLAGS if flag in flags]
    text = f"{cpu_name(cpuinfo)}; flags: {', '.join(fast) or 'unknown'}"
    if platform.machine() == "x86_64" and flags and "avx2" not in flags:
        return Line("cpu", "warn", f"{text}; without avx2 the model is several times slower")
    return Line("cpu", "ok", text)


def quota() -> Line:
    threads = cpu_quota()
    return Line("quota", "ok", f"{threads} threads by default, of {available_cpus()} CPUs that may run this process")


def memory(settings: Settings) -> Line:
    limit = memory_limit()
    text = f"{limit / 2**30:.1f} GiB, page size {resource.getpagesize()} bytes"
    cache = settings.history_cache_mb * 2**20
    if cache > limit / 2:
        return Line("memory", "warn", f"{text}; history_cache_mb = {settings.history_cache_mb:g} is over half of it")
    return Line("memory", "ok", text)


def descriptors(settings: Settings) -> Line:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_in_flight + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        text = f"limit {soft}, but max_in_flight = {settings.max_in_flight} may need {wanted}; raise it: ulimit -n"
        return Line("descriptors", "warn", text)
    return Line("descriptors", "ok", f"limit {soft} (hard {hard})")


def bundles(root: Path, keys: tuple[str, ...] = ()) -> Iterator[Line]:
    """Check manifest and digests of the newest version of each ranker, and the signature if there are `keys`.

    Loads no graph.
    """
    folders = sorted(path for path in root.iterdir() if versions(path)) if root.is_dir() else []
    if not folders:
        text = f"{root}: no bundle; make one with `slatewise train`, then `slatewise export`, or set SLATEWISE_BUNDLES"
        yield Line("bundle", "fail", text)
    trusted = PublicKeys()
    try:
        trusted = PublicKeys(keys)
    except SignatureFault as error:
        yield Line("bundle", "fail", f"SLATEWISE_BUNDLE_KEYS: {error}")
    for folder in folders:
        path = folder / str(versions(folder)[-1])
        try:
            manifest = read_manifest(path, trusted)
            check_files(path, manifest)
            for variant in manifest.variants:
                check_variant_files(path, manifest, variant)
        except (ManifestError, OSError) as error:
            yield Line("bundle", "fail", f"{path}: {' '.join(str(error).split())}")
            continue
        megabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        names = ", ".join(manifest.variants)
        text = f"{folder.name} version {path.name}: {len(manifest.files)} digests agree, {megabytes:.0f} MB, {names}"
        yield Line("bundle", "ok", text)


def keys(settings: Settings) -> Line:
    try:
        known, _ = open_keys(settings)
    except KeysError as error:
        return Line("keys", "fail", str(error))
    if known:
        return Line("keys", "ok", f"{len(known)} API keys")
    if settings.host in ("127.0.0.1", "::1", "localhost"):
        return Line("keys", "ok", f"none, and the server listens on {settings.host} alone")
    return Line(
        "keys", "warn", f"none: whoever reaches {settings.host} may ask and delete; set SLATEWISE_API_KEYS_FILE"
    )


def tls(settings: Settings) -> Line:
    if not settings.tls_certificate:
        return Line("tls", "ok", "not set: plain HTTP")
    version = settings.tls_least_version
    files = TlsFiles(settings.tls_certificate, settings.tls_key, settings.tls_client_ca, version)
    try:
        make_context(files)
    except TlsError as error:
        return Line("tls", "fail", str(error))
    clients = "; clients need a certificate" if files.client_ca else ""
    return Line("tls", "ok", f"{version} or newer, {files.certificate}{clients}")


def redis(url: str) -> Line:
    if not url:
        return Line("redis", "ok", "not set: meta-embeddings come from the bundle")
    try:
        place = places(url)
        asyncio.run(asyncio.wait_for(ping(url), REDIS_SECONDS))
    except TimeoutError:
        return Line("redis", "fail", f"{place} did not answer PING within {REDIS_SECONDS:g} s")
    except ValueError:  # its message may contain parts of the address
        return Line("redis", "fail", "SLATEWISE_REDIS_URL is not a valid address")
    except Exception as error:  # redis-py's errors; without the text, which may name the user
        return Line("redis", "fail", f"{place}: {type(error).__name__}")
    return Line("redis", "ok", f"{place} answers PING")


def places(url: str) -> str:
    """Return the hosts of a URL, without user and password."""
    if url.startswith("unix://"):
        return "the socket"
    _, hosts, _, _ = split(url)
    return ", ".join(f"{host}:{number}" for host, number in hosts)


async def ping(url: str) -> None:
    client = connect_async(url, REDIS_SECONDS, 1)
    try:
        await client.ping()
    finally:
        await disconnect(client)


def port(settings: Settings) -> Line:
    address = f"{settings.host}, port {settings.port}"
    try:
        with closing(bind(settings.host, settings.port)) as listener:
            listener.listen(1)
        return Line("port", "ok", f"{address} is free")
    except OSError:  # another process began to listen
        pass
    except AddressError as error:
        if "in use" not in str(error):
            return Line("port", "fail", str(error))
    if is_slatewise(settings):
        text = f"{address}: a Slatewise server listens there; another one needs a free port: SLATEWISE_PORT (--port)"
        return Line("port", "warn", text)
    return Line("port", "fail", f"{address} is used by another process; choose one with SLATEWISE_PORT (--port)")


def is_slatewise(settings: Settings) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    scheme = "https" if settings.tls_certificate else "http"
    place = f"[{host}]" if ":" in host else host
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if settings.tls_certificate:  # which is shown to a server that asks for one
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with suppress(OSError, ValueError):  # the line `tls` says what is wrong
            context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
        handlers.append(urllib.request.HTTPSHandler(context=context))
    direct = urllib.request.build_opener(*handlers)
    url = f"{scheme}://{place}:{settings.port}/livez"
    try:
        with direct.open(url, timeout=2) as answer:
            return bool(json.load(answer) == {"status": "alive"})
    except (OSError, ValueError):
        return False
