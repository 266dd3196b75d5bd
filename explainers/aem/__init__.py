"""Amortised explanation models (Ganjdanesh et al. 2022): a selector that predicts the region a classifier relies on."""

from explainers.aem.masks import MASK_PRESETS, MaskGeometry
from explainers.aem.saved_selector import SelectorExplanation, load_selector, save_selector
from explainers.aem.selector import Selector, SelectorDesign

__all__ = [
    "MASK_PRESETS",
    "MaskGeometry",
    "Selector",
    "SelectorDesign",
    "SelectorExplanation",
    "load_selector",
    "save_selector",
]
