"""Which tests run in one process where several share the work: those that share what is costly."""

from __future__ import annotations

import re

from xdist.scheduler import LoadScopeScheduling

# Folders and files whose tests share by the first word of their parameters, not by file: a server
# with or without Ray, or a bundle of one pattern.
_BY_PARAMETER = {
    "tests/e2e/": "server",
    "tests/parity/": "bundle",
    "tests/export/test_kernels.py": "half bundle",
    "tests/server/runtime/test_device_state.py": "half bundle",
}


class ByWhatIsShared(LoadScopeScheduling):
    """Gives whole groups to a process, those of many tests first."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def group(nodeid: str) -> str:
    """The group of a test: its file, or what it shares with tests of others.

    Ray's servers are all in one: two at once would want more processors than there are.
    """
    file, _, rest = nodeid.partition("::")
    for place, shared in _BY_PARAMETER.items():
        if nodeid.startswith(place):
            word = re.search(r"\[(\w+)", rest)
            if shared == "server":
                return "server local" if word and word[1] == "local" else "server ray"
            return f"{shared} {word[1]}" if word else file
    return file
