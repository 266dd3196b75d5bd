"""`--method` and the flags of the methods, each declared by its method on the field that it sets."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

from explainers.attribution.method import Method, create_method, method_class, method_names, plain_name
from image_classification.config import AnyField, check, flag, flag_fields


def offered_methods() -> list[str]:
    """Return the names accepted by `--method`."""
    return method_names(aliases=True)


@dataclasses.dataclass(kw_only=True)
class MethodConfig:
    """Which methods explain them."""

    method: list[str] = flag(
        ["gradcam"],
        "--method",
        "-m",
        repeatable=True,
        choices=offered_methods,
        help="attribution method; may be given several times",
    )

    def __post_init__(self) -> None:
        self.method = list(dict.fromkeys(self.method))
        chosen = {plain_name(name) for name in self.method}
        for option in _method_options():
            given = self._setting(option) != option.field.default
            check(
                not given or option.method in chosen,
                f"{option.flag} has no effect without --method {option.method}: add the method, or leave {option.flag} "
                "out",
            )
        self.methods()

    def methods(self) -> dict[str, Method]:
        """Return the chosen methods with their settings, by the requested name."""
        settings: dict[str, dict[str, object]] = {}
        for option in _method_options():
            settings.setdefault(option.method, {})[option.field.name] = self._setting(option)
        return {name: create_method(name, **settings.get(plain_name(name), {})) for name in self.method}

    def _setting(self, option: _MethodOption) -> object:
        return getattr(self, option.key, option.field.default)


@dataclasses.dataclass(frozen=True)
class _MethodOption:
    """A flag that a method declares.

    Attributes:
        method: Name of the method.
        field: Field of the method's class.
        annotation: Its type.
        flag: The flag, such as "--ig-steps".
    """

    method: str
    field: AnyField
    annotation: object
    flag: str

    @property
    def key(self) -> str:
        """The flag's name in a configuration, such as "ig_steps"."""
        return self.flag.removeprefix("--").replace("-", "_")


def _method_options() -> list[_MethodOption]:
    """Return the flags of all registered methods."""
    options = []
    for name in method_names():
        method = method_class(name)
        hints = get_type_hints(method)
        for field, spec in flag_fields(method):
            options.append(_MethodOption(name, field, hints[field.name], spec.names[0]))
    return options


def method_config() -> type[MethodConfig]:
    """Return `MethodConfig` with the flags that registered methods declare."""
    fields: list[tuple[str, object, AnyField]] = []
    for option in _method_options():
        field: AnyField = dataclasses.field(default=option.field.default, metadata=option.field.metadata)
        fields.append((option.key, option.annotation, field))
    return dataclasses.make_dataclass(
        "MethodConfig",
        fields,
        bases=(MethodConfig,),
        namespace={"__doc__": MethodConfig.__doc__},
        kw_only=True,
    )
