"""Optional packages: which extra of pyproject.toml installs each, and one error where one is missing.

`import pruning` and everything that prunes needs torch and NumPy only. A wing that cannot work without other packages
calls `need` in its `__init__`; elsewhere the import of an optional package stands within `optional_import`.
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
    """An optional package that is used and not installed. The message says what to install.

    Command lines print it as one line, as every `ConfigError`; Python programs may catch it as an `ImportError`.

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
    """Make sure that optional packages are there, without importing them.

    Args:
        modules: Top-level modules, keys of `EXTRA_OF`.

    Raises:
        MissingPackageError: Naming those that are not installed.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingPackageError(*missing)


@contextlib.contextmanager
def optional_import() -> Iterator[None]:
    """Around imports of optional packages: one that is not installed is a `MissingPackageError`.

    Raises:
        MissingPackageError: Naming the package and its extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        raise MissingPackageError(error.name) from error
