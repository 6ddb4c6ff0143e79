"""The error of an image that cannot be used."""

from leon_jax.config import UserError
from leon_jax.data.sources.raw_record import Reason


class ImageError(UserError):
    """An image that cannot be used.

    Attributes:
      reason: the reject reason, for counting.
    """

    def __init__(self, message: str, reason: Reason = "picture_unreadable"):
        super().__init__(message)
        self.reason = reason
