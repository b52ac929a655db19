"""`python -m openapi [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

import openapi
from gateway import config, routes
from gateway.access.keys import Keys
from gateway.access.limits.memory import Memory
from gateway.account import Accounts, nothing_spent
from gateway.exchange import Exchanges
from gateway.home import home
from gateway.lifecycle import Lifecycle
from gateway.plugin import BackendEnv
from gateway.serving.registry import Registry
from gateway.telemetry.metrics import Metrics
from middleware.rate_limit import RateLimit

FILE = Path(__file__).with_name("openapi.json")


def main() -> int:
    """Write the document, or with `--check` say whether it is what the code serves."""
    settings = config.load(environment={}).settings
    registry = Registry(settings, BackendEnv(home()))
    rate_limit = RateLimit(settings, Memory(), Metrics())
    exchanges, accounts = Exchanges(registry, settings, rate_limit), Accounts(rate_limit, list(settings.models), nothing_spent)
    made = openapi.text(routes.table(registry, exchanges, accounts, Lifecycle(), Keys(settings)), registry.example)
    if "--check" not in sys.argv[1:]:
        FILE.write_bytes(made)
        return 0
    current = FILE.exists() and FILE.read_bytes() == made
    print("openapi/openapi.json is what the code serves" if current else "openapi/openapi.json is old: run `make fix`")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
