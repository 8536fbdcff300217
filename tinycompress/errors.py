"""The one error type for bad input: it names the field, what was found and what is accepted.

Anything else that escapes is a bug of ours; the command line shows an `InputError` as one clean line.
"""

from __future__ import annotations


class InputError(ValueError):
    """`field`: found `found`; accepted: `accepted`."""

    def __init__(self, field: object, found: object, accepted: object) -> None:
        self.field, self.found, self.accepted = str(field), str(found), str(accepted)
        super().__init__(f"{self.field}: found {self.found}; accepted: {self.accepted}")
