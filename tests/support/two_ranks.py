"""A runtime that hears what another rank says, without a second process."""

from typing import Any

from speedit_plugins.trainer.parallel.runtime import Runtime


class Told(Runtime):
    """Rank 0 beside a rank 1 that says `words` in every exchange of objects."""

    words: str | None = None

    def gather_objects(self, item: Any) -> list[Any]:
        return [item, type(self).words]


def told(words: str | None) -> Runtime:
    """A rank 0 that hears these words."""
    return type("Told", (Told,), {"words": words})()


class Listening(Runtime):
    """A rank 0 that keeps what it says to the others, in `said`."""

    said: list[Any]

    def gather_objects(self, item: Any) -> list[Any]:
        self.said.append(item)
        return [item]


def listening() -> Listening:
    """A rank 0 that has said nothing yet."""
    return type("Heard", (Listening,), {"said": []})()
