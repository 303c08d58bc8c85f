"""Where transformers' users look for :class:`BitImageProcessor`; it stands in ``bitfast.images``."""

from bitfast.images.processing import BitImageProcessor

__all__ = ["BitImageProcessor"]
