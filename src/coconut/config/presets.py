"""Which maps of fields may read a source."""

import dataclasses

from coconut.config.extensions import find_presets
from coconut.config.field_map import Fields
from coconut.config.schema import Source


def maps_of(source: Source) -> tuple[Fields, ...]:
    """Return the maps that may read a source: those of its preset with its own keys on top, its own, or none.

    >>> maps_of(Source("fields", fields=Fields(question="q", answer="a"))) == (Fields(question="q", answer="a"),)
    True
    >>> [one.question for one in maps_of(Source("gsm_hard", fields=Fields(question="{input} Think!")))]
    ['{input} Think!']
    """
    own = source.fields or Fields()
    if source.format == "fields":
        return (own,)
    given = {field.name: value for field in dataclasses.fields(own) if (value := getattr(own, field.name)) is not None}
    return tuple(dataclasses.replace(one, **given) for one in find_presets().get(source.format, ()))
