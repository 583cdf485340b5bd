"""Globs of rules: over the names of ops, and over sites, component by component."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import lru_cache


def name_matches(glob: str, name: str) -> bool:
    """``*`` and ``?`` over an op's name."""
    return fnmatchcase(name, glob)


def site_matches(glob: str, site: str) -> bool:
    """Component-wise glob; components are divided by ``.`` and ``/``.

    ``*`` and ``?`` stay inside one component, ``**`` spans any number of them, none included. A repeat keeps its
    ``:k``: ``add`` is not ``add:1``, ``add*`` is both.
    """
    return _site_pattern(glob).fullmatch(site.replace(".", "/") + "/") is not None


def stars_within(glob: str) -> str:
    """The first component that holds ``**`` and more, where it is no more than ``*``; "" for none."""
    return next((part for part in re.split(r"[./]", glob) if "**" in part and part != "**"), "")


@lru_cache(maxsize=4096)
def _site_pattern(glob: str) -> re.Pattern[str]:
    """One regex over the site's components, each closed by a slash."""
    text = ""
    for part in re.split(r"[./]", glob):
        inner = re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
        text += "(?:[^/]*/)*" if part == "**" else inner + "/"
    return re.compile(text)
