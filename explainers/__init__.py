"""What a network looks at: attribution methods, saliency models and localisation figures."""

# Importing the methods enters them into the register.
from explainers.aem.method import SelectorMethod
from explainers.base import Attribution, Method, Prepared, create_method, method_names
from explainers.baselines import Centre
from explainers.casm.method import CasmMethod
from explainers.ebp import EBP
from explainers.gradcam import GradCAM
from explainers.integrated_gradients import IntegratedGradients
from explainers.lrp import LRP
from explainers.rap import RAP
from explainers.record import UnsupportedOperatorError

__all__ = [
    "EBP",
    "LRP",
    "RAP",
    "Attribution",
    "CasmMethod",
    "Centre",
    "GradCAM",
    "IntegratedGradients",
    "Method",
    "Prepared",
    "SelectorMethod",
    "UnsupportedOperatorError",
    "create_method",
    "method_names",
]
