"""Classifier-agnostic saliency maps, CASM (Żołna, Geras, Cho 2020, arXiv:1805.08249).

A decoder reads a classifier's features and predicts which part of an image to remove so that no classifier recognises
the image any more: neither the current one nor its earlier states during training. Classifier and decoder are trained
together.
"""

from explainers.casm.casm_explanation import CasmExplanation
from explainers.casm.decoder import CasmDecoder
from explainers.casm.model import Casm, load_casm, save_casm

__all__ = ["Casm", "CasmDecoder", "CasmExplanation", "load_casm", "save_casm"]
