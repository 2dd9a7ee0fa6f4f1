"""YAML, read safely and strictly. PyYAML is loaded with this module: import it only where there is YAML to read."""

from __future__ import annotations

from typing import Any, TextIO

from doge_deploy.errors import MissingDependencyError

try:
    import yaml
except ImportError:
    raise MissingDependencyError(
        "files of options and devices are read with PyYAML, which is not installed: pip install 'doge-deploy[graph]'"
    ) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | TextIO, *, unique_keys: bool = False) -> Any:
    """The value that a YAML text stands for.

    Args:
        text: one document, or a file that holds it.
        unique_keys: refuse a mapping in which a key stands twice.

    Raises:
        ValueError: it is not YAML; the message is one line.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader if unique_keys else yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
