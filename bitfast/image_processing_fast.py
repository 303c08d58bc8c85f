"""Where transformers' users look for :class:`BitImageProcessorFast`; it stands in ``bitfast.images``."""

from bitfast.images.processing_fast import BitImageProcessorFast

__all__ = ["BitImageProcessorFast"]
