"""Tables that commands print, as text to look into."""

import re


def squeezed(text: str) -> str:
    """A text without the spaces that align the columns of its tables."""
    return re.sub(" +", " ", text)
