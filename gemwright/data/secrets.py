"""Texts that look like keys and passwords, found by their published shapes and never shown in full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class _Kind:
    """`hints`: literal parts one of which must be there (lower case where `any_case`) before the pattern is tried."""

    name: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    any_case: bool = False


_MIXED = r"(?=[\w-]*\d)(?=[\w-]*[A-Za-z])"
_KINDS: Final = (
    _Kind("an AWS access key", ("AKIA", "ASIA"), re.compile(r"\b((?:AKIA|ASIA)[0-9A-Z]{16})\b")),
    _Kind(
        "a GitHub token",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})\b"),
    ),
    _Kind("an API key (sk-)", ("sk-",), re.compile(rf"(?<![\w-])(sk-{_MIXED}[\w-]{{20,}})")),
    _Kind("a Hugging Face token", ("hf_",), re.compile(r"\b(hf_[A-Za-z0-9]{30,})\b")),
    _Kind("a Google API key", ("AIza",), re.compile(r"\b(AIza[\w-]{35})(?![\w-])")),
    _Kind("a Slack token", ("xox",), re.compile(r"\b(xox[abposr]-[\w-]{10,})")),
    _Kind("a Stripe key", ("_live_",), re.compile(r"\b([rs]k_live_[A-Za-z0-9]{16,})\b")),
    _Kind("a private key", ("PRIVATE KEY",), re.compile(r"(-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----)")),
    _Kind("a JSON web token", ("eyJ",), re.compile(r"\b(eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,})")),
    _Kind("a password in an address", ("://",), re.compile(r"://[^\s/:@]+:([^\s/@]{4,})@")),
    _Kind(
        "a password or key that is set",
        ("passw", "pwd", "secret", "api_key", "apikey", "api-key", "token", "пароль"),
        re.compile(
            r"(?i)\b(?:\w*password|passwd|pwd|\w*secret(?:[_-]key)?|\w*api[_-]?key|\w*[_-]token|token|пароль)"
            rf"[\"']?\s*[:=]\s*[\"']?{_MIXED}(?!os\.|process\.)([^\s\"'<>${{}}()]{{8,}})"
        ),
        any_case=True,
    ),
)


# By a sign that must be there too, which is quickly sought.
_GUARDED: Final = tuple(
    (guard, tuple(hint for kind in _KINDS if not kind.any_case for hint in kind.hints if guard in hint))
    for guard in ("_", "-", ":")
)
_BARE: Final = tuple(
    hint for kind in _KINDS if not kind.any_case for hint in kind.hints if not any(g in hint for g, _ in _GUARDED)
)
_LOWER: Final = tuple(hint for kind in _KINDS if kind.any_case for hint in kind.hints)


def has_hint(text: str) -> bool:
    """Whether anything in `text` may be a secret: quick, and true now and then for nothing."""
    for hint in _BARE:
        if hint in text:
            return True
    for guard, hints in _GUARDED:
        if guard in text and any(hint in text for hint in hints):
            return True
    if "=" not in text and ":" not in text:
        return False
    lower = text.lower()
    return any(hint in lower for hint in _LOWER)


def secrets_in(text: str) -> Iterator[tuple[str, str]]:
    """(what it looks like, its first four characters and its length) of each; a text is told as one kind only."""
    for name, match in _found(text):
        yield name, masked(match.group(1))


def hidden(text: str) -> str:
    """`text` with stars for all but the first characters of each secret: to be shown in part."""
    for _, match in _found(text) if has_hint(text) else ():
        start, end = match.span(1)
        start += _shown(match.group(1))
        text = text[:start] + "*" * (end - start) + text[end:]
    return text


def _found(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    lower = text.lower()
    seen: set[int] = set()
    for kind in _KINDS:
        if not any(hint in (lower if kind.any_case else text) for hint in kind.hints):
            continue
        for match in kind.pattern.finditer(text):
            if match.end(1) not in seen:
                seen.add(match.end(1))
                yield kind.name, match


def _shown(secret: str) -> int:
    return min(4, len(secret) // 3)


def masked(secret: str) -> str:
    """Enough to find it again, not enough to use it."""
    return f"{secret[: _shown(secret)]}... ({len(secret)} characters)"
