"""Say who one is to another machine, with MUNGE (munge(3)): only the cluster's key opens what is encoded.

MUNGE vouches for the user id of whoever encoded something, keeps it from others, and decodes it once on each machine.
"""

from __future__ import annotations

import ctypes
import functools

_LIBRARY = "libmunge.so.2"
_SUCCESS = 0
_OPTION_UID_RESTRICTION = 9  # munge_opt_t in munge.h

_uid_t = ctypes.c_uint32
_ANY_UID = 0xFFFFFFFF


class MungeError(Exception):
    """MUNGE does not answer, or what came is no credential that is good here."""


def encode(payload: bytes, *, reader: int | None = None) -> bytes:
    """Return a credential with a payload, from the user that this process is.

    Args:
        reader: the user id that alone may decode it; None for everybody.

    Raises:
        MungeError: there is no munged to be reached.
    """
    library = _library()
    context = library.munge_ctx_create()
    credential = ctypes.c_char_p()
    try:
        if reader is not None:
            _check(library.munge_ctx_set(context, _OPTION_UID_RESTRICTION, _uid_t(reader)))
        _check(library.munge_encode(ctypes.byref(credential), context, payload, len(payload)))
        return credential.value or b""
    finally:
        library.munge_ctx_destroy(context)
        _free(ctypes.cast(credential, ctypes.c_void_p))


def decode(credential: bytes) -> tuple[bytes, int]:
    """Return the payload of a credential and the user id of whoever encoded it.

    Raises:
        MungeError: it is none, is expired, is not for this user, or was decoded here before.
    """
    library = _library()
    content, length = ctypes.c_void_p(), ctypes.c_int()
    uid, gid = _uid_t(_ANY_UID), ctypes.c_uint32()
    try:
        _check(
            library.munge_decode(
                credential, None, ctypes.byref(content), ctypes.byref(length), ctypes.byref(uid), ctypes.byref(gid)
            )
        )
        return ctypes.string_at(content, length.value) if content else b"", uid.value
    finally:
        _free(content)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise MungeError(f"MUNGE's library cannot be loaded: {error}") from error
    library.munge_ctx_create.restype = ctypes.c_void_p
    library.munge_ctx_destroy.argtypes = [ctypes.c_void_p]
    library.munge_ctx_destroy.restype = None
    library.munge_ctx_set.argtypes = [ctypes.c_void_p, ctypes.c_int]  # and one more, of the option's type
    library.munge_encode.argtypes = [
        *(ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int),
    ]
    library.munge_strerror.restype = ctypes.c_char_p
    return library


def _check(code: int) -> None:
    if code != _SUCCESS:
        raise MungeError(f"MUNGE: {_library().munge_strerror(code).decode(errors='replace')}")


def _free(pointer: ctypes.c_void_p) -> None:
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(pointer)
