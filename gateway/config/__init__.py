"""The one settings tree: defaults < file < environment < command line, strict, with the origin of every value.

`tree` says what there is, `checks` what a type cannot say of a setting and `rules` what concerns several; `document` reads a text, `strict`
holds it to the tree, `loader` puts the layers together. Environment variables are `PENSTOCK__SECTION__KEY`, their values YAML. Secrets are
hashes or come from files; what is left of them is hidden (`gateway.masking`) before anything is printed.
"""

from __future__ import annotations

from gateway.config.access import Alerts, Allowance, Budget, Group, Issuer, KeyEntry, Limits, Team
from gateway.config.checks import instant
from gateway.config.document import leaves
from gateway.config.environment import strangers
from gateway.config.loader import Loaded, load
from gateway.config.rules import admin_address, is_loopback, key_problems, verify_files, verify_key
from gateway.config.schema import schema
from gateway.config.sentinel import Sentinel
from gateway.config.strict import convert, problems
from gateway.config.tree import (
    Admin,
    Cors,
    LimitRules,
    Listen,
    Log,
    ModelEntry,
    Price,
    Redis,
    Retry,
    Security,
    Settings,
    Timeouts,
    Tls,
    Tracing,
)
from gateway.masking import masked, without_secrets
from gateway.serving.balance.settings import Admission

__all__ = [
    "Admin", "Admission", "Alerts", "Allowance", "Budget", "Cors", "Group", "Issuer", "KeyEntry", "LimitRules", "Limits", "Listen",
    "Loaded", "Log", "ModelEntry", "Price", "Redis", "Retry", "Security", "Sentinel", "Settings", "Team", "Timeouts", "Tls", "Tracing",
    "admin_address", "convert", "instant", "is_loopback", "key_problems", "leaves", "load", "masked", "problems", "schema", "strangers",
    "verify_files", "verify_key", "without_secrets",
]  # fmt: skip
