"""Optional packages: the extra of pyproject.toml that installs each, and a single error for missing ones.

`import pruning` and everything that prunes needs only torch and NumPy. A subpackage that cannot work without other
packages calls `need` in its `__init__`; elsewhere, optional packages are imported within `optional_import`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from image_classification.config import ConfigError

#: Top-level module → the extra that installs it. A test compares this table with pyproject.toml.
EXTRA_OF = {
    "torchvision": "train",
    "PIL": "train",
    "yaml": "train",
    "rich": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "sklearn": "train",
    "scipy": "explain",
    "torchmetrics": "explain",
    "jinja2": "report",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "huggingface_hub": "hub",
    "timm": "timm",
    "cv2": "inpaint",
    "mlflow": "track",
    "wandb": "track",
    "argcomplete": "completion",
    "lightning": "loops",
    "transformers": "loops",
}


class MissingPackageError(ConfigError, ImportError):
    """An optional package is used but not installed. The message says what to install.

    Command lines print it as one line, like every `ConfigError`; Python programs may catch it as an `ImportError`.

    Args:
        modules: Names of the modules that are missing, keys of `EXTRA_OF`.
    """

    def __init__(self, *modules: str) -> None:
        extras = sorted({EXTRA_OF[module] for module in modules})
        verb = "is" if len(modules) == 1 else "are"
        super().__init__(
            f"{', '.join(modules)} {verb} not installed: pip install 'lucidprune[{','.join(extras)}]'"
        )
        self.modules = modules


def need(*modules: str) -> None:
    """Check that optional packages are installed, without importing them.

    Args:
        modules: Top-level modules, keys of `EXTRA_OF`.

    Raises:
        MissingPackageError: A package is not installed; the message names all missing ones.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingPackageError(*missing)


@contextlib.contextmanager
def optional_import() -> Iterator[None]:
    """Turn failed imports of optional packages inside the block into a `MissingPackageError`.

    Raises:
        MissingPackageError: A package is not installed; the message names it and its extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        raise MissingPackageError(error.name) from error
