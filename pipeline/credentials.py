"""Secrets: how a config is seen to hold one, and texts for people that show none.

Configs lie on disk beside their outputs, travel with every job and stand in Ray's job list and in
logs. Keys and tokens therefore come from the environment alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from pipeline.errors import ConfigError
from pipeline.messages import short

HIDDEN = "***"
HOW_TO_GIVE_IT = (
    "remove it, and export it before Ray is started: before `ray start` on every node, or before "
    "`polystill run` without --address"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = _words("""
    SECRET SECRETS PASSWORD PASSWORDS PASSWD PASSPHRASE CREDENTIAL CREDENTIALS APIKEY AUTHTOKEN
    ACCESSKEY SECRETKEY PRIVATEKEY ACCESSTOKEN AUTHORIZATION
""")
_SECRET_ENDS = ("PASSWORD", "PASSWD", "SSHPASS")
"""Ends of words such as PGPASSWORD."""
_LAST_WORDS = frozenset({"PASS", "PWD", "PAT"})
"""Words that mean a secret behind other words."""
_LAST_OF_VARIABLES = frozenset({"PW", "AUTH", "SAS"})
"""Words that mean a secret behind other words in the name of an environment variable."""
_KEYS = frozenset({"KEY", "TOKEN"})
_PLURALS = frozenset({"KEYS", "TOKENS"})
_OF_ACCESS = _words("""
    API ACCESS AUTH BEARER PRIVATE SECRET SESSION REFRESH SECURITY SERVICE ACCOUNT HF HUB
    HUGGINGFACE GITHUB GITLAB OPENAI ANTHROPIC WANDB AWS AZURE
""")
"""Words before `key` or `token` that tell a secret from a token of a text."""
_HARMLESS_LAST_WORDS = _words("""
    PATH FILE DIR DIRECTORY FOLDER MODE TYPE PROVIDER URL URI ENDPOINT LEN LENGTH LIMIT SIZE COUNT
    NAME ENV TTL TIMEOUT SECONDS EXPIRY EXPIRATION ENABLED THRESHOLD BUDGET COLUMN IDS DTYPE PREFIX
    MOUNT
""")
"""Words behind which a value says where a secret is, or how it is used."""
_SWITCH = re.compile(r"(?i)|0|1|true|false|yes|no|on|off|null|none")
_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|(?<![\w/.-])sk-(?:[a-z0-9]{2,10}-){0,3}(?=[A-Za-z_]{0,99}\d)\w{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}"
    r"|\bAIza[\w-]{35}\b|\beyJ[\w-]{10,999}\.eyJ[\w-]{10,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?i:\bBearer )[\w.~+/-]{16,}"
    r"|\bAccountKey=[\w+/=]{20,}|[?&]sig=[\w%+/=-]{20,}|hooks\.slack\.com/services/\w"
)
"""Values that their issuers made recognisable."""
_USER = re.compile(
    r"(?<![\w+.-])(?P<scheme>https?:/{2,9}(?=[^\s/@'\"]{0,999}@)|[A-Za-z][\w+.-]*:/{2,9}"
    r"(?=[^\s/@:'\"]{0,999}:))[^\s'\"]{0,999}@"
)
"""Name and password in a URL within a text."""
_PORT = re.compile(r":/{2,9}[^\s/@:'\"]{1,999}:\d{3,5}/")
"""Port in a URL, behind which an @ belongs to the path."""
_OF_ADDRESSES = frozenset({"PROXY", "URL", "URI", "DSN", "USER", "HOST", "ADDRESS"})
_BARE_USER = re.compile(r"[^\s/@:'\"]{1,999}:[^\s/@'\"]{1,999}@[\w.\[\]-]{1,999}(?::\d{1,5})?/?")
"""Name and password before a host, without a scheme."""
_PATH = re.compile(r"(?:/[\w.@-]{1,255}){2,}")
_NUMBER = re.compile(r"-?\d{1,9}(?:\.\d{1,9})?")
_QUERY = re.compile(
    r"(?i)(?P<name>[?&][\w-]{0,99}(?:key|token|secret|password|signature)[\w-]{0,99})=[^\s&'\"]+"
)
_ASSIGNED = re.compile(
    r"(?<![\w-])(?P<name>[A-Za-z_][\w-]*)(?P<sign>['\"]?\s*[:=]\s*)(?P<value>'[^']*'|\"[^\"]*\"|[^\s,{}\[\]]+)"
)
_URL = re.compile(
    r"(?s)(?P<scheme>\s*(?:[A-Za-z][\w+.-]*:(?=[/\\]))?)(?P<slashes>[/\\]*)(?P<rest>.*)"
)


def check_no_secrets(values: dict[str, Any]) -> None:
    """Refuses keys, tokens and passwords anywhere in the values of a config.

    Raises:
        ConfigError: there is one; the message names its place and not the secret.
    """
    for place, value in _texts(values, ()):
        name, dotted = _name(place), short(".".join(place), 200)
        of_variable = place[:2] == ("cluster", "env_vars") or place[-2:-1] == ("env",)
        if is_secret_name(name, of_variable) and not _is_harmless(name, value):
            raise ConfigError(f"{dotted} is a secret by its name, {_why(place)}")
        if _VALUES.search(value) or _has_user(name, value):
            raise ConfigError(f"{dotted} holds a key, token or password, {_why(place)}")


def _name(place: tuple[str, ...]) -> str:
    """Name of what a value stands for: the last key that is no place in a list."""
    return next((part for part in reversed(place) if not part.isdecimal()), "")


def _is_harmless(name: str, value: str) -> bool:
    """Whether the value under a secret's name is none: a switch; or a number of tokens or the path
    of a file, except where the name says `password` or `secret`.
    """
    if _SWITCH.fullmatch(value):
        return True
    is_plain = _NUMBER.fullmatch(value) or _PATH.fullmatch(value)
    return bool(is_plain) and not _says_secret(_words_of(name) - {"CREDENTIAL", "CREDENTIALS"})


def _has_user(name: str, value: str) -> bool:
    """Whether a text holds a user and a password."""
    found = _USER.search(value)
    if found is not None and not _PORT.search(found[0]):
        return True
    return bool(_words_of(name) & _OF_ADDRESSES) and _BARE_USER.fullmatch(value) is not None


def is_secret_name(name: str, of_variable: bool = True) -> bool:
    """Whether a value under a name is a secret, by the words of the name.

    Args:
        of_variable: the name is that of an environment variable, in which any `KEY` and `TOKEN`
            counts. Other names may mean the tokens of a text, such as `pad_token`.
    """
    words = [word.upper() for word in _WORD.findall(name)]
    if not words or words[-1] in _HARMLESS_LAST_WORDS or "PUBLIC" in words:
        return False
    if _says_secret(words) or (len(words) > 1 and words[-1] in _LAST_WORDS):
        return True
    of_access = [word for before, word in pairwise(words) if before in _OF_ACCESS]
    if _KEYS.intersection(of_access) or (of_variable and _PLURALS.intersection(of_access)):
        return True
    if not of_variable:
        return False
    return (
        (len(words) > 1 and words[-1] in _LAST_OF_VARIABLES)
        or any(word in _KEYS or word.endswith("TOKEN") for word in words)
        or ("CONNECTION", "STRING") in pairwise(words)
        or ("AUTH", "CONFIG") in pairwise(words)
    )


def _says_secret(words: Iterable[str]) -> bool:
    return any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words)


def _words_of(name: str) -> frozenset[str]:
    return frozenset(word.upper() for word in _WORD.findall(name))


def shown_url(url: str) -> str:
    """A URL, URI or address for people: without user, password and the values of its query.

    It is also right for what was meant as a URL: without its scheme, or with too many slashes.
    """
    parts = _URL.fullmatch(url)
    assert parts is not None, "every text has such parts"
    scheme, slashes, rest = parts["scheme"], parts["slashes"], parts["rest"]
    if not scheme and slashes.strip() == "/":
        return url  # a local path
    authority = re.split(r"[/?#\\]", rest)[0]
    user, at, _ = authority.rpartition("@")
    # a container of Azure stands before an @, too
    if at and (":" in user or scheme.lower() in ("", "http:", "https:", "ray:")):
        rest = f"{HIDDEN}@{rest[len(user) + 1 :]}"
    elif not at and "@" in rest and ":" in re.sub(r"\[[^\[\]]*\]", "", authority):
        # the password may hold a slash or another sign that should be escaped
        rest = f"{HIDDEN}@{rest.rpartition('@')[2]}"
    before, query, _ = rest.partition("?")
    rest = f"{before}?{HIDDEN}" if query and "=" in rest else rest
    return f"{scheme}{slashes}{rest}"


def without_passwords(text: str) -> str:
    """A text without the users, passwords and keys of the URLs in it, and known kinds of keys."""
    text = _QUERY.sub(rf"\g<name>={HIDDEN}", text)
    return _VALUES.sub(HIDDEN, _USER.sub(rf"\g<scheme>{HIDDEN}@", text))


def without_secrets(text: str) -> str:
    """A word of a command line, such as an override, without the secrets in it."""

    def hidden(match: re.Match[str]) -> str:
        is_secret = is_secret_name(match["name"]) and not _SWITCH.fullmatch(match["value"])
        return f"{match['name']}{match['sign']}{HIDDEN}" if is_secret else match[0]

    is_address = "@" in text and "=" not in text and not re.search(r"\s", text)
    return _ASSIGNED.sub(hidden, without_passwords(shown_url(text) if is_address else text))


def _texts(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a config with its place."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _texts(item, (*place, str(key)))
    elif isinstance(value, str):
        yield place, value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, str(value)


def _why(place: tuple[str, ...]) -> str:
    beginning = "and configs are kept on disk, in logs and in Ray's job list: "
    if "endpoint" in place:
        return (
            f"{beginning}remove it, and name the environment variable that holds the key in "
            "endpoint.api_key_env"
        )
    if "hf_token" in place:
        return f"{beginning}{HOW_TO_GIVE_IT} (as HF_TOKEN)"
    return beginning + HOW_TO_GIVE_IT
