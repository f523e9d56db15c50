"""Which adapters lie in an engine's slots, as far as the gateway can tell.

An engine keeps the adapters used last in its `--max-loras` slots; one that is asked for outside of
them is copied from host memory first, or has been ahead of the request. The model here sees what
this process sends, no more.
"""

from __future__ import annotations


class Residency:
    """The slots of one engine, the adapter used longest ago first."""

    __slots__ = ("_names", "resting", "slots")

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.resting = False
        """Whether no other adapter is to be copied in ahead for now."""
        self._names: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def touch(self, name: str) -> bool:
        """An adapter is used, by a request that goes to the engine for one; whether it has to be
        copied in first."""
        names = self._names
        if name in names:
            del names[name]
            names[name] = None
            return False
        names[name] = None
        while len(names) > self.slots:
            del names[next(iter(names))]
        return True

    def forget(self, name: str) -> None:
        """An adapter was not copied in after all."""
        self._names.pop(name, None)
