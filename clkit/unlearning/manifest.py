"""What the data were before and after: keyed record hashes, their Merkle roots, and the check that nothing is missing.

A leaf is an HMAC under the ledger's key, so neither roots nor leaves tell someone without the ledger what was in the
data.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from clkit.unlearning.records import Place, Record

SCHEMA = 1


def keyed(key: bytes, *parts: str) -> str:
    """HMAC-SHA256 of some texts, hexadecimal."""
    return hmac.new(key, "\0".join(parts).encode(), hashlib.sha256).hexdigest()


def merkle_root(leaves: Sequence[str]) -> str:
    """The root over hexadecimal leaves in order, as in RFC 6962: leaves and nodes are hashed with different prefixes.

    >>> merkle_root([]) == hashlib.sha256(b"").hexdigest()
    True
    """

    def root(part: Sequence[bytes]) -> bytes:
        if len(part) == 1:
            return part[0]
        half = 1 << (len(part) - 1).bit_length() - 1
        return hashlib.sha256(b"\x01" + root(part[:half]) + root(part[half:])).digest()

    if not leaves:
        return hashlib.sha256(b"").hexdigest()
    return root([hashlib.sha256(b"\x00" + bytes.fromhex(leaf)).digest() for leaf in leaves]).hex()


@dataclass(frozen=True)
class Manifest:
    """Leaves of the full, the retained and the forgotten records, in the order of the data."""

    full: tuple[str, ...]
    retained: tuple[str, ...]
    forgotten: tuple[str, ...]

    @classmethod
    def of(cls, known: Sequence[Record], retained: Sequence[Record], gone: Collection[Place], key: bytes) -> Manifest:
        """From the records before, the records that are trained on, and the places that were taken out."""

        def leaf(record: Record) -> str:
            return keyed(key, record.place.task, record.place.part, record.id, record.content)

        taken = set(gone)
        return cls(
            tuple(map(leaf, known)), tuple(map(leaf, retained)), tuple(leaf(r) for r in known if r.place in taken)
        )

    def problems(self) -> list[str]:
        """What is wrong with the partition: nothing if forgotten and retained are disjoint and together all."""
        full, retained, forgotten = Counter(self.full), Counter(self.retained), Counter(self.forgotten)
        found = []
        if retained & forgotten:
            found.append("forgotten records are among the retained ones")
        if retained + forgotten != full:
            found.append("forgotten and retained records together are not the full set")
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON for manifest.json."""
        return {
            "schema": SCHEMA,
            "full": list(self.full),
            "retained": list(self.retained),
            "forgotten": list(self.forgotten),
        }

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: it is not a manifest.
        """
        parts = [value.get(k) for k in ("full", "retained", "forgotten")] if isinstance(value, dict) else [None]
        if not all(isinstance(p, list) and all(isinstance(leaf, str) for leaf in p) for p in parts):
            raise ValueError("not a manifest")
        return cls(*(tuple(p) for p in parts if p is not None))

    def summary(self) -> dict[str, Any]:
        """Counts and roots, for the certificate."""
        return {
            name: {"count": len(leaves), "merkle_root": merkle_root(leaves)}
            for name, leaves in (("full", self.full), ("retained", self.retained), ("forgotten", self.forgotten))
        }
