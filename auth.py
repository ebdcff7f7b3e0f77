"""Passwords and tokens: plain values in, plain values out.

This module knows neither HTTP nor SQL: whether a session still stands is the database's knowledge.
"""
import base64
import functools
import hashlib
import hmac
import re
import secrets
import time
import unicodedata
from dataclasses import dataclass
from typing import Any

import jwt

ACCESS = "at+jwt"  # RFC 9068
REFRESH = "rt+jwt"
ISSUER = "document-lifecycle-api"

# OWASP's equal-strength scrypt settings; this one takes 16 MiB. Stored in each hash, so they can grow later.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**14, 8, 5

_COMPACT_JWS = re.compile(r"[\w-]{1,512}\.[\w-]{1,4096}\.[\w-]{1,512}", re.ASCII)


class InvalidToken(Exception):
    """The token is not one of ours, not of this kind, or not valid now."""


@dataclass(frozen=True)
class Claims:
    user_id: str
    session_id: str
    jti: str


class TokenSigner:
    """Issues and verifies JWTs (RFC 7519), HS256 only, with every claim required and `typ` checked (RFC 8725)."""

    def __init__(self, secret: bytes) -> None:
        """`secret` has at least 32 bytes, else ValueError (RFC 7518, 3.2)."""
        if len(secret) < 32:
            raise ValueError("the signing key needs at least 32 bytes")
        self._secret = secret
        self._jwt = jwt.PyJWT({
            "require": ["iss", "aud", "sub", "iat", "exp", "jti", "sid"], "strict_aud": True, "verify_exp": False})
        # A good signature stays good: after the first time only the end of a token is looked at.
        self._decode = functools.lru_cache(maxsize=1024)(self._decode_new)

    def issue(self, kind: str, claims: Claims, expires_at: float) -> str:
        """A signed token of kind ACCESS or REFRESH; `expires_at` in seconds since the epoch."""
        payload = {
            "iss": ISSUER, "aud": ISSUER, "sub": claims.user_id, "sid": claims.session_id, "jti": claims.jti,
            "iat": int(time.time()), "exp": int(expires_at),
        }
        return self._jwt.encode(payload, self._secret, "HS256", {"typ": kind})

    def verify(self, kind: str, token: str, *, allow_expired: bool = False) -> Claims:
        """The claims of a token of this kind, else InvalidToken. Whether its session stands is not looked at."""
        claims, expires_at = self._decode(kind, token)
        if expires_at <= time.time() and not allow_expired:
            raise InvalidToken("expired")
        return claims

    def _decode_new(self, kind: str, token: str) -> tuple[Claims, float]:
        if not _COMPACT_JWS.fullmatch(token):  # PyJWT also takes padded and very long ones
            raise InvalidToken("not a compact JWS")
        try:
            decoded: dict[str, Any] = self._jwt.decode_complete(
                token, self._secret, ["HS256"], audience=ISSUER, issuer=ISSUER)
            payload = decoded["payload"]
            # The exact header that we write: no other typ, and no kid, jku or crit to be talked into.
            if decoded["header"] != {"alg": "HS256", "typ": kind}:
                raise InvalidToken("wrong header")
            return Claims(payload["sub"], payload["sid"], payload["jti"]), float(payload["exp"])
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            raise InvalidToken(type(error).__name__) from error


def hash_password(password: str) -> str:
    """`scrypt$n$r$p$salt$key`, salt and key in base64. Takes about 0.15 s and 16 MiB: not for an event loop."""
    salt = secrets.token_bytes(16)
    key = _scrypt(password, salt, SCRYPT_N, SCRYPT_R, SCRYPT_P)
    encoded = "$".join(base64.b64encode(part).decode() for part in (salt, key))
    return f"scrypt${SCRYPT_N}${SCRYPT_R}${SCRYPT_P}${encoded}"


def verify_password(password: str, password_hash: str | None) -> bool:
    """Whether the password has this hash. None, for an unknown user, costs the same and is False."""
    unknown_user = f"scrypt${SCRYPT_N}${SCRYPT_R}${SCRYPT_P}${'A' * 22}==${'A' * 43}="
    _, n, r, p, salt, key = (password_hash or unknown_user).split("$")
    found = _scrypt(password, base64.b64decode(salt), int(n), int(r), int(p))
    return hmac.compare_digest(found, base64.b64decode(key)) and password_hash is not None


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    # NFKC (NIST SP 800-63B): the same password typed on another keyboard has the same bytes.
    secret = unicodedata.normalize("NFKC", password).encode(errors="surrogatepass")
    return hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, dklen=32, maxmem=256 * n * r)
