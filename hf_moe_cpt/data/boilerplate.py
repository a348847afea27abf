"""Licence and copyright text: it stands in thousands of files and teaches a model nothing but itself. Source: ours."""

import re


_PHRASES = (
    r"copyright\s*(?:\(c\)|©|\d{4}|notice|holder|owner)",
    r"all rights reserved",
    r"permission (?:is hereby granted|to use, copy)",
    r"without warranty of any kind|warranties or conditions of any kind",
    r"implied warrant(?:y|ies)|merchantability|fitness for a particular purpose",
    r"redistributions? (?:of|in) (?:source|binary)",
    r"licensed under the|under the terms of the|released under the|distributed under the",
    r"(?:apache|bsd|mit|gnu|psf|python software foundation) (?:[a-z0-9.-]+ ){0,3}licen[sc]e",
    r"spdx-license-identifier|apache\.org/licenses|see licen[sc]e",
)
_LICENCE = re.compile("|".join(_PHRASES))
_HINTS = ("licen", "copyright", "warrant", "merchantab", "rights reserved", "redistrib", "permission", "under the te")


def contains_licence_text(text: str) -> bool:
    """Whether a paragraph (or a file) speaks of its licence or copyright; wrapped lines count as one."""
    lowered = text.lower()
    return any(hint in lowered for hint in _HINTS) and _LICENCE.search(" ".join(lowered.split())) is not None
