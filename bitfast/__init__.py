"""The Big Transfer (BiT) classes of transformers 4.56: same names, same checkpoints, same numbers.

``from bitfast import BitModel`` instead of ``from transformers import BitModel``.
"""

from bitfast.auto_classes import TransformersRegistration, register_with_transformers
from bitfast.backends import BackendUnavailableError, disable_kernel, enable_kernel, use_backend
from bitfast.checkpoints.files import CheckpointError
from bitfast.configuration import BitConfig
from bitfast.export import exportable
from bitfast.graphs import capture, release_graphs
from bitfast.images.batch_feature import BatchFeature
from bitfast.images.processing import BitImageProcessor
from bitfast.images.processing_fast import BitImageProcessorFast
from bitfast.in_place import AccelerationReport, accelerate, restore
from bitfast.modeling import BitBackbone, BitForImageClassification, BitModel, BitPreTrainedModel

__version__ = "0.1.0"

__all__ = [
    "AccelerationReport",
    "BackendUnavailableError",
    "BatchFeature",
    "BitBackbone",
    "BitConfig",
    "BitForImageClassification",
    "BitImageProcessor",
    "BitImageProcessorFast",
    "BitModel",
    "BitPreTrainedModel",
    "CheckpointError",
    "TransformersRegistration",
    "accelerate",
    "capture",
    "disable_kernel",
    "enable_kernel",
    "exportable",
    "register_with_transformers",
    "release_graphs",
    "restore",
    "use_backend",
]
