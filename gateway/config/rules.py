"""What no single setting can say: those that concern each other, and files that must be there.

Each rule names the sections that it reads, so that it is asked only where these hold what they should.
"""

from __future__ import annotations

import difflib
import ipaddress
import ssl
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from gateway.config import checks
from gateway.config.access import Allowance, Issuer, KeyEntry, Team
from gateway.config.tree import Listen, Settings
from gateway.errors import ConfigError, ConfigErrors
from gateway.masking import shown

Problems = Iterator[ConfigError]
# Characters of a secret that somebody has chosen: of fewer it might be guessed.
LEAST_SECRET = 16


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def admin_address(listen: Listen) -> tuple[str, int] | None:
    """Where the admin API listens; None when it is off."""
    return checks.admin(listen.admin)


def _listen(settings: Settings) -> Problems:
    listen = settings.listen
    if not settings.keys_required() and not is_loopback(listen.host):
        yield ConfigError("listen.host", f"without keys the gateway serves on loopback only, not on {listen.host}; configure `keys` first")
    if settings.limited() and listen.workers > 1 and settings.redis.url is None:
        yield ConfigError(
            "listen.workers", f"{listen.workers} workers cannot keep limits together without Redis: set redis.url, or listen.workers to 1"
        )


def _admin(settings: Settings) -> Problems:
    names = {"admin", "local"}  # what the keys are called that have no name
    for index, key in enumerate(settings.admin.keys):
        if key.name in names:
            yield ConfigError(f"admin.keys.{index}.name", f"'{key.name}' is taken")
        names.add(key.name)
    place = admin_address(settings.listen)
    if place is None:
        return
    if place == (settings.listen.host, settings.listen.port) and place[1] != 0:
        yield ConfigError("listen.admin", "must differ from the public address")


def _models(settings: Settings) -> Problems:
    if not settings.models:
        yield ConfigError("models", "no model is configured, so nothing could be served")
    taken: dict[str, str] = {}
    for model, entry in settings.models.items():
        for alias in (model, *entry.aliases):
            if alias in taken:
                yield ConfigError(f"models.{model}", f"the name '{shown('', alias)}' is already taken by models.{taken[alias]}")
            taken[alias] = model


def _teams(settings: Settings) -> Problems:
    names: set[str] = set()
    for index, team in enumerate(settings.teams):
        yield from _budget(team, f"teams.{index}", settings)
        if team.name in names:
            yield ConfigError(f"teams.{index}.name", f"'{team.name}' is used twice")
        names.add(team.name)


def _keys(settings: Settings) -> Problems:
    names: set[str] = set()
    for index, key in enumerate(settings.keys):
        yield from key_problems(key, f"keys.{index}", settings)
        if key.name in names:
            yield ConfigError(f"keys.{index}.name", f"'{key.name}' is used twice")
        names.add(key.name)


def key_problems(key: KeyEntry, path: str, settings: Settings) -> Problems:
    """What is wrong with a key beyond its types; of keys in the file, and of those that are made while the gateway runs."""
    yield from _allowance(key, path, settings)


def _allowance(key: Allowance, path: str, settings: Settings) -> Problems:
    known = {name for model, entry in settings.models.items() for name in (model, *entry.aliases)}
    for where, names, accepted in (("models", key.models or [], known), ("per_model", list(key.per_model), set(settings.models))):
        for name in names:
            if name not in accepted:
                yield ConfigError(f"{path}.{where}", f"no model is called '{shown('', name)}'{_nearest(name, accepted)}")
    teams = [team.name for team in settings.teams]
    if key.team is not None and key.team not in teams:
        yield ConfigError(f"{path}.team", f"no team is called '{shown('', key.team)}'{_nearest(key.team, teams)}")
    yield from _budget(key, path, settings)


def _budget(one: Allowance | Team, path: str, settings: Settings) -> Problems:
    if one.budget is not None and all(model.price is None for model in settings.models.values()):
        yield ConfigError(f"{path}.budget", "no model has a price, so nothing would ever be spent: set models.NAME.price")


def _oidc(settings: Settings) -> Problems:
    names: set[str] = set()
    urls: set[str] = set()
    for index, issuer in enumerate(settings.oidc):
        path = f"oidc.{index}"
        if issuer.name in names:
            yield ConfigError(f"{path}.name", f"'{issuer.name}' is used twice")
        if issuer.issuer in urls:
            yield ConfigError(f"{path}.issuer", f"'{shown('', issuer.issuer)}' is used twice: give one issuer several audiences instead")
        names.add(issuer.name)
        urls.add(issuer.issuer)
        yield from _plain(issuer, path)
        groups: set[str] = set()
        for place, group in enumerate(issuer.groups):
            yield from _allowance(group, f"{path}.groups.{place}", settings)
            if group.name in groups:
                yield ConfigError(f"{path}.groups.{place}.name", f"'{shown('', group.name)}' is used twice")
            groups.add(group.name)
        yield from _allowance(issuer.default, f"{path}.default", settings)
        if issuer.require_group and not issuer.groups:
            yield ConfigError(f"{path}.require_group", "nobody could ever call: there are no `groups`")


def _alerts(settings: Settings) -> Problems:
    if settings.alerts.webhook is not None and settings.alerts.secret_file is None:
        yield ConfigError("alerts.secret_file", "is missing: whoever gets what alerts.webhook is sent must be able to tell that it is ours")


def _plain(issuer: Issuer, path: str) -> Problems:
    """Keys that come over plain HTTP from another machine."""
    name, url = ("jwks_url", issuer.jwks_url) if issuer.jwks_url is not None else ("issuer", issuer.issuer)
    if url.startswith("http://") and not issuer.allow_http and not is_loopback(urlsplit(url).hostname or ""):
        yield ConfigError(
            f"{path}.{name}", f"'{shown('', url)}' is plain HTTP: whoever is on the way could make tokens; accepted: https://, or "
            f"{path}.allow_http: true",
        )  # fmt: skip


def verify_key(key: KeyEntry, path: str, settings: Settings) -> None:
    """Raises ConfigErrors for what `key_problems` finds."""
    if found := list(key_problems(key, path, settings)):
        raise ConfigErrors(found)


def _security(settings: Settings) -> Problems:
    security = settings.security
    if security.body_memory_mb < security.body_limit_mb:
        yield ConfigError(
            "security.body_memory_mb", f"{security.body_memory_mb} is out of range; accepted: {security.body_limit_mb} "
            "(security.body_limit_mb) or more",
        )  # fmt: skip


def _redis(settings: Settings) -> Problems:
    redis = settings.redis
    hostless = redis.url is not None and not redis.url.startswith("unix") and not urlsplit(redis.url).netloc.rpartition("@")[2]
    if hostless and not redis.sentinels:
        yield ConfigError("redis.url", "names no host; accepted: redis://HOST:PORT/DB, or one without a host beside redis.sentinels")
    if redis.cluster and redis.sentinels:
        yield ConfigError("redis.sentinels", "a Redis Cluster has no sentinels: use one of the two")
    if redis.cluster and redis.url is not None and checks.redis_url(redis.url):
        yield ConfigError("redis.url", "names a database, of which a Redis Cluster has only 0")


class Rule(NamedTuple):
    """What is asked, and which sections must be right before it can be."""

    reads: Collection[str]
    problems: Callable[[Settings], Iterable[ConfigError]]


RULES = (
    Rule({"listen", "keys", "oidc", "teams", "redis", "security", "models"}, _listen),
    Rule({"listen", "admin"}, _admin),
    Rule({"models"}, _models),
    Rule({"teams", "models"}, _teams),
    Rule({"keys", "teams", "models"}, _keys),
    Rule({"oidc", "teams", "models"}, _oidc),
    Rule({"alerts"}, _alerts),
    Rule({"security"}, _security),
    Rule({"redis"}, _redis),
)


def verify_files(settings: Settings) -> None:
    """Raises ConfigErrors when the listener's certificate and key cannot be read or do not belong together, or there is no secret for
    alerts. It reads the files, so it is asked where the gateway will run."""
    if found := [*_tls(settings), *_alert_secret(settings)]:
        raise ConfigErrors(found)


def _tls(settings: Settings) -> Problems:
    tls = settings.listen.tls
    if tls is None:
        return
    unreadable = False
    for name in ("cert_file", "key_file", "client_ca_file"):
        if (file := getattr(tls, name)) is not None:
            try:
                Path(file).read_bytes()
            except OSError as error:
                unreadable = True
                yield ConfigError(f"listen.tls.{name}", f"cannot be read: {error}")
    if unreadable:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: "")  # without it OpenSSL would ask at the terminal
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        yield ConfigError("listen.tls", f"cert_file and key_file are no PEM certificate and its unencrypted key ({reason})")
    if tls.client_ca_file is not None:
        try:
            context.load_verify_locations(tls.client_ca_file)
        except (OSError, ValueError) as error:
            yield ConfigError("listen.tls.client_ca_file", f"holds no PEM certificate ({getattr(error, 'reason', None) or error})")


def _alert_secret(settings: Settings) -> Problems:
    if (file := settings.alerts.secret_file) is not None:
        try:
            length = len(Path(file).read_bytes().strip())
        except OSError as error:
            yield ConfigError("alerts.secret_file", f"cannot be read: {error}")
        else:
            if length < LEAST_SECRET:
                yield ConfigError("alerts.secret_file", f"holds {length} characters; accepted: {LEAST_SECRET} or more")


def _nearest(given: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
