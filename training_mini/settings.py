"""The settings of a run as one typed object, for people who train from Python."""

import dataclasses
import inspect
import typing
from typing import Any

from entry_points_mini import ArgumentParser, as_flags, as_yaml

from .arguments import CONFIG_HELP, GROUPS, Arguments, default_of, parse_arguments


def optional_fields() -> list[tuple[str, Any, dataclasses.Field]]:
    """Every setting of every group, and `config`; `None` in place of each default, so that one sees what was given."""
    fields = [("config", str | None, dataclasses.field(default=None, metadata={"help": CONFIG_HELP}))]
    for group in GROUPS:
        hints = typing.get_type_hints(group)
        # The fields of a group itself come before those that it inherits.
        for each in sorted(dataclasses.fields(group), key=lambda each: each.name not in group.__annotations__):
            field = dataclasses.field(default=None, metadata={**each.metadata, "default": default_of(each)})
            fields.append((each.name, hints[each.name] | None, field))
    return fields


OptionalSettings = dataclasses.make_dataclass("OptionalSettings", optional_fields(), kw_only=True, repr=False)


class TrainingSettings(OptionalSettings):
    """
    The settings of a training run: `TrainingSettings(dataset="sample", max_minutes=2)`.

    They have the names, the defaults and the checks of the flags of `train_accelerate.py`. `None` stands for the
    default. A setting that is given wins over the file that `config` names. With `resume`, the settings of the run in
    `output_dir` hold, and what is given here wins over them.

    Raises:
        TypeError: for a name that is no setting; the sentence names the right one.
    """

    def __new__(cls, **given: Any) -> "TrainingSettings":
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"TrainingSettings has no setting {name!r}{ArgumentParser(GROUPS).right_name(name)}")
        return super().__new__(cls)

    def given(self) -> dict[str, Any]:
        """The settings that are not left to their defaults, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def arguments(self) -> Arguments:
        """
        The same, checked and complete, in groups.

        Raises:
            ValueError: for anything that cannot be a run, in one sentence.
        """
        ArgumentParser(GROUPS).check_lists(self.given())
        return parse_arguments(as_flags(self.given()))

    def __repr__(self) -> str:
        return f"TrainingSettings({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"


def description_of(field: dataclasses.Field) -> str:
    """A line about a setting: its name, its type, what it is, and its default."""
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type).replace("typing.", "")
    words, default = field.metadata["help"], field.metadata.get("default")
    if default not in (None, False, []) and "(default: " not in words:
        words += f" (default: {as_yaml(default)})"
    return f"    {field.name} ({kind.removesuffix(' | None')}): {words}"


TrainingSettings.__signature__ = inspect.signature(OptionalSettings)  # what `help` and notebooks show
TrainingSettings.__doc__ += (
    "\nSettings:\n" + "\n".join(map(description_of, dataclasses.fields(TrainingSettings))) + "\n"
)
