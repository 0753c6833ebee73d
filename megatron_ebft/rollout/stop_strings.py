"""Stop strings: texts that end a completion."""

from megatron_ebft.data.tokenizer import Tokenizer


class StopStrings:
    """Texts that end a completion, and where.

    A string may begin and end inside tokens. It must be in the completion as a whole: what is in the prompt does not
    count.
    """

    def __init__(self, strings: list[str], tokenizer: Tokenizer):
        self.strings, self.tokenizer = strings, tokenizer
        self.length = 4 + max((len(text.encode()) for text in strings), default=0)
        """Tokens at the end that are looked at first: they hold a string that has just been completed, even if each
        has only one byte."""
        self.longest = max(map(len, strings), default=0)

    def has_come(self, tokens: list[int]) -> bool:
        """Whether the tokens at the end hold one of the strings."""
        length = self.length
        while True:
            text = self.tokenizer.completion_text(tokens[-length:])
            if len(text) > self.longest or length >= len(tokens):
                return any(string in text for string in self.strings)
            length *= 2  # some tokens, special ones for example, have no text

    def cut(self, text: str) -> str:
        """A text up to the first of the strings."""
        return text[: min((place for string in self.strings if (place := text.find(string)) >= 0), default=len(text))]
