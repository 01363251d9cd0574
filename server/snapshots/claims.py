"""Claims streams in a store: of all servers that try, one succeeds in each epoch."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress

from server.request import Lease
from server.snapshots.names import Claim, claim_in, origin_name
from server.snapshots.store import Store


class AlreadyClaimed(Exception):
    """Another server owns the stream, or it is deleted; `claim` tells."""

    def __init__(self, claim: Claim) -> None:
        super().__init__("the stream is deleted" if claim.deleted else "another server owns it")
        self.claim = claim


class Claims:
    """Makes claims, and takes back those that failed, but lie in the `store` all the same."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._doubtful: dict[tuple[str, str, str], bytes] = {}  # with a digest of each
        self._taking_back = threading.Lock()

    def make(self, lease: Lease, origin: bytes) -> set[str]:
        """Claim a stream in the epoch of its lease. Returns the names of what is stored of it then.

        Raises AlreadyClaimed, and OSError.
        """
        claimed = lease.owner, lease.stream_id, origin_name(lease.epoch)
        self._take_back(claimed)
        try:
            self._create(claimed, origin)
        except FileExistsError:
            raise AlreadyClaimed(self.now(lease)) from None
        try:
            names = self._store.names(lease.owner, lease.stream_id)
        except OSError as error:
            self._doubtful[claimed] = _digest(origin)
            if not isinstance(error, TimeoutError):
                with suppress(OSError):
                    self._take_back(claimed)
            raise
        claim = claim_in(names)
        if claim is not None and claim.is_above(lease.epoch):
            if claim.deleted:  # a later epoch may have adopted it: then it stays
                with suppress(OSError):
                    self._store.remove(lease.owner, lease.stream_id, [claimed[-1]])
            raise AlreadyClaimed(claim)
        return names

    def _create(self, claimed: tuple[str, str, str], origin: bytes) -> None:
        """Create a claim. That is done, too, if it is there although the answer got lost."""
        try:
            self._store.create(*claimed, origin)
        except (FileExistsError, TimeoutError):  # the store itself takes back what hung
            raise
        except OSError:
            self._doubtful[claimed] = _digest(origin)
            owner, stream_id, name = claimed
            with suppress(OSError):
                if self._store.get(owner, stream_id, [name]) == {name: origin}:
                    del self._doubtful[claimed]
                    return
            raise

    def now(self, lease: Lease) -> Claim:
        """Who owns a stream that somebody has claimed. Raises OSError."""
        names = self._store.names(lease.owner, lease.stream_id)
        return claim_in(names) or Claim(lease.epoch)

    def take_all_back(self) -> None:
        """Drop the claims that failed, now that the store works. Raises OSError."""
        for claimed in list(self._doubtful):
            self._take_back(claimed)

    def _take_back(self, claimed: tuple[str, str, str]) -> None:
        """Drop a claim, if it is ours and failed: another server may have made the same.

        One that a later epoch may have adopted meanwhile stays.
        """
        with self._taking_back:
            if claimed not in self._doubtful:
                return
            owner, stream_id, name = claimed
            found = self._store.get(owner, stream_id, [name])
            if name in found and _digest(found[name]) == self._doubtful[claimed]:
                claim = claim_in(self._store.names(owner, stream_id))
                if claim is None or claim.deleted or origin_name(claim.epoch) == name:
                    self._store.remove(owner, stream_id, [name])
            del self._doubtful[claimed]


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
