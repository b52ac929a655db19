"""Settings of who may call: keys, the teams they are in, and identity providers whose tokens are as good as keys."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gateway.config import checks
from gateway.config.vocabulary import Amount, Count, File, KeyHash, Name, Rate, Section
from gateway.serving.balance.settings import Weight
from gateway.wire.check import Check


class Limits(Section, frozen=True):
    """What may be used, in requests and in tokens."""

    rpm: Annotated[Rate | None, Meta(description="requests a minute")] = None
    tpm: Annotated[Rate | None, Meta(description="tokens a minute, of prompt and completion")] = None
    max_in_flight: Annotated[Amount | None, Meta(description="requests at once")] = None
    tokens_per_day: Annotated[Amount | None, Meta(description="tokens a calendar day")] = None


class Budget(Section, frozen=True):
    """Money that a key may spend, in the unit of the prices."""

    amount: Annotated[float, Meta(gt=0, le=1e12, description="how much")]
    per: Annotated[Literal["day", "month"], Meta(description="by which calendar period")] = "month"


class Team(Limits, frozen=True, kw_only=True):
    """Keys that share limits and a budget, beside each one's own."""

    name: Annotated[Name, Meta(description="what its keys say as `team`")]
    budget: Annotated[Budget | None, Meta(description="money that they may spend together")] = None
    weight: Annotated[Weight, Meta(description="its share of the places where all hosts are full, beside other teams and keys")] = 1.0


class Allowance(Limits, frozen=True, kw_only=True):
    """What a caller may."""

    team: Annotated[Name | None, Meta(description="one of `teams`, whose limits it shares")] = None
    models: Annotated[list[str] | None, Meta(description="names it may use", extra={"default": "all"})] = None
    per_model: Annotated[dict[str, Limits], Meta(description="limits on one model beside its own")] = {}
    max_n: Annotated[Count | None, Meta(description="the most choices that a request may ask for")] = None
    max_tokens: Annotated[
        Count | None, Meta(description="the most tokens that a request may ask for; also set where it names no bound")
    ] = None
    max_prompt_bytes: Annotated[Count | None, Meta(description="the largest prompt")] = None
    max_grammar_bytes: Annotated[Count | None, Meta(description="the largest grammar or JSON schema")] = None
    priority: Annotated[
        int, Meta(ge=0, le=9, description="its class in the queue before full hosts", extra={"accepted": "0 (first) to 9"})
    ] = 0
    weight: Annotated[Weight, Meta(description="its share of the places where all hosts are full; in a team, of the team's")] = 1.0
    budget: Annotated[Budget | None, Meta(description="money it may spend")] = None


class KeyEntry(Allowance, frozen=True, kw_only=True):
    """A client's key. What is kept of it is its SHA-256."""

    name: Annotated[Name, Meta(description="whose it is; as logs, metrics and the ledger call it")]
    hash: Annotated[KeyHash, Meta(description="SHA-256 of what the client sends as `Authorization: Bearer`")]
    expires: Annotated[
        str | None,
        Meta(description="when it ends, in UTC where no zone is named"),
        Check(checks.instant, "an ISO 8601 date and time like 2027-01-31T18:00:00Z"),
    ] = None
    metadata: Annotated[dict[str, str], Meta(description="the operator's own words")] = {}


class Alerts(Section, frozen=True):
    """Who is told when much of a budget (`budget`, `tokens_per_day`) of a key or a team is used; [limits](limits.md#alerts) says how."""

    webhook: Annotated[
        str | None,
        Meta(description="where a signed POST goes"),
        Check(checks.webhook_url, "a URL like https://hooks.example.com/penstock", quote=False),
    ] = None
    secret_file: Annotated[File | None, Meta(description="a file with the secret that it is signed with, 16 characters or more")] = None
    thresholds: Annotated[
        list[Annotated[float, Meta(gt=0, le=100)]],
        Meta(min_length=1, max_length=20, description="at how many percent, once in each period", extra={"accepted": "one or more"}),
    ] = msgspec.field(default_factory=lambda: [50.0, 80.0, 100.0])
    timeout_s: Annotated[float, Meta(ge=0.1, le=60, description="how long the receiver may take; then it is tried again")] = 10.0
    ca_file: Annotated[
        File | None, Meta(description="a file of certificates to trust for it", extra={"default": "those of the system"})
    ] = None


# What is signed with a secret that both sides know is not among them: whoever can check such a token can make one.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_Claim = Annotated[str, Meta(min_length=1, max_length=256)]
_Url = Annotated[str, Check(checks.issuer_url, "a URL like https://login.example.com/realms/staff")]


class Group(Allowance, frozen=True, kw_only=True):
    """What those may who are in a group."""

    name: Annotated[str, Meta(min_length=1, max_length=256, description="the group, as tokens call it")]


class Issuer(Section, frozen=True, kw_only=True):
    """An identity provider (OpenID Connect, or whoever else signs JWTs) whose tokens are as good as keys; [security](security.md) says how
    they are checked."""

    name: Annotated[Name, Meta(description="what its callers are called: `NAME:` and what `name_claim` says")]
    issuer: Annotated[_Url, Meta(description="the provider, exactly as its tokens say it in `iss`")]
    audience: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=1024)]],
        Meta(min_length=1, max_length=20, description="what tokens must say in `aud`, one of these", extra={"accepted": "one or more"}),
    ]
    jwks_url: Annotated[
        _Url | None,
        Meta(description="where its keys are", extra={"default": "what its `/.well-known/openid-configuration` says"}),
    ] = None
    algorithms: Annotated[
        list[Algorithm], Meta(min_length=1, description="what tokens may be signed with", extra={"accepted": "one or more"})
    ] = msgspec.field(default_factory=lambda: ["RS256", "ES256", "EdDSA"])
    leeway_s: Annotated[float, Meta(ge=0, le=600, description="how far its clock may be from ours")] = 30.0
    refresh_s: Annotated[float, Meta(ge=10, le=86400, description="how often its keys are fetched again")] = 600.0
    ca_file: Annotated[
        File | None, Meta(description="a file of certificates to trust for it", extra={"default": "those of the system"})
    ] = None
    allow_http: Annotated[
        bool, Meta(description="its keys may come over plain HTTP from beyond loopback: whoever is on the way can then make tokens")
    ] = False
    name_claim: Annotated[_Claim, Meta(description="the claim that names the caller; a dot leads into an object")] = "sub"
    groups_claim: Annotated[_Claim, Meta(description="the claim that holds the caller's groups, a list or a text with spaces")] = "groups"
    team_claim: Annotated[_Claim | None, Meta(description="the claim that names one of `teams`, before what the group says")] = None
    models_claim: Annotated[
        _Claim | None, Meta(description="the claim that holds the models the caller may use, before what the group says")
    ] = None
    groups: Annotated[list[Group], Meta(description="what groups may; the first one that the caller is in counts")] = []
    require_group: Annotated[bool, Meta(description="who is in none of `groups` is refused with 403")] = False
    default: Annotated[Allowance, Meta(description="what those may who are in none of `groups`")] = Allowance()
