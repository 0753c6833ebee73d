"""Fields of question lines."""


def texts(question: dict, *fields: str, is_single: bool = False) -> list[str]:
    """The text or the texts of the first of some fields that a question has.

    Args:
        is_single: whether a list is refused.

    Raises:
        ValueError: there is none of these fields, or another type or an empty list in it; names the field.
    """
    field = next((x for x in fields if x in question), None)
    if field is None:
        raise ValueError(f"has no field {' or '.join(fields)}")
    value = question[field]
    if isinstance(value, str):
        return [value]
    if is_single or not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        kind = "a text" if is_single else "a text or a list of texts"
        raise ValueError(f"{field} is not {kind}, but {value!r:.60}")
    return value
