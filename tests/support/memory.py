"""What a server's processes hold."""

from __future__ import annotations

from pathlib import Path

from keepkv_sglang.tools.server_process import ServerProcess, group_members


def resident_bytes(server: ServerProcess, named: str = "") -> int:
    """Memory that no other process shares, of the server's processes whose command line has this word."""
    total = 0
    for pid in group_members(server.process.pid):
        if named.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    assert total, f"no process of the server is called {named!r}"
    return 1024 * total
