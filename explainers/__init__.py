"""Explanations of image classifiers: attribution methods, saliency models, and figures of how well they localise."""

from typing import TYPE_CHECKING

from image_classification.lazy import lazy_names

if TYPE_CHECKING:
    from explainers.aem.selector_method import SelectorMethod
    from explainers.attribution.baselines import Centre
    from explainers.attribution.ebp import EBP
    from explainers.attribution.gradcam import GradCAM
    from explainers.attribution.integrated_gradients import IntegratedGradients
    from explainers.attribution.lrp import LRP
    from explainers.attribution.method import (
        Attribution,
        Method,
        Prepared,
        create_method,
        method_names,
        register_method,
    )
    from explainers.attribution.rap import RAP
    from explainers.attribution.record import UnsupportedOperatorError
    from explainers.casm.casm_method import CasmMethod

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
    "register_method",
]
#: Name → module that defines it.
_MODULES = {
    "EBP": "explainers.attribution.ebp",
    "LRP": "explainers.attribution.lrp",
    "RAP": "explainers.attribution.rap",
    "Attribution": "explainers.attribution.method",
    "CasmMethod": "explainers.casm.casm_method",
    "Centre": "explainers.attribution.baselines",
    "GradCAM": "explainers.attribution.gradcam",
    "IntegratedGradients": "explainers.attribution.integrated_gradients",
    "Method": "explainers.attribution.method",
    "Prepared": "explainers.attribution.method",
    "SelectorMethod": "explainers.aem.selector_method",
    "UnsupportedOperatorError": "explainers.attribution.record",
    "create_method": "explainers.attribution.method",
    "method_names": "explainers.attribution.method",
    "register_method": "explainers.attribution.method",
}
__getattr__ = lazy_names(__name__, _MODULES)
