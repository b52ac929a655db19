"""Hosts from DNS: a name stands for as many hosts as it has addresses (A, AAAA), or as its SRV records name, with their weights and
priorities. Asked again and again; while nobody answers, those last known stay."""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import urlsplit

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver
import msgspec

from backends.sglang_dsv3.config import HostConfig

log = logging.getLogger("penstock.resolve")

# How long one question may take, all servers and tries together.
LIMIT_S = 5.0


class Resolver:
    """One configured host that is a name; `hosts` are those that it stands for now."""

    def __init__(self, host: HostConfig, server: str | None) -> None:
        assert host.url is not None
        parts = urlsplit(host.url)
        self._host = host
        self._name, self._port = parts.hostname or "", parts.port or 80
        self._server = server
        self._resolver: dns.asyncresolver.Resolver | None = None
        self.hosts: list[HostConfig] = []
        self.problem = f"The name {self._name} has not been resolved yet."

    def _open(self) -> dns.asyncresolver.Resolver:
        if self._resolver is None:
            self._resolver = dns.asyncresolver.Resolver(configure=self._server is None)
            self._resolver.lifetime = LIMIT_S
            if self._server is not None:
                address, _, port = self._server.rpartition(":")
                self._resolver.nameservers, self._resolver.port = [address.strip("[]")], int(port)
        return self._resolver

    async def ask(self) -> None:
        """Resolve once; what cannot be resolved leaves everything as it was."""
        try:
            found = await (self._services() if self._host.resolve == "srv" else self._addresses(self._name))
        except (dns.exception.DNSException, OSError) as error:
            self.problem = f"The name {self._name} cannot be resolved."
            log.warning("%s cannot be resolved, %d hosts stay: %s", self._name, len(self.hosts), error)
            return
        hosts = [self._as_host(*each) for each in sorted(set(found))]
        if hosts != self.hosts:
            log.info("%s is now %s", self._name, ", ".join(host.url or "" for host in hosts))
        self.hosts = hosts

    async def _addresses(self, name: str, port: int | None = None, weight: int = 1, priority: int = 0) -> list[tuple[str, int, int, int]]:
        found: list[tuple[str, int, int, int]] = []
        problem: dns.exception.DNSException | None = None
        for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            try:
                answer = await self._open().resolve(name, kind, search=True)
            except (dns.resolver.NoAnswer, dns.resolver.NXDOMAIN) as error:
                problem = error
                continue
            found += [(record.address, port or self._port, weight, priority) for record in answer]
        if not found and problem is not None:
            raise problem
        return found

    async def _services(self) -> list[tuple[str, int, int, int]]:
        answer = await self._open().resolve(self._name, dns.rdatatype.SRV, search=True)
        found = [self._addresses(str(one.target), one.port, max(one.weight, 1), one.priority) for one in answer]
        return [each for several in await asyncio.gather(*found) for each in several]

    def _as_host(self, address: str, port: int, weight: int, priority: int) -> HostConfig:
        at = f"[{address}]" if ":" in address else address
        host = self._host
        tier = host.priority + priority
        return msgspec.structs.replace(host, url=f"http://{at}:{port}", weight=host.weight * weight, priority=tier, resolve=None)
