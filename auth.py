"""Passwords and tokens as plain values. Whether a session still stands is the database's knowledge."""
import base64
import functools
import hashlib
import hmac
import ipaddress
import re
import secrets
import time
import unicodedata

import jwt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

ACCESS = "at+jwt"  # RFC 9068
REFRESH = "rt+jwt"
ISSUER = "document-lifecycle-api"
SCRYPT = "scrypt$16384$8$5"  # n, r and p: OWASP's setting for 16 MiB. A hash carries its own.
COMPACT_JWS = re.compile(r"[\w-]{1,512}\.[\w-]{1,4096}\.[\w-]{1,512}", re.ASCII)


class InvalidToken(Exception):
    """The token is not one of ours, not of this kind, or has expired."""


# str_max_length also makes pydantic refuse lone surrogates, which SQLite can't store.
@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, str_max_length=64))
class Claims:
    """The claims of a token, each required in it; times in seconds since the epoch. Raises ValueError for others."""
    sub: str  # the user's id
    sid: str  # the session's id
    jti: str
    iat: float
    exp: float
    iss: str = ISSUER
    aud: str = ISSUER


class TokenSigner:
    """Issues and verifies JWTs (RFC 7519): HS256 only, every claim required, `typ` checked (RFC 8725)."""
    def __init__(self, secret: bytes) -> None:
        """`secret` has at least 32 bytes, else ValueError (RFC 7518, 3.2)."""
        if len(secret) < 32:
            raise ValueError("the signing key needs at least 32 bytes")
        self._secret = secret
        # `verify` checks `exp` at each use, since the outcome of PyJWT's checks is cached. `iat` may be in the future,
        # as the clock may have been set back.
        self._jwt = jwt.PyJWT({"strict_aud": True, "verify_exp": False, "verify_iat": False})
        self._verified = functools.lru_cache(maxsize=1024)(self._verify)  # a good signature stays good

    def issue(self, kind: str, claims: Claims) -> str:
        """A token of kind ACCESS or REFRESH: for the same claims always the same."""
        return self._jwt.encode(vars(claims), self._secret, "HS256", {"typ": kind})

    def verify(self, kind: str, token: str, *, allow_expired: bool = False) -> Claims:
        """The claims of a token of this kind, else InvalidToken. Whether its session stands is not looked at."""
        claims = self._verified(kind, token)
        if claims.exp <= time.time() and not allow_expired:
            raise InvalidToken("expired")
        return claims

    def name_hash(self, name: str) -> str:
        """A keyed hash, for names that may be a password typed into the wrong field."""
        return hmac.digest(self._secret, b"name:" + name.encode(errors="surrogatepass"), "sha256").hex()

    def _verify(self, kind: str, token: str) -> Claims:
        if not COMPACT_JWS.fullmatch(token):  # PyJWT takes a token in endless variants, which would fill the cache
            raise InvalidToken("not a compact JWS")
        try:
            decoded = self._jwt.decode_complete(token, self._secret, ["HS256"], audience=ISSUER, issuer=ISSUER)
            claims = Claims(**decoded["payload"])
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            raise InvalidToken(type(error).__name__) from error
        if decoded["header"] != {"alg": "HS256", "typ": kind}:  # no other `typ`; no `kid`, `jku` or `crit`
            raise InvalidToken("wrong header")
        return claims


def hash_password(password: str) -> str:
    """`scrypt$n$r$p$salt$key`, salt and key in base64. Takes about 0.15 s and 16 MiB: not for a busy event loop."""
    return crypt(password, f"{SCRYPT}${base64.b64encode(secrets.token_bytes(16)).decode()}")


def verify_password(password: str, password_hash: str | None) -> bool:
    """Whether the password has this hash. None, for an unknown user, costs the same and is False."""
    expected = password_hash or f"{SCRYPT}${'A' * 22}=="  # settings and salt without a key: it equals no hash
    return hmac.compare_digest(crypt(password, expected), expected)


def crypt(password: str, settings: str) -> str:
    """The password's hash with these settings and this salt, which are the start of a hash (as with crypt(3))."""
    _, n, r, p, salt, *_ = settings.split("$")
    # NFKC (NIST SP 800-63B): the same password typed on another keyboard has the same bytes.
    secret = unicodedata.normalize("NFKC", password).encode(errors="surrogatepass")
    key = hashlib.scrypt(secret, salt=base64.b64decode(salt), n=int(n), r=int(r), p=int(p), maxmem=2**30, dklen=32)
    return f"scrypt${n}${r}${p}${salt}${base64.b64encode(key).decode()}"


def throttle_key(host: str) -> str:
    """For whom failed logins count: the IPv4 address, or the /64 of an IPv6 address, which is what a subscriber has."""
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address), 64), strict=False))
