"""Backends: what decodes and crops the images of a plan. Every file here registers one with `register_backend`.

Custom backends are registered the same way, from a module that the program imports (`--plugin MODULE`); see
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
