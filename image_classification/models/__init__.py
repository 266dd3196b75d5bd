"""Networks: LucidPrune's own by name, torchvision's and timm's by prefix; structure as data; weights from files."""

from image_classification.models.building_for_weights import model_for_weights
from image_classification.models.external import main_and_auxiliary_logits
from image_classification.models.factory import (
    ModelIdentity,
    arch_info,
    class_names_of,
    create_model,
    identity_of,
    input_of,
    model_names,
    remember_class_names,
    remember_input,
    unwrap,
)
from image_classification.models.fitting_weights import apply_weights, head_tensors
from image_classification.models.model_config import ModelConfig, build_model
from image_classification.models.modes import allow_tf32, evaluating, exact_float32, inference
from image_classification.models.registry import ArchInfo, ModelError, register
from image_classification.models.structure import Structure, StructureError
from image_classification.models.structure_build import build_from_structure
from image_classification.models.structure_capture import capture_structure
from image_classification.models.weights import LoadedWeights, load_weights, read_safely, saved_input
from image_classification.models.weights_reading import WeightsError

__all__ = [
    "ArchInfo",
    "LoadedWeights",
    "ModelConfig",
    "ModelError",
    "ModelIdentity",
    "Structure",
    "StructureError",
    "WeightsError",
    "allow_tf32",
    "apply_weights",
    "arch_info",
    "build_from_structure",
    "build_model",
    "capture_structure",
    "class_names_of",
    "create_model",
    "evaluating",
    "exact_float32",
    "head_tensors",
    "identity_of",
    "inference",
    "input_of",
    "load_weights",
    "main_and_auxiliary_logits",
    "model_for_weights",
    "model_names",
    "read_safely",
    "register",
    "remember_class_names",
    "remember_input",
    "saved_input",
    "unwrap",
]
