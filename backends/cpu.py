"""What the CPU at hand lacks for int8 products."""

from __future__ import annotations

import functools
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VNNI = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")


@functools.cache
def lacks_vnni(cpuinfo: Path = CPUINFO) -> str:
    """The name of an x86 CPU without VNNI; "" for CPUs that have it, for others than x86, and where nobody can tell.

    Without it uint8 x int8 products are added in pairs at 16 bits, which saturates: 2 * 255 * 127 does not fit.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return ""
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is None or set(VNNI) & set(flags[1].split()):
        return ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else "an x86 CPU"
