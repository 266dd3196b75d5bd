"""Backends: what decodes and crops the images of a plan. Every file here registers one by `register_backend`.

A backend of your own is registered the same way, from a module that the program imports (`--plugin MODULE`); see
docs/howto/own-backend.md.
"""

from image_classification.data.backends.backend import (
    AUTO,
    Backend,
    backend_names,
    choose_backend,
    find_backend,
    register_backend,
)

__all__ = ["AUTO", "Backend", "backend_names", "choose_backend", "find_backend", "register_backend"]
