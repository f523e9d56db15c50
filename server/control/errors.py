"""Errors of a change of bundles, answered over HTTP.

ServerError
└── ChangeError               a change that cannot be begun, promoted or aborted
    ├── BadChangeError        the request says something that cannot be meant
    ├── ForbiddenPlaceError   a place that is neither the configured bundle's nor beside it
    ├── ChangeRunningError    another change is under way
    └── NoChangeError         there is nothing to promote or abort, or not any more
"""

from __future__ import annotations

from server.errors import ServerError


class ChangeError(ServerError):
    """A change that cannot be begun, promoted or aborted."""

    status = 400
    code = "bad_change"


class BadChangeError(ChangeError):
    """The request says something that cannot be meant."""


class ForbiddenPlaceError(ChangeError):
    """A place that is neither the configured bundle's nor beside it."""

    status = 403
    code = "bundle_place_forbidden"


class ChangeRunningError(ChangeError):
    """Another change is under way."""

    status = 409
    code = "change_in_progress"


class NoChangeError(ChangeError):
    """There is nothing to promote or abort, or not any more."""

    status = 409
    code = "no_change"
